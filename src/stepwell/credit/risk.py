"""Credit for objectives other than the mean: quantiles of the rewards of a batch."""

from __future__ import annotations

from dataclasses import dataclass, field

from stepwell.batch import Batch
from stepwell.credit.group import group_index, group_sum
from stepwell.credit.shaping import Outcome
from stepwell.errors import InputError
from stepwell.parts import Part
from stepwell.ranges import NotNegative, Portion, Size
from stepwell.tensors import Tensor, torch


def tail_credit(values: Tensor, quantile: Tensor | float, level: float) -> Tensor:
    """-(q - X)^+ / a: its expected score is the gradient of the mean of the lowest share a, CVaR."""
    return -(quantile - values).clamp(min=0) / level


def range_credit(values: Tensor, low: Tensor | float, high: Tensor | float, levels: tuple[float, float]) -> Tensor:
    """(clip(X, q_a, q_b) - q_b) / (b - a): its expected score is the gradient of the mean between two quantiles."""
    return (torch.minimum(torch.maximum(values, torch.as_tensor(low)), torch.as_tensor(high)) - high) / (
        levels[1] - levels[0]
    )


@dataclass(frozen=True)
class MixedRisk(Part):
    """Mixed value at risk (N,): (w tail + range) / (w + 1) with the batch's quantiles a and b of the bundles' rewards.

    tail = -(q_a - X)^+ / a and range = (clip(X, q_a, q_b) - q_b) / (b - a). `bundle` prompts make one question: X is
    the sum of the j-th rewards of each, and each of these rows is credited with it. `epsilon`: divide by the batch's
    deviation of the credit plus this, as the authors' code does; None leaves it. All credits are at most 0.

    Source: RiskPO, arXiv 2510.00911.
    """

    low: Portion = 0.1
    high: Portion = 0.9
    weight: NotNegative = 1.5
    bundle: Size = 1
    epsilon: NotNegative | None = 1e-6
    reward: Part = field(default_factory=Outcome)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.low < self.high:
            raise InputError(f"MixedRisk.low must be below high = {self.high}, got {self.low}.")

    def __call__(self, batch: Batch) -> Tensor:
        earned = self._bundled(batch, self.reward(batch))
        levels = torch.tensor([self.low, self.high], dtype=earned.dtype, device=earned.device)
        low, high = torch.quantile(earned, levels)
        tail = tail_credit(earned, low, self.low)
        credit = (self.weight * tail + range_credit(earned, low, high, (self.low, self.high))) / (self.weight + 1)
        return credit if self.epsilon is None else credit / (credit.std(correction=0) + self.epsilon)

    def _bundled(self, batch: Batch, reward: Tensor) -> Tensor:
        """(N,) the sum of the j-th rewards of the prompts in each row's bundle; rows are counted in drawing order."""
        if self.bundle == 1:
            return reward
        prompt, _ = group_index(batch.rows.prompt)
        drawn = batch.rows.node.amax(1)
        before = ((prompt[:, None] == prompt) & (drawn < drawn[:, None])).sum(1)
        question, questions = group_index(torch.stack([prompt // self.bundle, before], 1))
        return group_sum(reward, question, questions)
