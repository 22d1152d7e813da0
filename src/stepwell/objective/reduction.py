"""Reductions, which make one number of a loss per step: weights (N, T) from explicit global counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, assert_never

from stepwell.batch import Batch
from stepwell.credit.group import group_index, group_sum
from stepwell.parts import Part
from stepwell.ranges import Size
from stepwell.tensors import Tensor, torch

Mode = Literal["token", "row", "row-sum", "group", "fixed", "sum", "edge"]


@dataclass(frozen=True)
class Reduction(Part):
    """Weights that sum a loss per step into the minibatch's loss.

    `token`: 1 / all trained steps (DAPO). `row`: the mean over rows of each row's mean (GRPO). `row-sum`: the mean
    over rows of each row's sum. `group`: the mean over groups of each group's token mean. `fixed`: the sum over
    rows * length, a constant (Dr. GRPO); `length` defaults to the horizon of the run. `sum`: no division. `edge`: the
    mean over trained steps, one that rows share counted once.
    """

    mode: Mode = "token"
    length: Size | None = None

    def __call__(self, batch: Batch) -> Tensor:
        mask, counts = batch.mask, batch.counts
        if self.mode == "token":
            return mask / counts.steps
        if self.mode == "row":
            return mask / (batch.steps * counts.rows)
        if self.mode == "row-sum":
            return mask / counts.rows
        if self.mode == "fixed":
            return mask / (counts.rows * (self.length or counts.length))
        if self.mode == "sum":
            return mask
        if self.mode == "edge":
            _, place, shared = batch.rows.node[batch.rows.mask].unique(return_inverse=True, return_counts=True)
            weight = torch.zeros_like(mask)
            weight[batch.rows.mask] = 1 / shared[place].to(mask.dtype)
            return weight / max(len(shared), 1)
        if self.mode == "group":
            group, groups = group_index(batch.rows.prompt)
            steps = group_sum(mask.sum(1), group, groups).clamp(min=1)
            return mask / (steps[:, None] * counts.groups)
        assert_never(self.mode)


@dataclass(frozen=True)
class PerPrompt(Part):
    """The mean over prompts of the mean over rows of each row's mean, for own rows and others apart.

    A step's weight is 1 / (n_i K groups), n_i the steps of its row and K the number of the prompt's rows of its kind:
    of source 0, or not. Terms that train the one or the other then weigh alike, however many rows of each there are.
    """

    def __call__(self, batch: Batch) -> Tensor:
        kind, kinds = group_index(torch.stack([batch.rows.prompt, (batch.rows.source > 0).long()], 1))
        size = group_sum(torch.ones_like(batch.mask[:, 0]), kind, kinds)
        return batch.mask / (batch.steps * size[:, None] * batch.counts.groups)


def total(values: Tensor, weight: Tensor) -> Tensor:
    """The weighted sum of (N, T) values; a step of weight 0 counts nothing, whatever its value."""
    return torch.where(weight != 0, values, 0.0).mul(weight).sum()
