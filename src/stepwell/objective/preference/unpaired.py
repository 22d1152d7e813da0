"""Preference losses of rows judged one by one (KTO), and of pairs that rejection sampling keeps (RSO)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated

from stepwell.batch import Batch
from stepwell.objective.preference.pairs import Pairing, Pairs, SequenceScore
from stepwell.objective.state import Coefficient, value_of
from stepwell.objective.term import Loss, Term
from stepwell.parts import Part
from stepwell.process.models import Models
from stepwell.ranges import NotNegative, Positive, Range
from stepwell.rng import Rng
from stepwell.tensors import Tensor, torch
from stepwell.trajectories import Trajectories


@dataclass(frozen=True)
class Prospect(Term):
    """KTO: the mean over rows of w (1 - sigmoid(+-beta (s - z))), + for rows with a reward above `threshold`.

    z = max(0, the mean of s over the minibatch) is the policy's divergence from the reference, on policy without
    bias. The paper and TRL, whose rows are not the policy's own, estimate it on mismatched prompts and answers
    instead. Without `centred` z is 0 (TRL's apo_zero_unpaired). Source: Ethayarajh et al. 2024, arXiv 2402.01306.
    """

    beta: Positive = 0.1
    desirable: NotNegative = 1.0
    undesirable: NotNegative = 1.0
    threshold: float = 0.5
    centred: bool = True
    score: Part = field(default_factory=SequenceScore)
    coefficient: float | Coefficient = 1.0
    rewarded = True

    @property
    def present(self) -> frozenset[str]:
        return frozenset({"log_prob"} if self.centred else ())

    def plan(self, batch: Batch, targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
        good = batch.reward > self.threshold
        center = self.score(batch).mean().clamp(min=0) if self.centred else torch.zeros_like(batch.reward).sum()
        one = torch.ones_like(batch.reward)
        sign, weight = torch.where(good, one, -one), torch.where(good, self.desirable * one, self.undesirable * one)
        return {"sign": sign, "row_weight": weight, "center": center.expand(len(batch)).clone()}

    def loss(self, batch: Batch, targets: Mapping[str, Tensor]) -> Loss:
        gain = torch.sigmoid(self.beta * targets["sign"] * (self.score(batch) - targets["center"]))
        value = value_of(self.coefficient, batch) * (targets["row_weight"] * (1 - gain)).sum() / batch.counts.rows
        center = targets["center"].sum() / batch.counts.rows
        return Loss(value, {"prospect_loss": value.detach(), "reference_point": center})


def accepted(reward: Sequence[float], beta: float, keep: int, rng: Rng) -> list[int]:
    """The candidates that statistical rejection sampling keeps, in the order in which it accepts them.

    Pass by pass over those that are left, in their order, each is accepted with probability exp((r - max) / beta),
    max the largest reward among those left as the pass began, until `keep` are. Were the maximum that of all
    sequences, those accepted in the first pass would be draws from pi exp(r / beta) / Z.
    """
    left = list(range(len(reward)))
    kept: list[int] = []
    while left and len(kept) < keep:
        top = max(reward[i] for i in left)
        taken = []
        for i in left:
            chance = torch.tensor(math.exp((reward[i] - top) / beta), dtype=torch.float64)
            if len(kept) < keep and bool(rng.bernoulli(chance)):
                kept.append(i)
                taken.append(i)
        left = [i for i in left if i not in taken]
    return kept


@dataclass(frozen=True)
class RejectionPairs(Pairs):
    """Pairs among the `keep` rows of each group that statistical rejection sampling accepts at `temperature`.

    Source: RSO, Liu et al. 2023, arXiv 2309.06657, section 3 and its algorithm.
    """

    pairing: Pairing = field(default_factory=lambda: Pairing("all"))
    temperature: Positive = 0.5
    keep: Annotated[int, Range("a whole number, at least 2", 2, whole=True)] = 4

    def draw(self, rows: Trajectories, models: Models, rng: Rng) -> dict[str, Tensor]:
        assert rows.reward is not None
        kept = torch.zeros(len(rows), dtype=torch.bool, device=rows.reward.device)
        for prompt in rows.prompt.unique().tolist():
            index = (rows.prompt == prompt).nonzero()[:, 0]
            kept[index[accepted(rows.reward[index].tolist(), self.temperature, self.keep, rng.split(prompt))]] = True
        return {"kept": kept}

    def credit(self, batch: Batch) -> dict[str, Tensor]:
        return {"sides": self.pairing(batch) & batch.field("kept")[:, None]}
