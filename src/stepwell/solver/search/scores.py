"""Scores that a search minimises: errors of a schedule, exact where the distribution of the data is known.

A score is a function of a schedule; less is better. Paired scores start every schedule from the same noise, so that
differences between schedules are no accident of the draw.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stepwell.errors import InputError, UnknownName
from stepwell.rng import Rng
from stepwell.solver.integrate import Predict
from stepwell.solver.path import Path
from stepwell.solver.schedule import Schedule

Score = Callable[[Schedule], float]


@dataclass(frozen=True)
class Searched:
    """The result of a search: the best schedule, its score, and the cost of the search.

    `spent` counts evaluations of the model in `optimal_steps`, and of the score in `evolve` and `exhaust`.
    """

    schedule: Schedule
    score: float
    spent: int


def endpoint_error(
    predict: Predict, path: Path, noise: Tensor, reference: Schedule | Tensor, *, output: str = "velocity"
) -> Score:
    """Root mean square distance of a schedule's samples to the reference's, from the same noise (N, *D).

    `reference` is a fine schedule, or its final states (N, *D). `noise` holds states at the first time, which all
    schedules have to share. Raises `InputError` for schedules that draw noise: only samples without can be paired.
    """
    start = reference.times[0] if isinstance(reference, Schedule) else None

    def final(schedule: Schedule) -> Tensor:
        if schedule.stochastic:
            raise InputError(f"Schedule '{schedule.name}' draws noise, so its samples cannot be paired with others.")
        if start is not None and schedule.times[0] != start:
            raise InputError(
                f"Schedule '{schedule.name}' must start at the reference's first time, {start:.6g}, to start from the "
                f"same noise, got {schedule.times[0]:.6g}."
            )
        return schedule.sample(predict, noise, path, Rng(0), output=output).final

    exact = final(reference) if isinstance(reference, Schedule) else reference
    return lambda schedule: float((final(schedule) - exact).square().mean().sqrt())


class _Impulses(Rng):
    """Noise that is 1 in row k + 1 at draw k and 0 elsewhere: the rows then show the effect of each draw."""

    def __init__(self) -> None:
        super().__init__(0)
        self.drawn = 0

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        self.drawn += 1
        noise = torch.zeros(shape, dtype=dtype)
        noise[self.drawn + 1] = 1.0
        return noise


def sample_moments(
    schedule: Schedule, predict: Predict, path: Path, dimensions: int, *, output: str = "velocity"
) -> tuple[Tensor, Tensor]:
    """The exact mean and variance (D,) of a schedule's samples, for a model that is affine in each coordinate alone.

    The model of Gaussian data with independent coordinates is of this kind: every step is affine and every sample
    Gaussian. It is run on two rows more than there are draws, of (D,) double.
    """
    x = torch.zeros(schedule.steps + 2, dimensions, dtype=torch.float64)
    x[1] = path.sigma(schedule.times[0])
    final = schedule.sample(predict, x, path, _Impulses(), output=output).final
    return final[0], (final[1:] - final[0]).square().sum(0)


def gaussian_data(path: Path, mean: Sequence[float], variance: Sequence[float]) -> Predict:
    """The exact data prediction for data N(mean, diag(variance)): E[x_0 | x_t = x], x (N, D)."""
    centre, spread = torch.tensor(mean, dtype=torch.float64), torch.tensor(variance, dtype=torch.float64)

    def predict(x: Tensor, t: float) -> Tensor:
        alpha, sigma = path.alpha(t), path.sigma(t)
        slope = alpha * spread / (alpha**2 * spread + sigma**2)
        return (centre + slope * (x - alpha * centre)).to(x.dtype)

    return predict


def gaussian_distance(
    path: Path,
    mean: Sequence[float],
    variance: Sequence[float],
    measure: str = "wasserstein",
    *,
    predict: Predict | None = None,
    output: str = "data",
) -> Score:
    """The exact distance between the distribution of a schedule's samples and the data N(mean, diag(variance)).

    `wasserstein` is the 2-Wasserstein distance, `kl` is KL(samples || data) in nats. `predict` is the model, affine
    in each coordinate alone; the exact one by default.
    """
    if measure not in ("wasserstein", "kl"):
        raise UnknownName("distance", measure, ("wasserstein", "kl"))
    model = predict or gaussian_data(path, mean, variance)
    centre, spread = torch.tensor(mean, dtype=torch.float64), torch.tensor(variance, dtype=torch.float64)

    def score(schedule: Schedule) -> float:
        middle, scatter = sample_moments(schedule, model, path, len(centre), output=output)
        if measure == "wasserstein":
            return float(((middle - centre).square() + (scatter.sqrt() - spread.sqrt()).square()).sum().sqrt())
        return float(0.5 * (((middle - centre).square() + scatter) / spread - 1.0 - (scatter / spread).log()).sum())

    return score


def quantile_distance(
    predict: Predict, path: Path, quantiles: Callable[[Tensor], Tensor], points: int = 512, *, output: str = "velocity"
) -> Score:
    """The 2-Wasserstein distance of one-dimensional samples to data with this quantile function, without sampling.

    In one dimension a deterministic schedule maps the quantiles of the noise, and the distance is an integral over
    them, taken at `points` midpoints. `quantiles(u)` is the inverse of the data's distribution function, u (points,).
    """
    levels = (torch.arange(points, dtype=torch.float64) + 0.5) / points
    noise, exact = torch.special.ndtri(levels)[:, None], quantiles(levels)

    def score(schedule: Schedule) -> float:
        if schedule.stochastic:
            raise InputError(f"Schedule '{schedule.name}' draws noise, so it does not map quantiles to quantiles.")
        x = path.sigma(schedule.times[0]) * noise
        final = schedule.sample(predict, x, path, Rng(0), output=output).final[:, 0]
        return float((final.sort().values - exact).square().mean().sqrt())

    return score
