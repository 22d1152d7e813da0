"""The distribution of the next action, one a row: proposed by a process, and drawn from by a rollout.

A log-density is the **sum** over an action's dimensions, in float64 for vectors: of an image's many thousand terms
single precision would lose the ratio. A deterministic step is a `Point`: it has no density, `random` is False there,
and the step is masked out of everything that trains. So is a draw that no parameter has a part in (`trained=False`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol, Self, runtime_checkable

from stepwell.rng import Rng
from stepwell.tensors import Tensor, torch


@runtime_checkable
class Distribution(Protocol):
    """N independent distributions, one a row."""

    @property
    def random(self) -> Tensor: ...  # (N,) bool: the row has a density, and parameters that may move it
    def sample(self, rng: Rng) -> Tensor: ...  # (N, *action)
    def log_prob(self, action: Tensor) -> Tensor: ...  # (N,)
    def entropy(self) -> Tensor: ...  # (N,)
    def kl(self, other: Any) -> Tensor: ...  # (N,)  KL(self || other)
    def __getitem__(self, index: Any) -> Self: ...


@dataclass(frozen=True)
class Categorical:
    """Distributions over K symbols from logits (N, K), normalised here; minus infinity forbids a symbol."""

    logits: Tensor

    def __post_init__(self) -> None:
        object.__setattr__(self, "logits", self.logits.log_softmax(-1))

    def __len__(self) -> int:
        return len(self.logits)

    def __getitem__(self, index: Any) -> Categorical:
        return Categorical(self.logits[index])

    @property
    def random(self) -> Tensor:
        return torch.ones(len(self.logits), dtype=torch.bool, device=self.logits.device)

    @property
    def probabilities(self) -> Tensor:
        return self.logits.exp()

    def sample(self, rng: Rng) -> Tensor:
        return rng.categorical(self.probabilities)

    def log_prob(self, action: Tensor) -> Tensor:
        return self.logits.gather(-1, action[:, None])[:, 0]

    def entropy(self) -> Tensor:
        return -_expectation(self.probabilities, self.logits)

    def kl(self, other: Categorical) -> Tensor:
        return _expectation(self.probabilities, self.logits - other.logits)


def _expectation(probabilities: Tensor, values: Tensor) -> Tensor:
    """Row sums of p * x in which impossible symbols count nothing, whatever their x."""
    return (probabilities * values.masked_fill(probabilities == 0, 0.0)).sum(-1)


def _row_sums(values: Tensor) -> Tensor:
    """(N,) sums over all further dimensions, of which there may be none, in double precision."""
    return values.flatten(1).sum(1, dtype=torch.float64) if values.dim() > 1 else values


@dataclass(frozen=True)
class Gaussian:
    """Diagonal Gaussians: mean (N, *D), standard deviation broadcastable to it, above zero.

    `trained=False`: a draw that no parameter moves, such as the noise that a flow starts from.
    """

    mean: Tensor
    standard_deviation: Tensor
    trained: bool = True

    def __len__(self) -> int:
        return len(self.mean)

    def __getitem__(self, index: Any) -> Gaussian:
        return Gaussian(self.mean[index], self.standard_deviation.expand_as(self.mean)[index], self.trained)

    @property
    def random(self) -> Tensor:
        return torch.full((len(self.mean),), self.trained, device=self.mean.device)

    def sample(self, rng: Rng) -> Tensor:
        noise = rng.normal(*self.mean.shape, dtype=self.mean.dtype).to(self.mean.device)
        return self.mean + self.standard_deviation * noise

    def log_prob(self, action: Tensor) -> Tensor:
        standardised = (action - self.mean) / self.standard_deviation
        density = -0.5 * standardised**2 - (self.standard_deviation.log() + 0.5 * math.log(2 * math.pi))
        return _row_sums(density)

    def entropy(self) -> Tensor:
        return _row_sums(self._log_scale() + 0.5 * math.log(2 * math.pi * math.e))

    def kl(self, other: Gaussian) -> Tensor:
        scale, other_scale = (x.standard_deviation.expand_as(self.mean) for x in (self, other))
        squares = (scale**2 + (self.mean - other.mean) ** 2) / other_scale**2
        return _row_sums(0.5 * (squares - 1) + other_scale.log() - scale.log())

    def _log_scale(self) -> Tensor:
        return self.standard_deviation.expand_as(self.mean).log()


@dataclass(frozen=True)
class Point:
    """A deterministic step to `value` (N, *D): no density, so its log_prob is 0 and `random` is False."""

    value: Tensor

    def __len__(self) -> int:
        return len(self.value)

    def __getitem__(self, index: Any) -> Point:
        return Point(self.value[index])

    @property
    def random(self) -> Tensor:
        return torch.zeros(len(self.value), dtype=torch.bool, device=self.value.device)

    def sample(self, rng: Rng) -> Tensor:
        return self.value

    def log_prob(self, action: Tensor) -> Tensor:
        return self._nothing()

    def entropy(self) -> Tensor:
        return self._nothing()

    def kl(self, other: Point) -> Tensor:
        return self._nothing()

    def _nothing(self) -> Tensor:
        floating = self.value.dtype if self.value.is_floating_point() else None
        return torch.zeros(len(self.value), dtype=floating, device=self.value.device)
