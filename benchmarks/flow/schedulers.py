"""The schedulers of diffusers without noise of their own, in every setting they offer, run on a given model.

A scheduler is treated as well as possible: the model is evaluated at exactly the noise level that the scheduler
believes to be at, and not at a rounded timestep.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

from stepwell.solver.path import Path, VariancePreserving

DISCRETE = 1000
"""Training timesteps, diffusers' default: step k of a variance-preserving path is t = (k + 1) / 1000."""


@dataclass(frozen=True)
class Scheduler:
    """A scheduler in one setting. `build(n)` has its timesteps set; `coordinates` are x itself, or x / alpha."""

    name: str
    build: Callable[[int], Any]
    path: str
    coordinates: str = "path"
    output: str = "noise"
    per_step: int = 1

    def at_most(self, evaluations: int) -> Any:
        """The scheduler with the most steps that make at most this number of evaluations; None where none do."""
        for steps in range(-(-evaluations // self.per_step), 1, -1):
            scheduler = self.build(steps)
            if len(scheduler.timesteps) <= evaluations:
                return scheduler
        return None


def levels(scheduler: Any, place: int, timestep: Any) -> float:
    """The noise level that the scheduler is at: sigma on the linear path, else sigma / alpha."""
    if not getattr(scheduler, "state_in_first_order", True) and hasattr(scheduler, "sigmas_interpol"):
        return float(scheduler.sigmas_interpol[place])
    if hasattr(scheduler, "ets") and hasattr(scheduler, "betas") and len(scheduler.betas) != DISCRETE:  # iPNDM
        return float(scheduler.betas[place] / scheduler.alphas[place])
    if hasattr(scheduler, "sigmas") and not hasattr(scheduler, "plms_timesteps"):
        return float(scheduler.sigmas[place])
    left = float(scheduler.alphas_cumprod[int(timestep)])
    return math.sqrt((1.0 - left) / left)


def start(entry: Scheduler, scheduler: Any, path: Path) -> float:
    """The time that the scheduler begins at."""
    return _time(levels(scheduler, 0, scheduler.timesteps[0]), path)


def _time(level: float, path: Path) -> float:
    return level if path.name == "linear" else min(float(path.time(-math.log(level))), 1.0)


def run(entry: Scheduler, scheduler: Any, data: Callable[[Tensor, float], Tensor], x: Tensor, path: Path) -> Tensor:
    """The scheduler's sample from noise x (N, *D); `data` is the model's data prediction at (x, t)."""
    scale = path.alpha(start(entry, scheduler, path)) if entry.coordinates == "ratio" else 1.0
    state = x / scale
    for place, timestep in enumerate(scheduler.timesteps):
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(state, timestep)  # some count their steps in it
        level = levels(scheduler, place, timestep)
        time = _time(level, path)
        on_path = state * path.alpha(time) if entry.coordinates == "ratio" else state
        clean = data(on_path, time)
        if entry.output == "edm":
            spread = scheduler.config.sigma_data
            skip = spread**2 / (level**2 + spread**2)
            output = (clean - skip * state) * math.sqrt(level**2 + spread**2) / (level * spread)
        elif entry.output == "velocity" and path.name == "linear":
            output = (on_path - clean) / time
        else:
            noise = (on_path - path.alpha(time) * clean) / path.sigma(time)
            output = noise if entry.output == "noise" else path.alpha(time) * noise - path.sigma(time) * clean
        state = scheduler.step(output, timestep, state, return_dict=False)[0]
    return state


def entries(path: Path) -> list[Scheduler]:
    """All schedulers that run on the path: `Linear`, or a `VariancePreserving` one."""
    return list(_flows() if path.name == "linear" else _preserving(path))


_made: dict[str, Any] = {}


def _set(kind: str, steps: int, **options: Any) -> Any:
    """A copy of a scheduler with these options that is made once, as some of them take a third of a second."""
    import diffusers

    key = f"{kind} {options}"
    if key not in _made:
        _made[key] = getattr(diffusers, kind)(**options)
    scheduler = copy.deepcopy(_made[key])
    scheduler.set_timesteps(steps)
    return scheduler


def _multistep() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(name, class, options) of the schedulers that share the options of their noise levels."""
    for order, style in ((1, "midpoint"), (2, "midpoint"), (2, "heun"), (3, "midpoint")):
        options: dict[str, Any] = {"solver_order": order, "solver_type": style}
        name = f"{order} {style}"
        yield f"DPM-Solver++ {name}", "DPMSolverMultistepScheduler", options
        if order > 1:
            full = options | {"lower_order_final": False}
            yield f"DPM-Solver++ {name}, no lower order", "DPMSolverMultistepScheduler", full
            ended = options | {"euler_at_final": True}
            yield f"DPM-Solver++ {name}, Euler last", "DPMSolverMultistepScheduler", ended
        noise = {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}
        yield f"DPM-Solver {name}", "DPMSolverMultistepScheduler", options | noise
        yield f"DPM-Solver++ {name}, singlestep", "DPMSolverSinglestepScheduler", options
    for order, style in itertools.product((1, 2, 3), ("bh1", "bh2")):
        options = {"solver_order": order, "solver_type": style}
        yield f"UniPC {order} {style}", "UniPCMultistepScheduler", options
        yield f"UniPC {order} {style}, noise", "UniPCMultistepScheduler", options | {"predict_x0": False}
        full = options | {"lower_order_final": False}
        yield f"UniPC {order} {style}, no lower order", "UniPCMultistepScheduler", full
        late = options | {"disable_corrector": [0]}
        yield f"UniPC {order} {style}, corrector from step 1", "UniPCMultistepScheduler", late
    for order in (1, 2, 3):
        yield f"DEIS {order}", "DEISMultistepScheduler", {"solver_order": order}
    for order, corrector in ((1, 1), (2, 1), (2, 2), (3, 3), (3, 4)):
        orders = {"predictor_order": order, "corrector_order": corrector}
        yield f"SA-Solver {order}-{corrector}, tau 0", "SASolverScheduler", orders | {"tau_func": _no_noise}


def _no_noise(_time: float) -> float:
    return 0.0


FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
SHAPES = ("karras", "exponential", "beta")
SHIFTS = (0.5, 1.0, 1.5, 2.0, 3.0, 5.0)


def _flows() -> Iterator[Scheduler]:
    common = FLOW
    for name, kind, options in _multistep():
        for shift in SHIFTS:
            yield _flow(f"{name}, shift {shift}", kind, common | options | {"flow_shift": shift})
        for shape in SHAPES:
            yield _flow(f"{name}, {shape}", kind, common | options | {f"use_{shape}_sigmas": True})
    for shift in SHIFTS:
        yield _flow(f"FlowMatchEuler, shift {shift}", "FlowMatchEulerDiscreteScheduler", {"shift": shift})
        yield _flow(f"FlowMatchHeun, shift {shift}", "FlowMatchHeunDiscreteScheduler", {"shift": shift})
        for shape in SHAPES:
            options = {"shift": shift, f"use_{shape}_sigmas": True}
            yield _flow(f"FlowMatchEuler, shift {shift}, {shape}", "FlowMatchEulerDiscreteScheduler", options)


def _flow(name: str, kind: str, options: dict[str, Any]) -> Scheduler:
    return Scheduler(name, partial(_set, kind, **options), "linear", output="velocity")


def betas(path: VariancePreserving) -> list[float]:
    """The path in diffusers' terms: beta_k = 1 - alpha_k^2 / alpha_(k-1)^2, so that alphas_cumprod is alpha^2."""
    squares = [1.0, *(path.alpha((place + 1) / DISCRETE) ** 2 for place in range(DISCRETE))]
    return [1.0 - after / before for before, after in itertools.pairwise(squares)]


def _preserving(path: Path) -> Iterator[Scheduler]:
    assert isinstance(path, VariancePreserving)
    common: dict[str, Any] = {"trained_betas": betas(path)}
    spacings = [(spacing, {"timestep_spacing": spacing}) for spacing in ("linspace", "leading", "trailing")]
    shapes = [(shape, {f"use_{shape}_sigmas": True}) for shape in SHAPES]
    for name, kind, options in _multistep():
        grids = [*spacings, *shapes] if "Singlestep" not in kind else [("uniform", {}), *shapes]
        if kind == "DPMSolverMultistepScheduler":
            grids = [*grids, ("lu", {"use_lu_lambdas": True})]
        for label, grid in grids:
            yield Scheduler(f"{name}, {label}", partial(_set, kind, **common, **options, **grid), path.name)
    for (label, grid), kind in itertools.product([*spacings, *shapes], ("Euler", "Heun", "KDPM2", "LMS")):
        full = "LMSDiscreteScheduler" if kind == "LMS" else f"{kind}DiscreteScheduler"
        build = partial(_set, full, **common, **grid)
        twice = 1 + (kind in ("Heun", "KDPM2"))
        yield Scheduler(f"{kind}, {label}", build, path.name, coordinates="ratio", per_step=twice)
    for label, grid in spacings:
        ddim = partial(_set, "DDIMScheduler", **common, **grid, clip_sample=False)
        yield Scheduler(f"DDIM, {label}", ddim, path.name)
        for skip in (False, True):
            pndm = partial(_set, "PNDMScheduler", **common, **grid, skip_prk_steps=skip, set_alpha_to_one=True)
            yield Scheduler(f"PNDM{', no Runge-Kutta' if skip else ''}, {label}", pndm, path.name)
    largest = path.sigma(1.0) / path.alpha(1.0)
    for smallest, shape in itertools.product((0.002, 0.01, 0.03, 0.1), ("karras", "exponential")):
        options = {"sigma_min": smallest, "sigma_max": largest, "sigma_schedule": shape}
        build = partial(_set, "EDMEulerScheduler", **options)
        yield Scheduler(f"EDM Euler, {shape} from {smallest}", build, path.name, "ratio", "edm")
        for order, style in ((2, "midpoint"), (2, "heun"), (3, "midpoint")):
            build = partial(_set, "EDMDPMSolverMultistepScheduler", solver_order=order, solver_type=style, **options)
            name = f"EDM DPM-Solver++ {order} {style}, {shape} from {smallest}"
            yield Scheduler(name, build, path.name, "ratio", "edm")
    for label, spread in (("trailing", _trailing), ("log", _logarithmic)):
        yield Scheduler(f"iPNDM, {label}", partial(_ipndm, path, spread), path.name, output="velocity")


def _trailing(path: Path, steps: int) -> list[float]:
    return [1.0 - place / steps for place in range(steps + 1)]


def _logarithmic(path: Path, steps: int) -> list[float]:
    first, last = path.log_snr(1.0), path.log_snr(1.0 / DISCRETE)
    return [*(min(path.time(first + (last - first) * k / (steps - 1)), 1.0) for k in range(steps)), 0.0]


def _ipndm(path: Path, spread: Callable[[Path, int], list[float]], steps: int) -> Any:
    return _set("IPNDMScheduler", steps, trained_betas=[path.sigma(time) for time in spread(path, steps)])


def on_times(path: Path, times: Sequence[float]) -> list[Scheduler]:
    """The schedulers that take a list of noise levels, on a grid's times that end at 0, or the nearest trained ones."""
    found = []
    if path.name == "linear":
        levels: dict[str, Any] = {"sigmas": np.array(times[:-1])}
        for order, style in itertools.product((2, 3), ("bh1", "bh2")):
            options = {"solver_order": order, "solver_type": style, **FLOW}
            build = partial(_listed, "UniPCMultistepScheduler", levels, **options)
            found.append(Scheduler(f"UniPC {order} {style}", build, path.name, output="velocity"))
        build = partial(_listed, "FlowMatchEulerDiscreteScheduler", levels)
        return [*found, Scheduler("FlowMatchEuler", build, path.name, output="velocity")]
    assert isinstance(path, VariancePreserving)
    levels = {"timesteps": [max(round(DISCRETE * time) - 1, 0) for time in times[:-1]]}
    for order, style in ((2, "midpoint"), (2, "heun"), (3, "midpoint")):
        options = {"solver_order": order, "solver_type": style, "trained_betas": betas(path)}
        build = partial(_listed, "DPMSolverMultistepScheduler", levels, **options)
        found.append(Scheduler(f"DPM-Solver++ {order} {style}", build, path.name))
    return found


def _listed(kind: str, levels: dict[str, Any], _steps: int, **options: Any) -> Any:
    import diffusers

    scheduler = getattr(diffusers, kind)(**options)
    scheduler.set_timesteps(**levels)
    return scheduler
