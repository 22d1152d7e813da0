"""Surrogates, which make a loss per step of a ratio and an advantage.

Every surrogate maps (log r, A, log pi), each (N, T), to a loss (N, T), and its gradient is
d loss / d log pi = -g(r) A with g(1) = 1 for both signs of A, so that at the old parameters each gives the exact
policy gradient. One that means another slope declares it (`slope`); `stepwell.check.surrogate` holds each to its own.
Beyond r = 1 they differ:

    Plain    g = r
    Clip     g = r, and 0 where (r > 1 + high and A > 0) or (r < 1 - low and A < 0)
    Score    g = 1, or r clipped to [minimum, maximum]
    Taper    g = 4 r s (1 - s), s = sigmoid(tau (r - 1))
    Drift    A > 0: g = r (1 - tanh^2(x / a)) for r > 1, x = (r - 1) A, and r for r <= 1
             A < 0: g = r - tanh^2(y / b) for r < 1, y = A log r, and r for r >= 1
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import reduce
from typing import Annotated

from stepwell.batch import Batch
from stepwell.errors import InputError
from stepwell.objective.gates.step import SamplerCorrection
from stepwell.parts import Node, product_in_words, sum_in_words
from stepwell.ranges import NotNegative, Positive, Range, Width
from stepwell.tensors import Tensor, functional, torch
from stepwell.writing import describe

LARGEST = 80.0
"""The largest log-ratio whose exponential is taken: beyond it float32 overflows, and no gradient passes."""


def ratio_of(log_ratio: Tensor) -> Tensor:
    """r = exp(log r), finite: a clipped infinity would have the gradient 0 * inf, which is no number."""
    return log_ratio.clamp(max=LARGEST).exp()


class Surrogate(Node, ABC):
    """A loss per step; weighted sums, such as `0.5 * Clip() + 0.5 * Plain()`, are surrogates again."""

    @abstractmethod
    def __call__(self, log_ratio: Tensor, advantage: Tensor, batch: Batch) -> Tensor: ...

    def clipped(self, log_ratio: Tensor, advantage: Tensor) -> Tensor:
        """(N, T) bool: no gradient passes, or a capped one; for the log."""
        return torch.zeros_like(log_ratio, dtype=torch.bool)

    def slope(self, batch: Batch) -> Tensor:
        """(N, T) g at r = 1, which `stepwell.check.surrogate` holds the loss to; 1 unless it is another on purpose."""
        return torch.ones_like(batch.log_prob)

    def __add__(self, other: Surrogate) -> Surrogate:
        if not isinstance(other, Surrogate):
            return NotImplemented
        (left, weights), (right, others) = _summands(self), _summands(other)
        return WeightedSum(left + right, weights + others)

    def __sub__(self, other: Surrogate) -> Surrogate:
        return self + -1.0 * other if isinstance(other, Surrogate) else NotImplemented

    def __mul__(self, factor: float) -> Surrogate:
        if not isinstance(factor, float | int):
            return NotImplemented
        surrogates, weights = _summands(self)
        return WeightedSum(surrogates, tuple(factor * weight for weight in weights))

    __rmul__ = __mul__


@dataclass(frozen=True)
class WeightedSum(Surrogate):
    """sum_k w_k surrogate_k, which is how `0.5 * Clip() + 0.5 * Plain()` is kept.

    Slopes add up: at r = 1 it is -A times the sum of the weights, so that weights that sum to 1 leave the policy
    gradient as it is. A step counts as clipped where any of the surrogates clips it.
    """

    surrogates: tuple[Surrogate, ...]
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        matched = bool(self.surrogates) and len(self.weights) == len(self.surrogates)
        if not matched or not all(map(math.isfinite, self.weights)):
            raise InputError(
                f"WeightedSum.weights must be one finite number for each surrogate, of which there are "
                f"{len(self.surrogates)}, got {self.weights}."
            )

    def __call__(self, log_ratio: Tensor, advantage: Tensor, batch: Batch) -> Tensor:
        pairs = zip(self.weights, self.surrogates, strict=True)
        first, *others = (weight * surrogate(log_ratio, advantage, batch) for weight, surrogate in pairs)
        return sum(others, start=first)

    def slope(self, batch: Batch) -> Tensor:
        pairs = zip(self.weights, self.surrogates, strict=True)
        return torch.stack([weight * surrogate.slope(batch) for weight, surrogate in pairs]).sum(0)

    def clipped(self, log_ratio: Tensor, advantage: Tensor) -> Tensor:
        return reduce(torch.logical_or, (surrogate.clipped(log_ratio, advantage) for surrogate in self.surrogates))

    def in_words(self) -> str:
        """The sum as it is written."""
        pairs = zip(self.weights, self.surrogates, strict=True)
        return sum_in_words(product_in_words(weight, describe(surrogate)) for weight, surrogate in pairs)


def _summands(surrogate: Surrogate) -> tuple[tuple[Surrogate, ...], tuple[float, ...]]:
    """The surrogates that one is the weighted sum of, and their weights."""
    if isinstance(surrogate, WeightedSum):
        return surrogate.surrogates, surrogate.weights
    return (surrogate,), (1.0,)


@dataclass(frozen=True)
class Clip(Surrogate):
    """PPO: -min(r A, clip(r, 1-low, 1+high) A); Schulman et al. 2017, equation 7.

    `dual` (c > 1) bounds the loss by -c A where A < 0 (dual-clip PPO); `delta` caps the unclipped ratio (TRL's
    two-sided clipping, above 1 + high).
    """

    low: NotNegative = 0.2
    high: NotNegative = 0.2
    dual: Annotated[float, Range("a finite number above 1", 1, above=True)] | None = None
    delta: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.delta is not None and not self.delta > 1 + self.high:
            raise InputError(
                f"Clip.delta must be above 1 + high = {1 + self.high}, where the ratio is clipped already, or None, "
                f"got {self.delta}."
            )

    def __call__(self, log_ratio: Tensor, advantage: Tensor, batch: Batch) -> Tensor:
        ratio = ratio_of(log_ratio)
        free = ratio if self.delta is None else ratio.clamp(max=self.delta)
        loss = -torch.minimum(free * advantage, ratio.clamp(1 - self.low, 1 + self.high) * advantage)
        if self.dual is not None:
            loss = torch.where(advantage < 0, torch.minimum(loss, -self.dual * advantage), loss)
        return loss

    def clipped(self, log_ratio: Tensor, advantage: Tensor) -> Tensor:
        ratio = ratio_of(log_ratio)
        return ((ratio > 1 + self.high) & (advantage > 0)) | ((ratio < 1 - self.low) & (advantage < 0))


@dataclass(frozen=True)
class Plain(Surrogate):
    """-r A: the importance-weighted policy gradient without a clip."""

    def __call__(self, log_ratio: Tensor, advantage: Tensor, batch: Batch) -> Tensor:
        return -ratio_of(log_ratio) * advantage


@dataclass(frozen=True)
class Score(Surrogate):
    """-w A log pi with a constant weight w: the score function.

    w is 1, or the ratio clipped to [`minimum`, `maximum`] where one is given (CISPO, truncated importance sampling):
    the gradient of clipped steps is kept, at the clipped weight. The value is not an objective, only its gradient.
    """

    minimum: NotNegative | None = None
    maximum: Width | None = None

    def __call__(self, log_ratio: Tensor, advantage: Tensor, batch: Batch) -> Tensor:
        if self.minimum is None and self.maximum is None:
            return -advantage * batch.log_prob
        weight = ratio_of(log_ratio.detach()).clamp(self.minimum, self.maximum)
        return -weight * advantage * batch.log_prob

    def clipped(self, log_ratio: Tensor, advantage: Tensor) -> Tensor:
        ratio = ratio_of(log_ratio)
        above = ratio > self.maximum if self.maximum is not None else torch.zeros_like(ratio, dtype=torch.bool)
        below = ratio < self.minimum if self.minimum is not None else torch.zeros_like(ratio, dtype=torch.bool)
        return above | below


@dataclass(frozen=True)
class Taper(Surrogate):
    """SAPO's soft clip: -(4 / tau) sigmoid(tau (r - 1)) A, tau = `positive` where A > 0, else `negative`."""

    positive: Positive = 1.0
    negative: Positive = 1.05

    def __call__(self, log_ratio: Tensor, advantage: Tensor, batch: Batch) -> Tensor:
        tau = torch.where(advantage > 0, advantage.new_tensor(self.positive), advantage.new_tensor(self.negative))
        return -torch.sigmoid(tau * (ratio_of(log_ratio) - 1)) * 4 / tau * advantage


