"""Selections of rows and steps: the most informative of a batch, and prompts by the agreement of their answers."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from stepwell.batch import Batch
from stepwell.credit.columns import RewardColumn, answer_entropy
from stepwell.credit.group import GroupCredit, equal_groups, group_index
from stepwell.objective.gates.step import Gate
from stepwell.objective.state import Coefficient, value_of
from stepwell.parts import Part
from stepwell.ranges import Portion, Share
from stepwell.tensors import Tensor, torch


@dataclass(frozen=True)
class Influence(Gate):
    """The share `top` of the trained steps with the largest |A_it| H_it trains, H the entropy at the step.

    `top` may be a `Ramp`, as in D3S (arXiv 2509.22115), which keeps few steps at first and more as it goes on.
    """

    top: Share | Coefficient = 0.5
    when = "minibatch"
    present = frozenset({"entropy"})

    def __call__(self, batch: Batch, log_ratio: Tensor | None, advantage: Tensor) -> Tensor:
        size = advantage.abs() * batch.present("entropy")
        threshold = torch.quantile(size[batch.rows.mask], 1 - min(max(value_of(self.top, batch), 0.0), 1.0))
        return (size >= threshold).to(batch.mask.dtype) * batch.mask


@dataclass(frozen=True)
class Agreement(Gate):
    """w = sigmoid(slope (H - centre)) for the rows of a prompt, H the entropy of its answers in bits; (N, 1).

    `answers` (N,) is equal for rows that gave the same answer. With `forced` w is 0 where all rewards of the prompt
    are equal, so that there is nothing to learn inside of it. `rest` gives 1 - w, for the term that takes over.

    Source: COPO, arXiv 2508.04138.
    """

    answers: Part = field(default_factory=RewardColumn)
    slope: float = 1.0
    centre: float = 0.5
    forced: bool = True
    rest: bool = False

    @property
    def rewarded(self) -> bool:
        return self.forced

    def __call__(self, batch: Batch, log_ratio: Tensor | None, advantage: Tensor) -> Tensor:
        weight = torch.sigmoid(self.slope * (answer_entropy(batch, self.answers(batch)) - self.centre))
        if self.forced:
            group, groups = group_index(batch.rows.prompt)
            weight = weight * ~equal_groups(batch.reward, group, groups)
        return ((1 - weight) if self.rest else weight)[:, None]


@dataclass(frozen=True)
class MostSpread(Part):
    """Another credit, kept for the `share` of all rows whose credits have the largest variance; 0 for the rest (N,).

    The best subset of m is the k smallest and the m - k largest for one k, found exactly. Credits are those of whole
    groups and are not standardised anew; losses go on dividing by all rows.

    Source: D3S, arXiv 2509.22115.
    """

    credit: Part = field(default_factory=lambda: GroupCredit("mean", "std"))
    share: Portion | Coefficient = 0.5

    def __call__(self, batch: Batch) -> Tensor:
        advantage = self.credit(batch)
        count = min(max(math.ceil(value_of(self.share, batch) * len(advantage)), 1), len(advantage))
        name = batch.rows.node.amax(1)  # rows of equal credit are told apart by what they are, not by where they stand
        order = name.argsort()[advantage[name.argsort()].argsort(stable=True)]
        kept = torch.zeros_like(advantage)
        kept[order[widest(advantage[order], count)]] = 1.0
        return advantage * kept


def widest(values: Tensor, count: int) -> Tensor:
    """(count,) places in ascending `values` (N,) of the subset of that size with the largest variance."""
    zero = values.new_zeros(1)
    sums, squares = (torch.cat([zero, x.cumsum(0)]) for x in (values, values**2))
    low = torch.arange(count + 1, device=values.device)
    high = len(values) - (count - low)  # the first of the upper part
    mean = (sums[low] + sums[-1] - sums[high]) / count
    variance = (squares[low] + squares[-1] - squares[high]) / count - mean**2
    best = int(variance.argmax())
    return torch.cat([torch.arange(best), torch.arange(len(values) - (count - best), len(values))]).to(values.device)
