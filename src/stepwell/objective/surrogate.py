"""How a ratio and an advantage become a loss per step.

Every surrogate maps (log r, A, log pi), each (N, T), to a loss (N, T), and its gradient is
d loss / d log pi = -g(r) A with g(1) = 1 for both signs of A, so that at the old parameters each gives the exact
policy gradient. The table of g is cards_objectives.md section 0.1; `stepwell.check` holds each against it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import relu

from stepwell.errors import InputError
from stepwell.objective.gates.step import SamplerCorrection
from stepwell.parts import Batch, NotNegative, Part, Positive, Width

LARGEST = 80.0
"""The largest log-ratio whose exponential is taken: beyond it float32 overflows, and no gradient passes."""


def ratio_of(log_ratio: Tensor) -> Tensor:
    """r = exp(log r), finite: a clipped infinity would have the gradient 0 * inf, which is no number."""
    return log_ratio.clamp(max=LARGEST).exp()


class Surrogate(Part):
    """A loss per step; `clipped` tells where its gradient was cut, for the log."""

    def __call__(self, log_ratio: Tensor, advantage: Tensor, batch: Batch) -> Tensor:  # type: ignore[override]
        raise NotImplementedError(f"{type(self).__name__} gives no loss.")

    def clipped(self, log_ratio: Tensor, advantage: Tensor) -> Tensor:
        """(N, T) bool: no gradient passes, or a capped one."""
        return torch.zeros_like(log_ratio, dtype=torch.bool)


@dataclass(frozen=True)
class Clip(Surrogate):
    """PPO: -min(r A, clip(r, 1-low, 1+high) A); Schulman et al. 2017, equation 7.

    `dual` (c > 1) bounds the loss by -c A where A < 0 (dual-clip PPO); `delta` caps the unclipped ratio (TRL's
    two-sided clipping, above 1 + high).
    """

    low: float = 0.2
    high: float = 0.2
    dual: float | None = None
    delta: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in (("low", self.low), ("high", self.high)):
            if not value >= 0:
                raise InputError(f"A ratio cannot be clipped at a distance of {value} ('{name}'); 0 or more is right.")
        if self.dual is not None and not self.dual > 1:
            raise InputError(f"The bound of a dual clip is {self.dual} ('dual'); above 1 is right, or None for none.")
        if self.delta is not None and not self.delta > 1 + self.high:
            raise InputError(
                f"The ratio is capped at {self.delta} ('delta'), where it is clipped at 1 + {self.high} already; above "
                "that is right, or None for no cap."
            )

    def __call__(self, log_ratio: Tensor, advantage: Tensor, batch: Batch) -> Tensor:  # type: ignore[override]
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

    def __call__(self, log_ratio: Tensor, advantage: Tensor, batch: Batch) -> Tensor:  # type: ignore[override]
        return -ratio_of(log_ratio) * advantage


@dataclass(frozen=True)
class Score(Surrogate):
    """-w A log pi with a constant weight w: the score function.

    w is 1, or the ratio clipped to [`minimum`, `maximum`] where one is given (CISPO, truncated importance sampling):
    the gradient of clipped steps is kept, at the clipped weight. The value is not an objective, only its gradient.
    """

    minimum: NotNegative | None = None
    maximum: Width | None = None

    def __call__(self, log_ratio: Tensor, advantage: Tensor, batch: Batch) -> Tensor:  # type: ignore[override]
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
    """SAPO's soft clip: -(4 / tau) sigmoid(tau (r - 1)) A, tau by the sign of A; cards_objectives.md section 2."""

    positive: Positive = 1.0
    negative: Positive = 1.05

    def __call__(self, log_ratio: Tensor, advantage: Tensor, batch: Batch) -> Tensor:  # type: ignore[override]
        tau = torch.where(advantage > 0, advantage.new_tensor(self.positive), advantage.new_tensor(self.negative))
        return -torch.sigmoid(tau * (ratio_of(log_ratio) - 1)) * 4 / tau * advantage