@dataclass(frozen=True)
class Drift(Surrogate):
    """Discovered Policy Optimisation: -(r A - drift), drift zero to first order at r = 1 (Lu et al. 2022).

    A >= 0: relu(x - a tanh(x / a)), x = (r - 1) A. A < 0: relu(y - b tanh(y / b)), y = A log r.
    """

    a: Positive = 2.0
    b: Positive = 0.6

    def __call__(self, log_ratio: Tensor, advantage: Tensor, batch: Batch) -> Tensor:
        ratio = ratio_of(log_ratio)
        up, down = (ratio - 1) * advantage, log_ratio * advantage
        drift = torch.where(
            advantage >= 0,
            functional.relu(up - self.a * torch.tanh(up / self.a)),
            functional.relu(down - self.b * torch.tanh(down / self.b)),
        )
        return -(ratio * advantage - drift)


@dataclass(frozen=True)
class SignedScore(Surrogate):
    """-w A log pi, w the ratio clipped to one interval where A >= 0 and to another where A < 0, and constant.

    Intervals (a, b) with a <= 1 <= b. (1, 1) leaves the score as it is, (0, 1) never raises its weight (TOPR's taper
    of negative examples, arXiv 2503.14286), (0, inf) is importance sampling.
    """

    positive: tuple[float, float] = (1.0, 1.0)
    negative: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, (low, high) in (("positive", self.positive), ("negative", self.negative)):
            if not 0 <= low <= 1 <= high:
                raise InputError(
                    f"SignedScore.{name} must be (low, high) with 0 <= low <= 1 <= high, got ({low}, {high})."
                )

    def __call__(self, log_ratio: Tensor, advantage: Tensor, batch: Batch) -> Tensor:
        ratio = ratio_of(log_ratio.detach())
        weight = torch.where(advantage >= 0, ratio.clamp(*self.positive), ratio.clamp(*self.negative))
        return -weight * advantage * batch.log_prob

    def clipped(self, log_ratio: Tensor, advantage: Tensor) -> Tensor:
        ratio = ratio_of(log_ratio)
        up, down = (((ratio < low) | (ratio > high)) & (low < high) for low, high in (self.positive, self.negative))
        return torch.where(advantage >= 0, up, down)


