"""Pairs of rows whose steps count by their values: a chosen row's best steps most, a rejected row's worst."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from stepwell.batch import Batch, Read
from stepwell.credit.prefixes import StepValues
from stepwell.objective.preference.pairs import Pairing, log_ratio, pairs_of
from stepwell.objective.reduction import total
from stepwell.objective.state import Coefficient, value_of
from stepwell.objective.term import Coupling, Loss, Term
from stepwell.parts import Part
from stepwell.ranges import NotNegative, Positive
from stepwell.tensors import Tensor, functional, torch


@dataclass(frozen=True)
class StepPairs(Term):
    """-coefficient * the mean over pairs (i, j) of w_ij (sum_t a_it log pi_it - sum_t b_jt log pi_jt).

    w, a and b are constants. w_ij = sigmoid(beta (sum_t d_jt - sum_t d_it)), d = log pi - log reference, is a pair's
    weight in DPO. In place of DPO's beta for every step, a_it = sigmoid(-rate d_it) softmax_t(temperature s_it) for the
    chosen row and b_jt = sigmoid(rate d_jt) softmax_t(-temperature s_jt) for the rejected, over the row's trained
    steps, s being the `values` (N, T) of steps. At rate = temperature = 0 a row of n steps has 1 / (2 n) for each: the
    slope is that of `Pairs` with `Logistic(beta)`, over 2 beta n.

    This is a rule for the gradient and not the gradient of an objective; the `pair_loss` that is logged is DPO's.

    Source: Full-Step-DPO, arXiv 2502.14356, as in the authors' code.
    """

    values: Part = field(default_factory=StepValues)
    beta: Positive = 0.05
    temperature: NotNegative = 0.5
    rate: NotNegative = 1.0
    pairing: Pairing = field(default_factory=lambda: Pairing("all"))
    coefficient: float | Coefficient = 1.0
    coupling: Coupling = "groups"
    reads = frozenset({Read("reference", "log_prob")})

    def credit(self, batch: Batch) -> dict[str, Tensor]:
        worth = self.temperature * self.values(batch)
        return {
            "sides": self.pairing(batch),
            "rises": _shares(worth, batch.rows.mask),
            "falls": _shares(-worth, batch.rows.mask),
        }

    def plan(self, batch: Batch, targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
        chosen, _ = pairs_of(batch.reward, self.pairing.group(batch)[0], targets["sides"])
        return {"share": torch.full_like(batch.reward, 1.0 / max(len(chosen), 1))}

    def loss(self, batch: Batch, targets: Mapping[str, Tensor]) -> Loss:
        chosen, rejected = pairs_of(batch.reward, self.pairing.group(batch)[0], targets["sides"])
        with torch.no_grad():
            share, gap = targets["share"][chosen], log_ratio(batch, "reference")
            score = batch.row_sum(gap)[:, 0]
            margin = self.beta * (score[chosen] - score[rejected])
            weight, none = share * torch.sigmoid(-margin), torch.zeros_like(score)
            wins, losses = none.index_add(0, chosen, weight), none.index_add(0, rejected, weight)
            rise = wins[:, None] * torch.sigmoid(-self.rate * gap) * targets["rises"]
            fall = losses[:, None] * torch.sigmoid(self.rate * gap) * targets["falls"]
        value = value_of(self.coefficient, batch) * total(batch.log_prob, fall - rise)
        metrics = {
            "pair_loss": -(functional.logsigmoid(margin) * share).sum(),
            "pair_accuracy": ((margin > 0).to(margin.dtype) * share).sum(),
            "pair_score": (0.5 * (score[chosen] + score[rejected]) * share).sum(),
        }
        return Loss(value, metrics)


def _shares(logits: Tensor, mask: Tensor) -> Tensor:
    """(N, T) softmax over each row's trained steps, 0 for the others."""
    return torch.where(mask, logits.masked_fill(~mask, -torch.inf).softmax(1), 0.0)
