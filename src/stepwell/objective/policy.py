"""The policy-gradient term, composed of credit, ratio, surrogate, gates and a reduction."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from stepwell.batch import Batch
from stepwell.credit.group import GroupCredit
from stepwell.errors import InputError
from stepwell.objective.gates.step import Gate
from stepwell.objective.ratio import Ratio
from stepwell.objective.reduction import Reduction, total
from stepwell.objective.state import Coefficient, value_of
from stepwell.objective.surrogate import Clip, Surrogate
from stepwell.objective.term import Loss, Term
from stepwell.parts import Part, column
from stepwell.tensors import Tensor, torch
from stepwell.writing import describe


@dataclass(frozen=True)
class Policy(Term):
    """coefficient * sum_it W_it surrogate(log r_it, A_it) gate_it, over rows i and their steps t.

    A is the credit, W the reduction's weight. The two are kept apart on purpose: thresholds of gates and clips are in
    the units of A, and multiplying W into A would change them.
    """

    credit_of: Part = field(default_factory=GroupCredit)
    ratio: Ratio = field(default_factory=Ratio)
    surrogate: Surrogate = field(default_factory=Clip)
    gates: tuple[Gate, ...] = ()
    reduction: Part = field(default_factory=Reduction)
    coefficient: float | Coefficient = 1.0

    def credit(self, batch: Batch) -> dict[str, Tensor]:
        advantage: Any = self.credit_of(batch)
        rows, steps = batch.mask.shape
        if not isinstance(advantage, Tensor) or advantage.shape not in ((rows,), (rows, 1), (rows, steps)):
            found = f"shape {tuple(advantage.shape)}" if isinstance(advantage, Tensor) else f"{advantage!r:.40}"
            raise InputError(
                f"Policy.credit_of ({describe(self.credit_of):.60}) must return a tensor (N,) or (N, T), here "
                f"({rows},) or ({rows}, {steps}), got {found}."
            )
        advantage = column(advantage).expand_as(batch.mask)
        return {"advantage": (advantage * batch.mask).contiguous()}

    def plan(self, batch: Batch, targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
        advantage, weight = targets["advantage"], self.reduction(batch)
        for gate in self.gates:
            if gate.when != "step":
                log_ratio = self.ratio(batch, advantage) if gate.when == "minibatch" else None
                weight = weight * gate(batch, log_ratio, advantage)
        return {"weight": weight}

    def loss(self, batch: Batch, targets: Mapping[str, Tensor]) -> Loss:
        advantage, weight = targets["advantage"], targets["weight"]
        log_ratio = self.ratio(batch, advantage)
        with torch.no_grad():
            for gate in self.gates:
                if gate.when == "step":
                    weight = weight * gate(batch, log_ratio, advantage)
        value = value_of(self.coefficient, batch) * total(self.surrogate(log_ratio, advantage, batch), weight)
        with torch.no_grad():
            share = batch.mask / batch.counts.steps
            difference = (batch.old - batch.log_prob) * batch.mask  # its mean under the old policy is KL(old || pi)
            metrics = {
                "policy_loss": value.detach(),
                "clip_fraction": (self.surrogate.clipped(log_ratio, advantage) * share).sum(),
                "old_kl": ((torch.expm1(-difference) + difference) * share).sum(),
            }
        return Loss(value, metrics)
