"""Restart: go down a grid, add noise again, come back, and again; the errors made before an interval shrink each time.

Xu et al. 2023 (arXiv 2306.14878): when the ODE has come down to `lower`, noise takes the state back up to `upper`, by
exactly the forward process, and the ODE comes down again, K times over. A grid with restarts is a plan: falling
segments, with a jump up after each but the last.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stepwell.distributions import Gaussian
from stepwell.errors import InputError
from stepwell.rng import Rng
from stepwell.solver import grid, integrate
from stepwell.solver.integrate import Predict, Sampled
from stepwell.solver.path import Path
from stepwell.solver.table import Table


@dataclass(frozen=True)
class Restart:
    """One interval: `repeats` times up from `lower`, a time of the grid, to `upper`, and down again in `steps` steps.

    The way down has Karras's spacing with rho = 7 in sigma / alpha, as in the paper. Raises `InputError` for times
    that are not 0 < lower < upper <= 1.
    """

    lower: float
    upper: float
    repeats: int
    steps: int

    def __post_init__(self) -> None:
        if not 0.0 < self.lower < self.upper <= 1.0:
            raise InputError(f"lower and upper must be 0 < lower < upper <= 1, got {self.lower} and {self.upper}.")
        if self.repeats < 0 or self.steps < 1:
            raise InputError(f"repeats must be at least 0 and steps at least 1, got {self.repeats} and {self.steps}.")

    def way_back(self, path: Path) -> tuple[float, ...]:
        """The times from `upper` down to `lower`, both included."""
        if path.alpha(self.upper) == 0.0:
            raise InputError(
                f"upper must be a time at which data is left, got {self.upper}; a restart there would forget all."
            )
        if self.steps == 1:
            return self.upper, self.lower
        smallest, largest = (path.sigma(time) / path.alpha(time) for time in (self.lower, self.upper))
        times = grid.karras(self.steps + 1, path, smallest, largest, terminal=math.inf)
        return self.upper, *times[1:-2], self.lower


@dataclass(frozen=True)
class Segment:
    """Falling `times`, and the time that noise is added up to at the end of them; None for the last segment."""

    times: tuple[float, ...]
    rise: float | None = None


def plan(times: Sequence[float], restarts: Sequence[Restart], path: Path) -> tuple[Segment, ...]:
    """The segments of a grid with restarts, in the order in which a sampler comes to them.

    The steps after the last way back of an interval belong to its segment, so that solvers keep their history. Without
    repeats the only segment is the grid itself. Raises `InputError` where a restart's `lower` is no time of the grid.

    Example:
        >>> from stepwell.solver.path import Linear
        >>> for segment in plan((1.0, 0.5, 0.25, 0.0), [Restart(0.25, 0.5, 2, 1)], Linear()):
        ...     print(segment.times, segment.rise)
        (1.0, 0.5, 0.25) 0.5
        (0.5, 0.25) 0.5
        (0.5, 0.25, 0.0) None
    """
    grid.check_order(times)
    segments, current = [], [float(times[0])]
    for restart in restarts:
        if restart.lower not in times[1:-1]:
            nearest = min(times[1:-1] or times, key=lambda time: abs(time - restart.lower))
            raise InputError(
                f"lower of a restart must be a time of the grid, got {restart.lower:.6g}; {nearest!r} is nearest."
            )
    for time in times[1:]:
        current.append(float(time))
        for restart in restarts:
            for _ in range(restart.repeats if restart.lower == time else 0):
                segments.append(Segment(tuple(current), restart.upper))
                current = list(restart.way_back(path))
    return *segments, Segment(tuple(current))


def renoised(path: Path, x: Tensor, time: float, target: float) -> Gaussian:
    """The forward process from x (N, *D) at `time` up to `target`: the distribution of x_target given x_time.

    On any path its mean is r x and its variance sigma(target)^2 - r^2 sigma(time)^2, r = alpha(target) / alpha(time).
    No parameter moves it.
    """
    ratio = path.alpha(target) / path.alpha(time)
    scale = math.sqrt(path.sigma(target) ** 2 - (ratio * path.sigma(time)) ** 2)
    mean = ratio * x
    return Gaussian(mean, mean.new_tensor(scale), trained=False)


def sample(
    predict: Predict,
    x: Tensor,
    path: Path,
    segments: Sequence[Segment],
    table: Table,
    rng: Rng,
    *,
    output: str = "velocity",
) -> Sampled:
    """Every step and jump of a plan, from x (N, *D) at its first time; a jump is a state, a random step, of its own."""
    states, log_probs, random, evaluations = [x], [], [], 0
    for segment, following in itertools.zip_longest(segments, segments[1:]):
        # a segment that ends in a jump does not end at the data, where fewer predictions would be used
        solver = table if following is None else table.replace(lower_final=False)
        drawn = integrate.sample(
            predict, states[-1], path, segment.times, solver, rng, output=output, partial=following is not None
        )
        states += drawn.states[1:]
        log_probs.append(drawn.log_prob)
        random.append(drawn.random)
        evaluations += drawn.evaluations
        if following is not None:
            jump = renoised(path, states[-1], segment.times[-1], following.times[0])
            states.append(jump.sample(rng))
            log_probs.append(jump.log_prob(states[-1])[:, None])
            random.append(torch.tensor([True]))
    return Sampled(tuple(states), torch.cat(log_probs, 1), torch.cat(random), evaluations)
