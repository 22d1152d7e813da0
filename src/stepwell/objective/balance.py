"""GFlowNet losses: trajectories in balance with a reward, with or without a learned partition function."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from stepwell.batch import Batch, Read
from stepwell.credit.group import group_index, group_sum
from stepwell.credit.shaping import Outcome
from stepwell.objective.preference.pairs import SequenceScore
from stepwell.objective.state import Coefficient, LogPartition, value_of
from stepwell.objective.term import Loss, Term
from stepwell.parts import Part
from stepwell.ranges import NotNegative
from stepwell.tensors import Tensor, torch


@dataclass(frozen=True)
class TrajectoryBalance(Term):
    """The mean over rows of (log Z + log P_F - log P_B - log R)^2 / 2 (Malkin et al. 2022, arXiv 2201.13259).

    The score is log P_F - log P_B: for text, whose backward policy is certain, the sum of log-probabilities, against
    the reference where the target is ref exp(reward). `log_reward` is log R. partition: `learned`, a coefficient with
    its own gradient step of size `rate`; `group` (VarGrad), the mean of log R - score over the prompt's rows under the
    present parameters, whose gradient is the same whether it passes through that mean or not.
    """

    log_reward: Part = field(default_factory=Outcome)
    score: Part = field(default_factory=SequenceScore)
    partition: Literal["learned", "group"] = "learned"
    log_partition: LogPartition = field(default_factory=lambda: LogPartition("log_partition"))
    coefficient: float | Coefficient = 1.0

    @property
    def present(self) -> frozenset[str]:
        return frozenset({"log_prob"} if self.partition == "group" else ())

    def credit(self, batch: Batch) -> dict[str, Tensor]:
        return {"log_reward": self.log_reward(batch)}

    def plan(self, batch: Batch, targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self.partition == "learned":
            return {}
        group, groups = group_index(batch.rows.prompt)
        missing = targets["log_reward"] - self.score(batch)
        return {"log_partition": group_sum(missing, group, groups) / group_sum(torch.ones_like(missing), group, groups)}

    def loss(self, batch: Batch, targets: Mapping[str, Tensor]) -> Loss:
        log_partition = targets["log_partition"] if self.partition == "group" else self.log_partition.read(batch)
        residual = log_partition + self.score(batch) - targets["log_reward"]
        value = value_of(self.coefficient, batch) * 0.5 * (residual**2).sum() / batch.counts.rows
        metrics = {"balance_loss": value.detach(), "residual": residual.detach().sum() / batch.counts.rows}
        return Loss(value, metrics)


@dataclass(frozen=True)
class SubTrajectoryBalance(Term):
    """The mean over rows of sum_{i<j} w_ij (log F_i + sum_{i<=t<j} d_t - log F_j)^2, w_ij = lam^(j-i-1) / sum.

    log F_t is the value head's estimate before step t and log R at the end; d_t = log pi - log ref or log pi alone.
    lam -> 0 is detailed balance, lam -> infinity trajectory balance with log Z = log F_0. Rows must be complete.
    """

    lam: NotNegative = 1.0
    log_reward: Part = field(default_factory=Outcome)
    against: Literal["reference", "none"] = "reference"
    coefficient: float | Coefficient = 1.0
    needs = frozenset({"value"})

    @property
    def reads(self) -> frozenset[Read]:
        return frozenset({Read("reference", "log_prob")} if self.against == "reference" else ())

    def credit(self, batch: Batch) -> dict[str, Tensor]:
        return {"log_reward": self.log_reward(batch)}

    def loss(self, batch: Batch, targets: Mapping[str, Tensor]) -> Loss:
        mask = batch.mask
        number = mask.sum(1).long()
        order = (-mask).argsort(dim=1, stable=True)  # trained steps first, in their order
        step = batch.log_prob - (batch.reference if self.against == "reference" else 0.0)
        step, flow = (x.gather(1, order) for x in (step * mask, batch.present("value") * mask))
        place = torch.arange(mask.shape[1] + 1, device=mask.device)
        flow = torch.cat([flow, torch.zeros_like(flow[:, :1])], 1)
        flow = torch.where(place == number[:, None], targets["log_reward"][:, None], flow)
        level = flow - torch.cat([torch.zeros_like(step[:, :1]), step.cumsum(1)], 1)
        gap = place - place[:, None]
        weight = torch.where(gap > 0, self.lam ** (gap - 1).clamp(min=0).to(mask.dtype), 0.0)
        weight = weight * (place <= number[:, None])[:, None, :]
        squares = (level[:, :, None] - level[:, None, :]) ** 2
        rows = (squares * weight).sum((1, 2)) / weight.sum((1, 2)).clamp(min=1e-30)
        value = value_of(self.coefficient, batch) * rows.sum() / batch.counts.rows
        return Loss(value, {"balance_loss": value.detach()})
