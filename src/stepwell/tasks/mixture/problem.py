"""The flow, the reward and the optimum of the mixture task, and the distances of samples to the optimum.

The process is the exact velocity of a mixture in the plane plus a small network that begins as zero, hence it samples
the mixture exactly. The reward is quadratic, and the distribution that maximises E[r] - beta KL is the mixture tilted
by exp(r / beta), a mixture again: trained samples are compared with it without an approximation.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from stepwell.errors import InputError
from stepwell.process.exact.distance import sampling_floor, sliced_wasserstein
from stepwell.process.exact.mixture import Mixture, Optimum, Quadratic
from stepwell.rng import Rng
from stepwell.sampling.request import Prompt
from stepwell.solver.path import Path

RADIUS, SPREAD, TARGET = 2.0, 0.4, (1.7, 0.7)


class CorrectedVelocity(nn.Module):
    """v(x, t) = the mixture's exact velocity + a network of x and t whose last layer begins as zero."""

    def __init__(self, start: Mixture, path: Path, rng: Rng, width: int = 64):
        super().__init__()
        self.start, self.path = start, path
        sizes = (start.dimension + 3, width, width, start.dimension)
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
        return self.start.predict(x, time, self.path) + self.correction(features)


@dataclass(frozen=True, eq=False)
class MixtureProblem:
    """The start, the reward, the optimum of E[r] - beta KL(p || start), and the distances of samples to both.

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
        """The sliced Wasserstein-2 distance of points to the optimum; on average `floor` for perfect samples of it."""
        return sliced_wasserstein(torch.stack(list(samples)), self.optimum.distribution)

    def departure(self, prompts: Sequence[Prompt], samples: Sequence[Tensor]) -> float:
        """The same distance of points to the start; the optimum's own is not zero."""
        return sliced_wasserstein(torch.stack(list(samples)), self.start)

    def floor(self, count: int) -> float:
        """The distance to the optimum that `count` perfect samples of it have on average: no method can be below."""
        return sampling_floor(self.optimum.distribution, count, Rng(0).split("floor", count), repeats=40)[0]


def mixture_problem(modes: int = 6, strength: float = 1.0, beta: float = 1.0) -> MixtureProblem:
    """A ring of `modes` equal Gaussians, r(x) = -strength |x - target|^2 / 2 with `TARGET` near one of them."""
    if modes < 1:
        raise InputError(f"modes of task mixture must be at least 1, got {modes}.")
    if not strength > 0.0:
        raise InputError(f"strength of task mixture must be above 0, got {strength}.")
    angles = math.pi * (0.5 + 2.0 * torch.arange(modes, dtype=torch.float64) / modes)
    means = RADIUS * torch.stack([angles.cos(), angles.sin()], 1)
    start = Mixture(torch.full((modes,), 1.0 / modes), means, SPREAD**2 * torch.eye(2).expand(modes, 2, 2))
    return MixtureProblem(start, Quadratic(torch.tensor(TARGET), strength), beta)