@dataclass(frozen=True)
class GammaScore(Surrogate):
    """VESPO: -w A log pi with the constant weight w = exp(l + k x - l e^x), x = log r; (k, l) by the sign of A.

    A gamma density in r but for its scale, r^k e^(-l r), highest at r = k / l; w = 1 at r = 1. x is clamped to
    [log 1e-8, 20]. Made for the ratio of whole sequences, their product. With a `sampler` correction the logarithms of
    its steps' factors, each clamped likewise, are added to x, as TRL has it: one step that it masks makes the row count
    for nothing. Source: arXiv 2602.10693.
    """

    positive: tuple[float, float] = (2.0, 3.0)
    negative: tuple[float, float] = (3.0, 2.0)
    sampler: SamplerCorrection | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, pair in (("positive", self.positive), ("negative", self.negative)):
            if not all(0 <= number < math.inf for number in pair):
                raise InputError(f"GammaScore.{name} must be (shape, rate), both finite and 0 or more, got {pair}.")

    def __call__(self, log_ratio: Tensor, advantage: Tensor, batch: Batch) -> Tensor:
        x, lowest = log_ratio.detach(), math.log(1e-8)
        if self.sampler is not None:
            rho = self.sampler(batch, None, advantage).log().clamp(lowest, 20.0)
            x = x + (rho if self.sampler.level == "sequence" else batch.row_sum(rho))
        x = x.clamp(lowest, 20.0)
        up, down = (rate + shape * x - rate * x.exp() for shape, rate in (self.positive, self.negative))
        return -torch.where(advantage >= 0, up, down).exp() * advantage * batch.log_prob


@dataclass(frozen=True)
class Focused(Surrogate):
    """-r A (1 - pi)^gamma with 1 - pi constant: steps that are unlikely under the policy count most (RL-PLUS)."""

    gamma: NotNegative = 0.5

    def __call__(self, log_ratio: Tensor, advantage: Tensor, batch: Batch) -> Tensor:
        return -ratio_of(log_ratio) * advantage * self.slope(batch)

    def slope(self, batch: Batch) -> Tensor:
        """(1 - pi)^gamma."""
        return (-torch.expm1(batch.log_prob.detach().clamp(max=0.0))) ** self.gamma


@dataclass(frozen=True)
class Shaped(Surrogate):
    """-A pi / (pi + gamma): LUFFY's shaping of the probability itself, for rows whose distribution nobody knows.

    The gradient's weight is gamma pi / (pi + gamma)^2, largest at pi = gamma.
    """

    gamma: Positive = 0.1

    def __call__(self, log_ratio: Tensor, advantage: Tensor, batch: Batch) -> Tensor:
        probability = batch.log_prob.exp()
        return -advantage * probability / (probability + self.gamma)

    def slope(self, batch: Batch) -> Tensor:
        """gamma pi / (pi + gamma)^2."""
        probability = batch.log_prob.exp()
        return self.gamma * probability / (probability + self.gamma) ** 2


@dataclass(frozen=True)
class BySource(Surrogate):
    """One surrogate for rows of source 0, the policy's own, and another for all others (demonstrations, teachers)."""

    own: Surrogate
    other: Surrogate

    def __call__(self, log_ratio: Tensor, advantage: Tensor, batch: Batch) -> Tensor:
        own, other = (part(log_ratio, advantage, batch) for part in (self.own, self.other))
        return torch.where((batch.rows.source > 0)[:, None], other, own)

    def slope(self, batch: Batch) -> Tensor:
        return torch.where((batch.rows.source > 0)[:, None], self.other.slope(batch), self.own.slope(batch))
