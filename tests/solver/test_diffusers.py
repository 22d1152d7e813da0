"""Parity with diffusers' schedulers, trajectory by trajectory, on their own times and with their own noise."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from stepwell.check.tolerance import rounding
from stepwell.rng import Rng
from stepwell.solver.exponential import coefficients
from stepwell.solver.grid import shifted, uniform
from stepwell.solver.integrate import sample
from stepwell.solver.path import Linear, Path, path
from stepwell.solver.table import Table, table

diffusers = pytest.importorskip("diffusers", reason="parity with diffusers' schedulers needs diffusers installed")

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
VP = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear", "timestep_spacing": "trailing"}
TOLERANCE = rounding(torch.float32, 100)  # their tables are of that type


def theirs(scheduler: Any, predict: Any, x: Tensor, times: list[float], **settings: Any) -> list[Tensor]:
    """The states of a scheduler that is asked at `times`, which are its own."""
    states = [x]
    for place, timestep in enumerate(scheduler.timesteps):
        if hasattr(scheduler, "is_scale_input_called"):
            scheduler.scale_model_input(states[-1], timestep)
        output = predict(states[-1], times[place])
        states.append(scheduler.step(output, timestep, states[-1], return_dict=False, **settings)[0])
    return states


def flow_times(scheduler: Any) -> list[float]:
    return [float(sigma) for sigma in scheduler.sigmas]


def ratio_times(scheduler: Any, on: Path) -> list[float]:
    """Times on a path from sigmas that are sigma / alpha."""
    return [on.time(-math.log(float(sigma))) if sigma > 0 else 0.0 for sigma in scheduler.sigmas]


def ours(predict: Any, x: Tensor, on: Path, times: list[float], solver: Table, output: str) -> list[Tensor]:
    drawn = sample(predict, x, on, times, solver, Rng(7), output=output, partial=True)
    return list(drawn.states)


def distance(left: list[Tensor], right: list[Tensor]) -> float:
    assert len(left) == len(right)
    worst = max(float((a.double() - b.double()).abs().max()) for a, b in zip(left, right, strict=True))
    print(f"parity: {worst:.1e}")  # shown by pytest -s
    return worst


def velocity(mixture: Any, on: Path) -> Any:
    return lambda x, t: on.convert(mixture(on).data(x.double(), t), x.double(), t, "data", "velocity").to(x.dtype)


def noise(mixture: Any, on: Path) -> Any:
    return lambda x, t: on.convert(mixture(on).data(x.double(), t), x.double(), t, "data", "noise").to(x.dtype)


MULTISTEP = {
    "dpmpp-1": ("DPMSolverMultistepScheduler", {"solver_order": 1}),
    "dpmpp-2m": ("DPMSolverMultistepScheduler", {"solver_order": 2}),
    "dpmpp-2m-heun": ("DPMSolverMultistepScheduler", {"solver_order": 2, "solver_type": "heun"}),
    "dpmpp-3m-published": ("DPMSolverMultistepScheduler", {"solver_order": 3}),
    "sde-dpmpp-2m": ("DPMSolverMultistepScheduler", {"solver_order": 2, "algorithm_type": "sde-dpmsolver++"}),
    "unipc-2": ("UniPCMultistepScheduler", {"solver_order": 2}),
    "unipc-2-bh1": ("UniPCMultistepScheduler", {"solver_order": 2, "solver_type": "bh1"}),
    "unipc-3": ("UniPCMultistepScheduler", {"solver_order": 3}),
    "unipc-3-bh1": ("UniPCMultistepScheduler", {"solver_order": 3, "solver_type": "bh1"}),
    "deis-2": ("DEISMultistepScheduler", {"solver_order": 2}),
    "deis-3": ("DEISMultistepScheduler", {"solver_order": 3}),
}


def settings_of(name: str) -> dict[str, Any]:
    return {"generator": torch.Generator().manual_seed(7)} if name.startswith("sde") else {}


@pytest.mark.parametrize("steps", [5, 10])
@pytest.mark.parametrize("name", MULTISTEP)
def test_multistep_solvers_on_the_linear_path(mixture: Any, name: str, steps: int):
    kind, options = MULTISTEP[name]
    scheduler = getattr(diffusers, kind)(**FLOW, **options)
    scheduler.set_timesteps(steps)
    times, x = flow_times(scheduler), Rng(0).normal(16, 2)
    if name.startswith("deis"):  # it divides by alpha = 0.0003, which costs four digits
        scheduler.sigmas, x = scheduler.sigmas.double(), x.double()
    predict = velocity(mixture, Linear())
    right = theirs(scheduler, predict, x, times, **settings_of(name))
    left = ours(predict, x, Linear(), [*times[:-1], 0.0], table(name), "velocity")
    if name.startswith("deis"):  # its last step does nothing
        assert times[-1] == times[-2] > 0.2
        left, right = left[:-1], right[:-1]
    assert distance(left, right) < TOLERANCE


@pytest.mark.parametrize("name", MULTISTEP)
def test_multistep_solvers_on_a_variance_preserving_path(mixture: Any, name: str):
    kind, options = MULTISTEP[name]
    scheduler = getattr(diffusers, kind)(**VP, **options)
    scheduler.set_timesteps(10)
    on = path("vp-linear", minimum=0.1, maximum=25.0)  # reaches beyond their noise
    x = Rng(0).normal(16, 2)
    if name.startswith("deis"):
        scheduler.sigmas, x = scheduler.sigmas.double(), x.double()
    times, predict = ratio_times(scheduler, on), noise(mixture, on)
    right = theirs(scheduler, predict, x, times, **settings_of(name))
    left = ours(predict, x, on, [*times[:-1], 0.0], table(name), "noise")
    if times[-1] > 0.0:
        left, right = left[:-1], right[:-1]
    scale = float(max(state.abs().max() for state in right))
    assert distance(left, right) < TOLERANCE * max(1.0, scale)


@pytest.mark.parametrize(
    ("name", "kind"), [("euler", "FlowMatchEulerDiscreteScheduler"), ("heun", "FlowMatchHeunDiscreteScheduler")]
)
def test_euler_and_heun_on_the_linear_path(mixture: Any, name: str, kind: str):
    scheduler = getattr(diffusers, kind)()
    scheduler.set_timesteps(10)
    times, x = flow_times(scheduler), Rng(0).normal(16, 2)
    predict = velocity(mixture, Linear())
    right = theirs(scheduler, predict, x, times)
    if name == "heun":  # its list of sigmas has each inner time twice
        times, right = times[0:1] + times[1::2], right[0:1] + right[2::2] + right[-1:]
    assert times[-1] == 0.0
    assert distance(ours(predict, x, Linear(), times, table(name), "velocity"), right) < TOLERANCE


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("euler", "EulerDiscreteScheduler"),
        ("heun", "HeunDiscreteScheduler"),
        ("ddpm", "EulerAncestralDiscreteScheduler"),
    ],
)
def test_solvers_in_noise_levels(mixture: Any, name: str, kind: str):
    scheduler = getattr(diffusers, kind)(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    scheduler.set_timesteps(10)
    on = path("ve", maximum=float(scheduler.sigmas[0]) * 1.0001)
    times, x = ratio_times(scheduler, on), float(scheduler.sigmas[0]) * Rng(0).normal(16, 2)
    predict = noise(mixture, on)
    settings = {"generator": torch.Generator().manual_seed(7)} if name == "ddpm" else {}
    right = theirs(scheduler, predict, x, times, **settings)
    if name == "heun":
        times, right = times[0:1] + times[1::2], right[0:1] + right[2::2] + right[-1:]
    found = ours(predict, x, on, times, table(name), "noise")
    assert distance(found, right) < TOLERANCE * float(x.abs().max())


@pytest.mark.parametrize(
    ("name", "kind"), [("ddim", "DDIMScheduler"), ("ddim-eta", "DDIMScheduler"), ("ddpm", "DDPMScheduler")]
)
def test_ddim_and_ddpm(mixture: Any, name: str, kind: str):
    scheduler = getattr(diffusers, kind)(**VP, clip_sample=False)
    scheduler.set_timesteps(10)
    on = path("vp-linear", minimum=0.1, maximum=25.0)  # reaches beyond their noise
    products = [float(scheduler.alphas_cumprod[int(timestep)]) for timestep in scheduler.timesteps]
    times = [*(on.time(0.5 * math.log(product / (1 - product))) for product in products), 0.0]
    predict, x = noise(mixture, on), Rng(0).normal(16, 2)
    settings: dict[str, Any] = {} if name == "ddim" else {"generator": torch.Generator().manual_seed(7)}
    right = theirs(scheduler, predict, x, times, **settings, **({"eta": 0.5} if name == "ddim-eta" else {}))
    found = ours(predict, x, on, times, table(name), "noise")
    scale = float(max(state.abs().max() for state in right))
    assert distance(found, right) < TOLERANCE * max(1.0, scale)


def test_singlestep_second_order_where_their_grid_has_our_inner_times(mixture: Any):
    scheduler = diffusers.DPMSolverSinglestepScheduler(**FLOW, solver_order=2)
    scheduler.set_timesteps(10)
    outer = [0.95, 0.8, 0.6, 0.4, 0.2]
    both = []
    for time, target in zip(outer, [*outer[1:], 0.1], strict=True):
        middle = 0.5 * (Linear().log_snr(time) + Linear().log_snr(target))
        both += [time, Linear().time(middle)]
    scheduler.sigmas = torch.tensor([*both, 0.0])
    predict, x = velocity(mixture, Linear()), Rng(0).normal(16, 2)
    right = theirs(scheduler, predict, x, both)
    found = ours(predict, x, Linear(), outer, table("dpmpp-2s"), "velocity")
    assert distance(found, right[0:9:2]) < TOLERANCE


def test_where_diffusers_is_wrong_ours_ends_without_noise():
    """DEIS repeats its last sigma, and FlowMatchEuler shifts twice; both known, neither here."""
    deis = diffusers.DEISMultistepScheduler(**FLOW)
    deis.set_timesteps(10)
    assert float(deis.sigmas[-1]) == pytest.approx(0.2498, abs=1e-3)
    euler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    euler.set_timesteps(10)
    once = 3.0 * 0.001 / (1 + 2.0 * 0.001)  # the training grid's last time, shifted once
    assert float(euler.sigmas[-2]) == pytest.approx(3.0 * once / (1 + 2.0 * once), rel=1e-3)
    for name in ("deis-2", "euler"):  # what our last step leaves: none of x, all of the data
        last = coefficients(Linear(), table(name), (0.1,), 0.0)
        of_x, of_data = last.state, last.weights[0]
        if name == "euler":  # v = (x - D) / t
            of_x, of_data = last.state + last.weights[0] / 0.1, -last.weights[0] / 0.1
        assert (of_x, of_data) == pytest.approx((0.0, 1.0), abs=1e-14)
    assert uniform(10, Linear())[-1] == shifted(10, Linear())[-1] == 0.0
    assert shifted(1000, Linear())[-2] == pytest.approx(once)
