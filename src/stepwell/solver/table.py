"""A solver as a table: a frozen row of choices that a user can print, edit and save, over one exponential integrator.

Every solver here moves x by numbers that depend on times alone,

    x' = (coefficient) x + sum_j (weight_j) m_j + (noise) z,        m_j the newest predictions, z ~ N(0, 1),

and a row holds the choices that these numbers come from (`exponential.coefficients`), and nothing else.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from dataclasses import replace as _replace
from pathlib import Path as FilePath
from typing import Any

from stepwell.errors import InputError, UnknownName
from stepwell.writing import write_whole

PREDICTS = ("data", "noise", "velocity")
WEIGHTS = ("exact", "half", "half-linear", "short-second")
NOISES = ("none", "eta", "tau", "cps", "flow", "dance")
FIRSTS = ("corrected", "published")


@dataclass(frozen=True)
class Table:
    """One solver.

    name         the solver's name.
    predicts     the prediction that is interpolated between times: `data` and `noise` in lambda, under the exponential
                 kernel; `velocity` in t, under a flat kernel (Runge-Kutta and Adams in their textbook form).
    order        the number of predictions that a step uses; multistep solvers begin with fewer.
    inner        singlestep solvers: the place in the step, in (0, 1], of the second prediction; None for the others.
    weights      the moments M_i of the kernel (`exponential.moments`): `exact`; or, with two predictions, M_1 replaced
                 by M_0 / 2 (`half`: DPM-Solver-2 and ++ midpoint, UniPC bh2) or by h / 2 (`half-linear`: bh1, SA); or
                 `half` and, with three, M_2 halved (`short-second`: DPM-Solver++ 3M as libraries have it, order 2).
    corrector    use each new prediction to correct the step that led to it, at no further evaluation (UniC). A step
                 that drew noise is corrected in its mean, around the same noise (SA-Solver).
    corrector_order  the number of predictions that the correction uses, the new one included; None: one more than its
                 step did.
    compensation DC-Solver's ratio for each step of the grid, 1 for no change (`compensation.fit`); () for none at all.
    conjugate    the rate of lambda-DDIM (`exponential.conjugated`), which predicts noise; 0 is DDIM itself.
    lower_final  use no more predictions than there are steps left, this one included.
    noise, level the fresh noise that a step draws: `none`; `eta`, DDIM's, 1 for ancestral; `tau`, the SDE whose noise
                 is tau^2 times the reverse SDE's; `cps`; `flow` and `dance`, stochastic Euler with
                 g = a sqrt(t / (1 - t)) and g = a.
    window       noise is drawn only in steps that start at a time in [window[0], window[1]]; ODE steps elsewhere.
    first        the first step of `flow`, at t = 1 where g is infinite: `published` takes t / (1 - t) with 1 - t of the
                 next time, which leaves a variance of 1 + a^4 / 4 however many steps; `corrected` takes the exact
                 Gaussian step, DDIM's with eta = a. The steps after it still converge slowly, as g^2 |dt| is a^2 / k
                 in step k of a uniform grid; `sde-flow` is the same SDE with its linear part solved exactly.
    source       the origin of the formula.

    Example:
        >>> table("unipc-2").replace(weights="half-linear").weights
        'half-linear'
        >>> Table(name="mine", order=2, weight="exact")
        Traceback (most recent call last):
        ...
        TypeError: Table.__init__() got an unexpected keyword argument 'weight'
    """

    name: str
    predicts: str = "data"
    order: int = 1
    inner: float | None = None
    weights: str = "exact"
    corrector: bool = False
    corrector_order: int | None = None
    compensation: tuple[float, ...] = ()
    conjugate: float = 0.0
    lower_final: bool = True
    noise: str = "none"
    level: float = 0.0
    window: tuple[float, float] = (0.0, 1.0)
    first: str = "corrected"
    source: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "window", tuple(self.window))
        object.__setattr__(self, "compensation", tuple(self.compensation))
        choices = {"predicts": PREDICTS, "weights": WEIGHTS, "noise": NOISES, "first": FIRSTS}
        for setting, names in choices.items():
            if getattr(self, setting) not in names:
                raise UnknownName(f"'{setting}' of a solver", getattr(self, setting), names)
        wrong = self._wrong()
        if wrong:
            raise InputError(f"Solver '{self.name}': {wrong}")

    def _wrong(self) -> str | None:
        """The first contradiction among the entries, in a sentence, or None."""
        if not 1 <= self.order <= 4:
            return f"order must be 1 to 4, got {self.order}."
        if self.inner is not None and not (0.0 < self.inner <= 1.0 and self.order == 2):
            return "a singlestep solver must have order 2 and its inner time in (0, 1] of the step."
        if self.corrector and (self.inner is not None or self.predicts == "noise"):
            return "a corrector goes with multistep solvers that predict data or velocity."
        if self.corrector and self.noise in ("flow", "dance"):
            return "stochastic Euler has no corrector."
        if self.corrector_order is not None and not (self.corrector and 1 <= self.corrector_order <= 5):
            return "corrector_order must be 1 to 5, beside corrector=True."
        if self.compensation and (self.inner is not None or self.predicts != "data"):
            return "compensation goes with multistep solvers that predict data."
        if self.conjugate != 0.0 and (self.predicts != "noise" or self.order != 1):
            return "a conjugate rate goes with order 1 and predicting noise."
        if self.weights.startswith("half") and not (self.predicts == "data" or self._midpoint):
            return f"weights '{self.weights}' are those of solvers that predict data."
        if self.noise != "none" and self.inner is not None:
            return "a singlestep solver draws no noise."
        if self.noise in ("flow", "dance") and (self.predicts != "velocity" or self.order != 1):
            return f"noise '{self.noise}' is stochastic Euler's: order 1, velocity."
        if self.noise in ("eta", "tau", "cps") and self.predicts != "data":
            return f"noise '{self.noise}' goes with predicting data."
        if (self.noise == "none") != (self.level == 0.0) or self.level < 0.0:
            return f"level must be above 0 with noise and 0 without, got {self.level} with noise '{self.noise}'."
        if self.noise in ("eta", "cps") and self.level > 1.0:
            return f"level must be at most 1 for noise '{self.noise}', got {self.level}."
        return None if self.window[0] <= self.window[1] else "window must begin before it ends."

    @property
    def _midpoint(self) -> bool:
        """True for DPM-Solver's own second-order step, which predicts noise inside the step."""
        return self.predicts == "noise" and self.inner is not None and self.weights == "half"

    @property
    def stochastic(self) -> bool:
        return self.noise != "none"

    @property
    def deterministic(self) -> Table:
        """The table of the same family without noise, for the ODE's steps outside a window; itself if it draws none.

        Example:
            >>> table("sde-euler").deterministic == table("euler"), table("ddpm").deterministic.stochastic
            (True, False)
        """
        if not self.stochastic:
            return self
        if self.predicts == "velocity":
            return TABLES["euler"]
        return self.replace(name=f"{self.name} without noise", noise="none", level=0.0)

    @property
    def remembers(self) -> bool:
        """True where a step depends on earlier ones, through the `History`: multistep solvers and correctors do."""
        return self.corrector or bool(self.compensation) or (self.order > 1 and self.inner is None)

    @property
    def memory(self) -> int:
        """The number of predictions that the `History` keeps for the steps to come."""
        return max(self.order, (self.corrector_order or 1) - 1, 2 if self.compensation else 0)

    @property
    def evaluations(self) -> int:
        """Evaluations of the model in a step."""
        return 1 if self.inner is None else 2

    def replace(self, **changes: Any) -> Table:
        """This table with other entries."""
        return _replace(self, **changes)

    def __str__(self) -> str:
        width = max(len(field.name) for field in fields(self))
        return "\n".join(f"{name:<{width}}  {value}" for name, value in asdict(self).items())

    def save(self, file: str | FilePath) -> None:
        """Write the table as JSON."""
        write_whole(file, json.dumps(asdict(self), indent=2) + "\n")


