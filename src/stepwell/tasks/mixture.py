"""The mixture task: a flow whose start and whose KL-regularised optimum are known laws, so that a plot shows the truth.

The process is the exact velocity of a mixture in the plane plus a small network that begins as zero, hence it samples
the mixture exactly. The reward is quadratic, and the law that maximises E[r] - beta KL is the mixture tilted by
exp(r / beta), a mixture again: trained samples can be held against it without an approximation.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from stepwell.errors import InputError
from stepwell.figures import charts
from stepwell.process.base import Process
from stepwell.process.exact.distance import sampling_floor, sliced_wasserstein
from stepwell.process.exact.mixture import Mixture, Optimum, Quadratic
from stepwell.reward.mixing import Rewards
from stepwell.rng import Rng
from stepwell.sampling.request import Prompt
from stepwell.solver.path import Linear, Path
from stepwell.tasks.registry import Task, task

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RADIUS, SPREAD, TARGET = 2.0, 0.4, (1.7, 0.7)
PROMPTS = 64
SETTINGS: dict[str, Any] = {"learning_rate": 2e-3, "prompts_per_step": 16, "group_size": 16}
"""Training settings under which a policy gradient is most of the way after ten seconds on one core."""
SHOWN, COLUMNS, REACH = 300, 3, RADIUS + 3.0 * SPREAD
"""Samples in a panel of the picture, panels side by side, and how far a panel reaches from the origin."""
MASSES = (0.5, 0.9)
"""The share of a law that each of its contours encloses."""


class CorrectedVelocity(nn.Module):
    """v(x, t) = the mixture's exact velocity + a network of x and t whose last layer begins as zero."""

    def __init__(self, law: Mixture, path: Path, rng: Rng, width: int = 64):
        super().__init__()
        self.law, self.path = law, path
        sizes = (law.dimension + 3, width, width, law.dimension)
        layers = [nn.utils.skip_init(nn.Linear, *pair) for pair in itertools.pairwise(sizes)]
        with torch.no_grad():
            for layer in layers:
                layer.weight.copy_(rng.normal(*layer.weight.shape) / layer.in_features**0.5)
                layer.bias.zero_()
            layers[-1].weight.zero_()
        first, second, last = layers
        self.correction = nn.Sequential(first, nn.SiLU(), second, nn.SiLU(), last)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x (N, D), time (N,) -> (N, D)."""
        angle = math.pi * time[:, None]
        features = torch.cat([x, time[:, None], angle.cos(), angle.sin()], 1)
        return self.law.predict(x, time, self.path) + self.correction(features)


@dataclass(frozen=True, eq=False)
class Problem:
    """The start, the reward and the optimum E[r] - beta KL(p || start) of the task, and how samples compare with them.

    Example:
        >>> problem = mixture_problem()
        >>> problem.optimum.reward > problem.reward.expected(problem.start)
        True
    """

    start: Mixture
    reward: Quadratic
    beta: float
    optimum: Optimum = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "optimum", self.reward.optimum(self.start, self.beta))

    def closeness(self, completions: Sequence[Tensor]) -> Tensor:
        """The reward of points, a list of (2,) or (N, 2): (N,), differentiable."""
        return self.reward.value(torch.stack(list(completions)))

    def distance(self, prompts: Sequence[Prompt], samples: Sequence[Tensor]) -> float:
        """The sliced Wasserstein-2 distance of points to the optimum, which is `floor` for perfect samples of it."""
        return sliced_wasserstein(torch.stack(list(samples)), self.optimum.law)

    def departure(self, prompts: Sequence[Prompt], samples: Sequence[Tensor]) -> float:
        """The same distance of points to the start; the optimum's own is not zero."""
        return sliced_wasserstein(torch.stack(list(samples)), self.start)

    def floor(self, count: int) -> float:
        """The distance to the optimum that `count` perfect samples of it have on average: no method can be below."""
        return sampling_floor(self.optimum.law, count, Rng(0).split("floor", count), repeats=40)[0]


def mixture_problem(modes: int = 6, strength: float = 1.0, beta: float = 1.0) -> Problem:
    """A ring of `modes` equal Gaussians, r(x) = -strength |x - target|^2 / 2 with `TARGET` near one of them."""
    if modes < 1:
        raise InputError(f"The ring of the mixture task has {modes} modes; at least 1 is right.")
    if not strength > 0.0:
        raise InputError(f"The strength of the mixture's reward is {strength}; above 0 is right.")
    angles = math.pi * (0.5 + 2.0 * torch.arange(modes, dtype=torch.float64) / modes)
    means = RADIUS * torch.stack([angles.cos(), angles.sin()], 1)
    start = Mixture(torch.full((modes,), 1.0 / modes), means, SPREAD**2 * torch.eye(2).expand(modes, 2, 2))
    return Problem(start, Quadratic(torch.tensor(TARGET), strength), beta)


