"""Gates: the weight with which each step trains. They see rewards and advantages apart, and carry no gradient."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

from stepwell.batch import Batch, Read
from stepwell.credit.group import group_index, group_sum
from stepwell.parts import Node
from stepwell.ranges import NotNegative, Portion, Width
from stepwell.tensors import Tensor, torch


class Gate(Node, ABC):
    """Maps (batch, log r, A) to weights (N, T) or (N, 1). Several gates of one term are multiplied.

    `when` follows from what it reads. `rows`: only what was drawn, so it is planned once, and log r is None.
    `minibatch`: the present scores of the whole minibatch (quantiles, sorts), so it is planned before every update.
    `step`: the present scores of each row by itself, so it is evaluated inside the loss.
    """

    @abstractmethod
    def __call__(self, batch: Batch, log_ratio: Tensor | None, advantage: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class SamplerCorrection(Gate):
    """rho = pi_old / pi_behaviour, bounded: corrects for a sampler that is not the policy (another engine, stale).

    level: `token`, or `sequence`, the product over the row. kind: `truncate` takes min(max(rho, low), high), known as
    TIS; `mask` takes rho where low <= rho <= high and 0 elsewhere, known as MIS and IcePop.
    """

    level: Literal["token", "sequence"] = "token"
    low: NotNegative = 0.0
    high: Width = 2.0
    kind: Literal["truncate", "mask"] = "truncate"
    reads = frozenset({Read("policy", "log_prob")})

    def __call__(self, batch: Batch, log_ratio: Tensor | None, advantage: Tensor) -> Tensor:
        difference = (batch.old - batch.behaviour) * batch.mask
        rho = (difference if self.level == "token" else difference.sum(1, keepdim=True)).exp()
        if self.kind == "truncate":
            return rho.clamp(self.low, self.high)
        return rho * ((rho >= self.low) & (rho <= self.high))


@dataclass(frozen=True)
class CompleteRows(Gate):
    """Rows cut at the horizon do not train (DAPO's overlong filtering); they still count in the statistics."""

    def __call__(self, batch: Batch, log_ratio: Tensor | None, advantage: Tensor) -> Tensor:
        return (~batch.rows.truncated)[:, None].to(batch.mask.dtype)


@dataclass(frozen=True)
class HighEntropy(Gate):
    """Only the share `top` of steps with the highest entropy trains (Wang et al. 2025, "Beyond the 80/20 rule")."""

    top: Portion = 0.2
    when = "minibatch"
    present = frozenset({"entropy"})

    def __call__(self, batch: Batch, log_ratio: Tensor | None, advantage: Tensor) -> Tensor:
        entropy = batch.present("entropy")
        threshold = torch.quantile(entropy[batch.rows.mask], 1 - self.top)
        return (entropy >= threshold).to(batch.mask.dtype) * batch.mask


@dataclass(frozen=True)
class OneSide(Gate):
    """PPO's gate without its ratio: drop a step once it moved past the bound in the direction of its advantage."""

    low: Width = 0.2
    high: Width = 0.2
    when = "step"

    def __call__(self, batch: Batch, log_ratio: Tensor | None, advantage: Tensor) -> Tensor:
        assert log_ratio is not None
        ratio = log_ratio.exp()
        kept = ((ratio <= 1 + self.high) & (advantage >= 0)) | ((ratio >= 1 - self.low) & (advantage <= 0))
        return kept.to(batch.mask.dtype)


@dataclass(frozen=True)
class TwoSide(Gate):
    """Drop a step outside 1 - low <= r <= 1 + high, whatever its advantage (REC-TwoSide, arXiv 2509.24203)."""

    low: Width = 0.2
    high: Width = 0.2
    when = "step"

    def __call__(self, batch: Batch, log_ratio: Tensor | None, advantage: Tensor) -> Tensor:
        assert log_ratio is not None
        return self._near(log_ratio.exp()).to(batch.mask.dtype)

    def _near(self, ratio: Tensor) -> Tensor:
        return (ratio >= 1 - self.low) & (ratio <= 1 + self.high)


@dataclass(frozen=True)
class Ring(TwoSide):
    """Keep 1 - low <= r <= 1 + high, and what is far out on the side that its advantage brings back.

    That is r <= 1 - far_low where A >= 0, and r >= 1 + far_high where A <= 0 (REC-Ring, arXiv 2509.24203).
    """

    far_low: Width = 0.6
    far_high: Width = 2.0

    def __call__(self, batch: Batch, log_ratio: Tensor | None, advantage: Tensor) -> Tensor:
        assert log_ratio is not None
        ratio = log_ratio.exp()
        back = ((advantage >= 0) & (ratio <= 1 - self.far_low)) | ((advantage <= 0) & (ratio >= 1 + self.far_high))
        return (self._near(ratio) | back).to(batch.mask.dtype)


@dataclass(frozen=True)
class ProbabilityShift(Gate):
    """Drop a step once its probability itself moved past a bound in the direction of its advantage (DPPO).

    Dropped are A > 0 with pi - mu > high, and A < 0 with mu - pi > low, where mu is the sampler's probability of the
    token taken: |pi - mu| is the total variation of the two distributions where all other tokens count as one. A rare
    token may therefore change its ratio by much, a common one may not. Source: arXiv 2602.04879 (Binary-TV).
    """

    low: Width = 0.15
    high: Width = 0.15
    when = "step"

    def __call__(self, batch: Batch, log_ratio: Tensor | None, advantage: Tensor) -> Tensor:
        shift = batch.log_prob.exp() - batch.behaviour.exp()
        over = ((advantage > 0) & (shift > self.high)) | ((advantage < 0) & (-shift > self.low))
        return (~over).to(batch.mask.dtype)


@dataclass(frozen=True)
class Sources(Gate):
    """Only rows of source 0, the policy's own, train; with `own=False` only all others (demonstrations)."""

    own: bool = True

    def __call__(self, batch: Batch, log_ratio: Tensor | None, advantage: Tensor) -> Tensor:
        return ((batch.rows.source == 0) == self.own)[:, None].to(batch.mask.dtype)


@dataclass(frozen=True)
class SuccessRate(Gate):
    """Only prompts whose success rate is above `rate` train; with `above=False` only all others.

    The rate of a prompt is the share of the policy's own rows, of source 0, with a reward above `threshold`; it is 0
    where the policy has none.
    """

    rate: float = 0.0
    above: bool = True
    threshold: float = 0.0
    rewarded = True

    def __call__(self, batch: Batch, log_ratio: Tensor | None, advantage: Tensor) -> Tensor:
        own = (batch.rows.source == 0).to(batch.mask.dtype)
        group, groups = group_index(batch.rows.prompt)
        solved = group_sum(own * (batch.reward > self.threshold), group, groups)
        rate = solved / group_sum(own, group, groups).clamp(min=1)
        return ((rate > self.rate) == self.above)[:, None].to(batch.mask.dtype)


@dataclass(frozen=True)
class OffPolicyRows(Gate):
    """Drop a row with A < 0 once the mean of log pi_behaviour - log pi over its steps exceeds a threshold.

    Rows with A >= 0 are kept. Source: DeepSeek-V3.2, which calls it off-policy sequence masking.
    """

    threshold: float = 1.0
    when = "step"

    def __call__(self, batch: Batch, log_ratio: Tensor | None, advantage: Tensor) -> Tensor:
        drift = batch.row_sum(batch.behaviour - batch.log_prob) / batch.steps
        return ((advantage >= 0) | (drift <= self.threshold)).to(batch.mask.dtype)