@dataclass(frozen=True)
class Drift(Surrogate):
    """Discovered Policy Optimisation: -(r A - drift), drift zero to first order at r = 1 (Lu et al. 2022).

    A >= 0: relu(x - a tanh(x / a)), x = (r - 1) A. A < 0: relu(y - b tanh(y / b)), y = A log r.
    """

    a: Positive = 2.0
    b: Positive = 0.6

    def __call__(self, log_ratio: Tensor, advantage: Tensor, batch: Batch) -> Tensor:  # type: ignore[override]
        ratio = ratio_of(log_ratio)
        up, down = (ratio - 1) * advantage, log_ratio * advantage
        drift = torch.where(
            advantage >= 0,
            relu(up - self.a * torch.tanh(up / self.a)),
            relu(down - self.b * torch.tanh(down / self.b)),
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
                    f"SignedScore clips ratios to ({low}, {high}) ('{name}'); 0 <= low <= 1 <= high is right."
                )

    def __call__(self, log_ratio: Tensor, advantage: Tensor, batch: Batch) -> Tensor:  # type: ignore[override]
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
    for nothing. Source: arXiv 2602.10693 and cards_objectives.md section 2.
    """

    positive: tuple[float, float] = (2.0, 3.0)
    negative: tuple[float, float] = (3.0, 2.0)
    sampler: SamplerCorrection | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, pair in (("positive", self.positive), ("negative", self.negative)):
            if not all(0 <= number < math.inf for number in pair):
                raise InputError(f"The shape and the rate of GammaScore are {pair} ('{name}'); 0 or more is right.")

    def __call__(self, log_ratio: Tensor, advantage: Tensor, batch: Batch) -> Tensor:  # type: ignore[override]
        x, lowest = log_ratio.detach(), math.log(1e-8)
        if self.sampler is not None:
            rho = self.sampler(batch, None, advantage).log().clamp(lowest, 20.0)
            x = x + (rho if self.sampler.level == "sequence" else batch.row_sum(rho))
        x = x.clamp(lowest, 20.0)
        up, down = (rate + shape * x - rate * x.exp() for shape, rate in (self.positive, self.negative))
        return -torch.where(advantage >= 0, up, down).exp() * advantage * batch.log_prob


@dataclass(frozen=True)
class Focused(Surrogate):
    """-r A (1 - pi)^gamma with 1 - pi constant: steps the policy holds for unlikely count most (RL-PLUS)."""

    gamma: NotNegative = 0.5

    def __call__(self, log_ratio: Tensor, advantage: Tensor, batch: Batch) -> Tensor:  # type: ignore[override]
        unlikely = -torch.expm1(batch.log_prob.detach().clamp(max=0.0))
        return -ratio_of(log_ratio) * advantage * unlikely**self.gamma


@dataclass(frozen=True)
class Shaped(Surrogate):
    """-A pi / (pi + gamma): LUFFY's shaping of the probability itself, for rows whose law nobody knows.

    The gradient's weight is gamma pi / (pi + gamma)^2, largest at pi = gamma. Source: cards_objectives.md section 2.
    """

    gamma: Positive = 0.1

    def __call__(self, log_ratio: Tensor, advantage: Tensor, batch: Batch) -> Tensor:  # type: ignore[override]
        probability = batch.log_prob.exp()
        return -advantage * probability / (probability + self.gamma)


@dataclass(frozen=True)
class BySource(Surrogate):
    """One surrogate for rows of source 0, the policy's own, and another for all others (demonstrations, teachers)."""

    own: Surrogate
    other: Surrogate

    def __call__(self, log_ratio: Tensor, advantage: Tensor, batch: Batch) -> Tensor:  # type: ignore[override]
        foreign = (batch.rows.source > 0)[:, None]
        own, other = (part(log_ratio, advantage, batch) for part in (self.own, self.other))
        return torch.where(foreign, other, own)
