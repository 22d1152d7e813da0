"""Credit from the rank of a sample among those of its prompt."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

from stepwell.batch import Batch
from stepwell.credit.group import group_index, group_sum, top_of_groups
from stepwell.credit.shaping import Outcome
from stepwell.parts import Node, Part
from stepwell.ranges import NotNegative
from stepwell.tensors import Tensor, torch


@dataclass(frozen=True)
class WinnerTakesAll(Part):
    """G (R_best - R_second) for the best of a group, 0 for the rest, (N,): E max of G samples rises by it.

    Under a mean over rows its expected gradient is exactly that of E[max of G], pass@G where rewards are 0 and 1. Of
    equals none wins anything. Source: Poppy (Grinsztajn et al. 2023, arXiv 2210.03475), whose populations are here
    the samples of one policy.
    """

    compares = True
    reward: Part = field(default_factory=Outcome)

    def __call__(self, batch: Batch) -> Tensor:
        reward = self.reward(batch)
        group, groups = group_index(batch.rows.prompt)
        first = top_of_groups(reward, group, groups)
        rest = reward.clone()
        rest[first] = -torch.inf
        second = reward.new_full((groups,), -torch.inf).scatter_reduce(0, group, rest, "amax")
        size = group_sum(torch.ones_like(reward), group, groups)[first]
        gain = torch.where(size > 1, size * (reward[first] - second), 0.0)
        return torch.zeros_like(reward).index_put((first,), gain)


class Beats(Node, ABC):
    """P (M,) that rows with rewards (M, K) beat rows with other rewards (M, K)."""

    @abstractmethod
    def __call__(self, left: Tensor, right: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class WinRate(Part):
    """A_i = mean_{j != i} P(y_i beats y_j) - 1/2 over the group, (N,): self-play against the policy's own samples.

    P = sigmoid((R_i - R_j) / temperature); for 0 the larger reward wins, and equals win half. The expected gradient is
    that of P(y beats y') with y' from the policy held fixed. `beats` maps the rewards (N, K) of two sides to P (N,)
    where a preference is no difference of numbers, as in cycles.

    Source: SPO (Swamy et al. 2024, arXiv 2401.04056), equation 5.
    """

    temperature: NotNegative = 0.0
    beats: Beats | None = None
    compares = True
    rewarded = True

    def __call__(self, batch: Batch) -> Tensor:
        left, right = pairs_within(*group_index(batch.rows.prompt))
        wins = self._wins(batch, left, right).to(batch.mask.dtype) - 0.5
        total = torch.zeros(len(batch), dtype=wins.dtype, device=wins.device).index_add_(0, left, wins)
        return total / torch.bincount(left, minlength=len(batch)).clamp(min=1)

    def _wins(self, batch: Batch, left: Tensor, right: Tensor) -> Tensor:
        if self.beats is not None:
            rewards = batch.field("rewards")
            return self.beats(rewards[left], rewards[right])
        gap = batch.reward[left] - batch.reward[right]
        return torch.sigmoid(gap / self.temperature) if self.temperature else (gap.sign() + 1) / 2


def pairs_within(group: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """(M,), (M,) all ordered pairs of different rows of one group, for dense group numbers (N,)."""
    size = torch.bincount(group, minlength=groups)
    order = group.argsort(stable=True)
    place = torch.arange(len(group), device=group.device) - (size.cumsum(0) - size)[group[order]]
    table = group.new_full((groups, int(size.max())), -1)
    table[group[order], place] = order
    left, right = torch.broadcast_tensors(table[:, :, None], table[:, None])
    different = (left >= 0) & (right >= 0) & (left != right)
    return left[different], right[different]
