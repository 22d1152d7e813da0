"""Credit where others wrote some of the rows: all are compared with the policy's own."""

from __future__ import annotations

from dataclasses import dataclass, field

from stepwell.batch import Batch
from stepwell.credit.group import group_index, group_sum
from stepwell.credit.shaping import Outcome
from stepwell.parts import Part
from stepwell.ranges import NotNegative
from stepwell.tensors import Tensor, torch


@dataclass(frozen=True)
class AgainstOwn(Part):
    """A_i = (R_i - mean) / std (N,), both of the prompt's rows of source 0; std is 1 where those are all equal.

    Other rows have no part in the statistics, so that a demonstration does not take credit from the policy's own
    samples. A prompt with fewer than two own rows gives 0. Source: RL-PLUS, as in the authors' code.
    """

    epsilon: NotNegative = 1e-6
    reward: Part = field(default_factory=Outcome)
    compares = True

    def __call__(self, batch: Batch) -> Tensor:
        reward = self.reward(batch)
        own = (batch.rows.source == 0).to(reward.dtype)
        group, groups = group_index(batch.rows.prompt)
        size = group_sum(own, group, groups)
        lowest = reward.new_full((groups,), torch.inf)
        lowest = lowest.scatter_reduce(0, group, reward.masked_fill(own == 0, torch.inf), "amin")[group]
        above = torch.where(lowest < torch.inf, reward - lowest, 0.0)  # exactly 0 for own rows that are all equal
        mean = group_sum(own * above, group, groups) / size.clamp(min=1)
        squares = group_sum(own * (above - mean) ** 2, group, groups)
        deviation = (squares / (size - 1).clamp(min=1)).sqrt()
        scaled = (above - mean) / torch.where(squares > 0, deviation + self.epsilon, 1.0)
        return torch.where(size > 1, scaled, 0.0)