def load(file: str | FilePath) -> Table:
    """A table that was saved. Raises `InputError` where the file is no such table."""
    try:
        entries = json.loads(FilePath(file).read_text())
        return Table(**entries)
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{file} is not a saved solver: {error}") from None


_DPM = "Lu et al. 2022, DPM-Solver++, arXiv 2211.01095"
_UNIPC = "Zhao et al. 2023, UniPC, arXiv 2302.04867"
_SA = "Xue et al. 2023, SA-Solver, arXiv 2309.05019; orders, weights and window as in diffusers"
_DEIS = "Zhang and Chen 2022, DEIS, arXiv 2204.13902 (in log rho)"
_DDIM = "Song et al. 2020, DDIM, arXiv 2010.02502, eq. 12 and 16"
_DPM_NOISE = "Lu et al. 2022, DPM-Solver, arXiv 2206.00927"
_TURBO = "Zhao et al. 2024, FlowTurbo, arXiv 2409.18128: Heun, with the predictor point's velocity used again"
_ADAMS = "Adams-Bashforth predictor and Adams-Moulton corrector in t, one evaluation a step"
_FLOW = "Liu et al. 2025, Flow-GRPO, arXiv 2505.05470"


def _stochastic_adams(name: str, order: int, corrector_order: int) -> Table:
    """SA-Solver at tau = 1 for times in [0.2, 0.8]; with two predictions its weights are UniPC's bh1 with tau's z."""
    return Table(
        name,
        order=order,
        weights="half-linear",
        corrector=True,
        corrector_order=corrector_order,
        noise="tau",
        level=1.0,
        window=(0.2, 0.8),
        source=_SA,
    )