@task("mixture")
def mixture(
    modes: int = 6,
    strength: float = 1.0,
    beta: float = 1.0,
    solver: str = "dpmpp-2m",
    steps: int = 12,
    evaluation: int = 128,
    seed: int = 0,
) -> Task:
    """Points in the plane: a flow of known law, drawn towards a target, with its optimum in closed form.

    The start is a ring of `modes` Gaussians, the reward -`strength` |x - target|^2 / 2, and `beta` the weight of the KL
    in the optimum that samples are held against. Samples are judged by `solver` in `steps` steps; a method says itself
    how it trains. Prompts are numbers without a meaning, `evaluation` of them held out; `seed` draws the weights.
    """
    problem = mixture_problem(modes, strength, beta)
    if evaluation < 1:
        raise InputError(f"The mixture task is judged on {evaluation} prompts; at least 1 is right.")

    def process() -> Process:
        from stepwell.process.flow.process import flow

        network = CorrectedVelocity(problem.start, Linear(), Rng(seed).split("weights"))
        return flow(network, (2,), solver=solver, steps=steps)

    return Task(
        name="mixture",
        title="Mixture",
        description=(
            f"Points from a ring of {modes} Gaussians, rewarded by -{strength:g} |x - target|² / 2. The best law at a "
            f"KL weight of {beta:g} is known: its reward is {problem.optimum.reward:.3f} and its KL from the start "
            f"{problem.optimum.kl:.2f} nats; the start's reward is {problem.reward.expected(problem.start):.3f}. "
            "A reward above that of the best law is paid for with more KL than it is worth."
        ),
        process=process,
        prompts=[Prompt(number, number) for number in range(PROMPTS)],
        evaluation=[Prompt(number, number) for number in range(PROMPTS, PROMPTS + evaluation)],
        rewards=Rewards(problem.closeness),
        settings=SETTINGS,
        show=show,
        unit="reward",
        threads=1,
        measures={
            "distance to the best law (lower is better)": problem.distance,
            "distance to the start": problem.departure,
        },
        figure=partial(figure, problem),
        caption="Thin contours: half and nine tenths of the start. Strong ones: of the best law. Cross: the target. "
        "Numbers: the distance to the best law, which perfect samples, as many as these, do not bring to zero.",
    )


def show(prompt: Prompt, completion: Any) -> str:
    """A point as a report prints it."""
    return f"({float(completion[0]):.2f}, {float(completion[1]):.2f})"


def figure(problem: Problem, start: Sequence[Tensor], ends: Mapping[str, Sequence[Tensor]]) -> str:
    """An SVG of samples over the laws: a panel for the start, one for each method, and one of perfect samples.

    Thin contours are the start's, strong ones the optimum's, and enclose `MASSES` of them; the cross is the target. At
    most `SHOWN` samples are drawn in a panel; the number behind its name is the distance of all of them to the optimum,
    and for perfect samples, as many as there are of the start, what it is on average: the floor.
    """
    from matplotlib.figure import Figure

    perfect = list(problem.optimum.law.sample(len(start), Rng(0).split("perfect")))
    panels = [("start", charts._MUTED, start)]
    panels += [(label, charts.colour(place), points) for place, (label, points) in enumerate(ends.items())]
    panels += [("perfect samples", charts._INK, perfect)]
    rows = math.ceil(len(panels) / COLUMNS)
    width = 1.4 * charts.WIDTH  # a page gives this picture all of its room
    drawn = Figure(figsize=(width, rows * (width / COLUMNS + 0.2)), layout="constrained")
    for place, (label, tint, points) in enumerate(panels):
        axes = drawn.add_subplot(rows, COLUMNS, place + 1)
        _scatter(axes, torch.stack(list(points[:SHOWN])).double().numpy(), tint)
        _contours(axes, problem.start, charts._MUTED, 0.6)
        _contours(axes, problem.optimum.law, charts._INK, 1.3)
        axes.plot(*problem.reward.target.tolist(), "+", color=charts._INK, markersize=8, markeredgewidth=1.4)
        number = problem.floor(len(start)) if points is perfect else problem.distance((), points)
        axes.set_title(f"{label}  {number:.3f}", loc="left", fontsize=9.5, color=charts._INK)
        axes.set(xlim=(-REACH, REACH), ylim=(-REACH, REACH), aspect="equal")
        axes.set_axis_off()
    return charts.svg(drawn, "Samples over the start and the best law")


def _scatter(axes: Axes, points: Any, tint: str) -> None:
    """Dots as one path of short strokes with round ends: a third of the bytes of as many markers."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path as Strokes

    ends = np.stack([points, points + [1e-3, 0.0]], 1).reshape(-1, 2)
    strokes = Strokes(ends, np.tile([Strokes.MOVETO, Strokes.LINETO], len(points)))
    strokes.should_simplify = False
    axes.add_patch(PathPatch(strokes, fill=False, edgecolor=tint, linewidth=2.2, alpha=0.6, capstyle="round"))


def _contours(axes: Axes, law: Mixture, tint: str, width: float) -> None:
    ticks = np.linspace(-REACH, REACH, 91)
    across, up = np.meshgrid(ticks, ticks)
    places = torch.from_numpy(np.stack([across.ravel(), up.ravel()], 1))
    density = law.log_density(places).exp().reshape(across.shape).numpy()
    axes.contour(across, up, density, levels=_levels(density), colors=tint, linewidths=width)


def _levels(density: Any) -> list[float]:
    """The densities above which the shares `MASSES` of a law lie, in ascending order."""
    descending = np.sort(density.ravel())[::-1]
    mass = np.cumsum(descending) / descending.sum()
    return sorted(float(descending[np.searchsorted(mass, share)]) for share in MASSES)
