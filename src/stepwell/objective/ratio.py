"""The log importance ratio of the present policy against a denominator, at the level a method compares at."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from stepwell.batch import Batch, Read, notes
from stepwell.errors import InputError
from stepwell.parts import Node, Part
from stepwell.ranges import Width
from stepwell.tensors import Tensor, torch

Level = Literal["token", "segment", "turn", "sequence", "sequence_token"]


@dataclass(frozen=True)
class MixtureDenominator(Part):
    """log sum_k w_k mu_k (N, T): the denominator of multiple importance sampling.

    `components` are (name, weight) with names `old`, `behaviour`, `reference` or an (N, T) entry of `info`.
    """

    components: tuple[tuple[str, float], ...] = (("old", 0.5), ("behaviour", 0.5))

    def __post_init__(self) -> None:
        super().__post_init__()
        weights = [weight for _, weight in self.components]
        if not all(weight >= 0 for weight in weights) or not math.isclose(sum(weights), 1.0):
            raise InputError(
                f"MixtureDenominator.components must have weights of 0 or more that sum to 1, got {weights}."
            )

    @property
    def reads(self) -> frozenset[Read]:
        return notes(name for name, _ in self.components)

    def __call__(self, batch: Batch) -> Tensor:
        terms = [batch.under(name) + math.log(weight) for name, weight in self.components]
        return torch.stack(terms).logsumexp(0)


@dataclass(frozen=True)
class PerSource(Part):
    """One denominator for the policy's own rows, of source 0, and another for all others (demonstrations), (N, T)."""

    other: Part = field(default_factory=MixtureDenominator)
    reads = frozenset(
        {Read("policy", "log_prob")}
    )  # of others' rows the stored log-probability is not the old policy's

    def __call__(self, batch: Batch) -> Tensor:
        return torch.where((batch.rows.source > 0)[:, None], self.other(batch), batch.old)


class Hook(Node, ABC):
    """Maps each token's log-ratio and advantage, (N, T), to the log-ratio (N, T) that is aggregated."""

    @abstractmethod
    def __call__(self, difference: Tensor, advantage: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class LogClip(Hook):
    """A hook that clips each token's log-ratio x where it has moved on in the direction of its advantage.

    A > 0: min(x, clip(x, -low, high)); A < 0: max(x, clip(x, -low, high)); so x <= high where A > 0 and x >= -low
    where A < 0, and the gradient of a clipped token is 0 (GMPO, arXiv 2507.20673).
    """

    low: Width = 0.4
    high: Width = 0.4

    def __call__(self, difference: Tensor, advantage: Tensor) -> Tensor:
        return torch.where(advantage > 0, difference.clamp(max=self.high), difference.clamp(min=-self.low))


@dataclass(frozen=True)
class LogBound(Hook):
    """A hook that keeps each token's log-ratio in [low, high]; there is no gradient outside."""

    low: float = -20.0
    high: float = 20.0

    def __call__(self, difference: Tensor, advantage: Tensor) -> Tensor:
        return difference.clamp(self.low, self.high)


def runs(mask: Tensor) -> Tensor:
    """(N, T) the number of the run of trained steps that a step is in, or that comes next: tool output ends a run.

    Example:
        >>> runs(torch.tensor([[True, True, False, True]])).tolist()
        [[0, 0, 1, 1]]
    """
    trained = mask.bool()
    before = torch.cat([torch.zeros_like(trained[:, :1]), trained[:, :-1]], 1)
    return (before & ~trained).long().cumsum(1)


@dataclass(frozen=True)
class Ratio(Part):
    """log r (N, T), the logarithm of pi / denominator, aggregated to a level and copied to its steps.

    level: `token`; `segment` (rows.segment); `turn` (info's `turn`, else the segment, else maximal runs of trained
    steps: tool output separates turns); `sequence`; `sequence_token`, the value of the sequence with the gradient of
    the token (GSPO-token). mean: `geometric`, the mean of the log-ratios, or `product`, their sum. denominator: `old`,
    `behaviour`, `none` (the present policy, detached: ratio 1 with gradient), or a part such as `MixtureDenominator`.
    `hook`, a `Hook` or a function, maps (log-ratio, advantage) per token before aggregation (GMPO, clamps); `bounds`
    are those of the log-ratio after it, with no gradient outside (verl). Steps with mask 0 have log r = 0.
    """

    level: Level = "token"
    mean: Literal["geometric", "product"] = "geometric"
    denominator: Literal["old", "behaviour", "none"] | Part = "old"
    hook: Callable[[Tensor, Tensor], Tensor] | None = None
    bounds: tuple[float, float] | None = None

    @property
    def reads(self) -> frozenset[Read]:
        return frozenset({Read("rows", "segment")} if self.level == "segment" else ())

    def __call__(self, batch: Batch, advantage: Tensor | None = None) -> Tensor:
        log_ratio = self._aggregated(batch, advantage)
        return log_ratio if self.bounds is None else log_ratio.clamp(*self.bounds)

    def _aggregated(self, batch: Batch, advantage: Tensor | None) -> Tensor:
        present, mask = batch.log_prob, batch.mask
        difference = (present - self._denominator(batch)) * mask
        if self.hook is not None:
            difference = self.hook(difference, torch.zeros_like(mask) if advantage is None else advantage) * mask
        if self.level == "token":
            return difference
        if self.level == "segment" or self.level == "turn":
            whole = self._by_segment(difference, mask, self._segments(batch))
        else:
            total = difference.sum(1, keepdim=True)
            whole = (total / batch.steps if self.mean == "geometric" else total).expand_as(difference)
        if self.level == "sequence_token":
            whole = whole.detach() + present - present.detach()
        return whole * mask

    def _denominator(self, batch: Batch) -> Tensor:
        if not isinstance(self.denominator, str):
            return self.denominator(batch)
        return batch.log_prob.detach() if self.denominator == "none" else batch.under(self.denominator)

    def _segments(self, batch: Batch) -> Tensor:
        if self.level == "turn" and batch.rows.info is not None and "turn" in batch.rows.info:
            return batch.field("turn")
        if self.level == "turn" and batch.rows.segment is None:
            return runs(batch.rows.mask)
        return batch.field("segment")

    def _by_segment(self, difference: Tensor, mask: Tensor, segment: Tensor) -> Tensor:
        number = int(segment.max()) + 1
        total = mask.new_zeros(len(mask), number).scatter_add(1, segment, difference)
        if self.mean == "geometric":
            size = mask.new_zeros(len(mask), number).scatter_add(1, segment, mask)
            total = total / size.clamp(min=1)
        return total.gather(1, segment)