TABLES: dict[str, Table] = {
    row.name: row
    for row in (
        Table("euler", predicts="velocity", source="Euler's method in t"),
        Table("heun", predicts="velocity", order=2, inner=1.0, source="Karras et al. 2022, arXiv 2206.00364, alg. 1"),
        Table("ddim", source=_DDIM),
        Table("ddim-eta", noise="eta", level=0.5, source=_DDIM),
        Table("ddpm", noise="eta", level=1.0, source="Ho et al. 2020, arXiv 2006.11239; k-diffusion's ancestral step"),
        Table("dpmpp-1", source=_DPM),
        Table("dpmpp-2m", order=2, weights="half", source=_DPM),
        Table("dpmpp-2m-heun", order=2, source=_DPM),
        Table("dpmpp-2s", order=2, inner=0.5, weights="half", source=_DPM),
        Table("dpmpp-3m", order=3, source=_DPM + ", with the second difference in full"),
        Table("dpmpp-3m-published", order=3, weights="short-second", source=_DPM + ", as diffusers and k-diffusion"),
        Table("sde-dpmpp-2m", order=2, weights="half", noise="tau", level=1.0, source=_DPM),
        Table("unipc-2", order=2, weights="half", corrector=True, source=_UNIPC + ", bh2"),
        Table("unipc-2-bh1", order=2, weights="half-linear", corrector=True, source=_UNIPC + ", bh1"),
        Table("unipc-3", order=3, weights="half", corrector=True, source=_UNIPC + ", bh2"),
        Table("unipc-3-bh1", order=3, weights="half-linear", corrector=True, source=_UNIPC + ", bh1"),
        Table("dpm-2s", predicts="noise", order=2, inner=0.5, weights="half", source=_DPM_NOISE + ", DPM-Solver-2"),
        Table("adams-pc-2", predicts="velocity", order=2, corrector=True, source=_ADAMS),
        Table("adams-pc-3", predicts="velocity", order=3, corrector=True, source=_ADAMS),
        Table("adams-pc-4", predicts="velocity", order=4, corrector=True, source=_ADAMS),
        Table("pseudo-corrector", predicts="velocity", corrector=True, corrector_order=2, source=_TURBO),
        _stochastic_adams("sa-solver-2", order=2, corrector_order=2),
        _stochastic_adams("sa-solver-3", order=3, corrector_order=3),
        Table("deis-2", predicts="noise", order=2, source=_DEIS),
        Table("deis-3", predicts="noise", order=3, source=_DEIS),
        Table("sde-euler", predicts="velocity", noise="flow", level=0.7, source=_FLOW),
        Table("sde-euler-published", predicts="velocity", noise="flow", level=0.7, first="published", source=_FLOW),
        Table("sde-flow", noise="tau", level=0.7 * 0.5**0.5, source=_FLOW + ": its SDE has tau^2 = a^2 / 2, a = 0.7"),
        Table("sde-dance", predicts="velocity", noise="dance", level=0.3, source="DanceGRPO, arXiv 2505.07818"),
        Table("cps", noise="cps", level=0.7, source="Flow-GRPO's coefficients-preserving sampling (sde_type 'cps')"),
    )
}


def table(name: str) -> Table:
    """A solver of the list by name.

    Example:
        >>> print(str(table("dpmpp-2m")).splitlines()[2])
        order            2
    """
    if name not in TABLES:
        raise UnknownName("solver", name, TABLES)
    return TABLES[name]
