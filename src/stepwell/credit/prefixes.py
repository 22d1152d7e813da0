"""Step credit where rows branch at fixed places: subtrees are compared, or values of prefixes are measured."""

from __future__ import annotations

from dataclasses import dataclass, field

from stepwell.batch import Batch, notes
from stepwell.credit.group import group_index, group_sum
from stepwell.credit.shaping import Outcome
from stepwell.parts import Part
from stepwell.ranges import Size
from stepwell.tensors import Tensor, torch


@dataclass(frozen=True)
class Subtrees(Part):
    """A_i = mean_d (R_i - mean of R over the rows that share i's first d `segment`s), d = 0 .. depth-1, (N,).

    Depth 0, the prompt, always counts; a deeper subtree only where it has other rows. `by_size`: each depth weighs by
    the rows of its subtree in place of all the same. Without branches this is the prompt's mean-centred reward.

    In a balanced tree with B branches at each fork, steps of segment d < D train with 1/D sum_{j<=d} (1 - B^(j-d-1))
    of their policy gradient: early ones with least. Source: TreePO, arXiv 2508.17445.
    """

    segment: Size = 16
    depth: Size = 3
    by_size: bool = False
    reward: Part = field(default_factory=Outcome)

    def __call__(self, batch: Batch) -> Tensor:
        reward = self.reward(batch)
        total, weight = torch.zeros_like(reward), torch.zeros_like(reward)
        for level in range(self.depth):
            group, groups = group_index(shared_prefix(batch, level * self.segment))
            size = group_sum(torch.ones_like(reward), group, groups)
            share = ((size > 1) | (level == 0)).to(reward.dtype) * (size if self.by_size else 1.0)
            total = total + share * (reward - group_sum(reward, group, groups) / size)
            weight = weight + share
        return total / weight


@dataclass(frozen=True)
class SegmentAdvantages(Part):
    """A_it = v(segment) - the mean of v over its siblings, (N, T), v the mean reward of the rows that share it.

    Segments have `segment` steps; siblings go on from the same state. From where a row is alone it keeps its last
    advantage, so that the reward of a row in a plain group is judged against the mean of the others. In a balanced
    tree the expected gradient, with a row-sum, is the policy gradient at every depth.
    """

    segment: Size = 16
    reward: Part = field(default_factory=Outcome)

    def __call__(self, batch: Batch) -> Tensor:
        reward, credit = self.reward(batch), torch.zeros_like(batch.mask)
        last, mean, size = torch.zeros_like(reward), *_leaves(reward, batch, 0)
        for begin in range(0, credit.shape[1], self.segment):
            own, fewer = _leaves(reward, batch, begin + self.segment)
            siblings = size - fewer
            judged = (own - mean) * size / siblings.clamp(min=1)
            last = torch.where(siblings > 0, judged, torch.where(size == 1, last, 0.0))
            credit[:, begin : begin + self.segment] = last[:, None]
            mean, size = own, fewer
        return credit * batch.mask


def _leaves(reward: Tensor, batch: Batch, steps: int) -> tuple[Tensor, Tensor]:
    """(N,), (N,) the mean reward of the rows that share a row's first steps, and the number of these rows."""
    group, groups = group_index(shared_prefix(batch, steps))
    size = group_sum(torch.ones_like(reward), group, groups)
    return group_sum(reward, group, groups) / size, size


def shared_prefix(batch: Batch, steps: int) -> Tensor:
    """(N,) a number that is equal for rows that share their first `steps` steps, or all steps of a shorter row.

    It is the node of the last of these steps, and the prompt where `steps` is 0.
    """
    if steps == 0:
        return batch.rows.prompt
    last = (batch.rows.length.clamp(max=steps) - 1).clamp(min=0)
    return batch.rows.node.gather(1, last[:, None])[:, 0]


@dataclass(frozen=True)
class StepValues(Part):
    """V_{k+1} on the steps of segment k, (N, T): the value of the state after that segment, R once the row has ended.

    V_k is the mean reward of further rows that the planner `Vines` draws from the state before segment k, and notes.
    """

    reward: Part = field(default_factory=Outcome)
    reads = notes({"value_after", "ends"})

    def __call__(self, batch: Batch) -> Tensor:
        after, ends = batch.field("value_after").to(batch.mask.dtype), batch.field("ends") > 0
        return torch.where(ends, self.reward(batch)[:, None], after) * batch.mask


@dataclass(frozen=True)
class PrefixValues(Part):
    """A_it = V_{k+1} - V_k on the steps of segment k, (N, T), with the values that `StepValues` reads.

    Every difference is an unbiased advantage of its segment, and they add up to R - V_0.

    Source: VinePPO, arXiv 2410.01679.
    """

    reward: Part = field(default_factory=Outcome)
    reads = notes({"value_before", "value_after", "ends"})

    def __call__(self, batch: Batch) -> Tensor:
        before = batch.field("value_before").to(batch.mask.dtype)
        return StepValues(self.reward)(batch) - before * batch.mask
