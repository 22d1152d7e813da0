"""The critic's loss: the value head against the returns that credit was computed from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from stepwell.batch import Batch
from stepwell.credit.traces import GeneralisedAdvantage
from stepwell.objective.reduction import Reduction, total
from stepwell.objective.state import Coefficient, value_of
from stepwell.objective.term import Loss, Term
from stepwell.parts import Part
from stepwell.ranges import NotNegative, Width
from stepwell.tensors import Tensor, torch


@dataclass(frozen=True)
class ValueLoss(Term):
    """coefficient * mean of max((V - G)^2, (clip(V, V_old -+ clip) - G)^2) / 2, with returns G = A + V_old.

    A is the estimator's advantage before any whitening; without `clip` it is the plain squared error.
    """

    estimator: GeneralisedAdvantage = field(default_factory=GeneralisedAdvantage)
    clip: Width | None = 0.2
    reduction: Part = field(default_factory=Reduction)
    coefficient: NotNegative | Coefficient = 0.1
    needs = frozenset({"value"})

    def credit(self, batch: Batch) -> dict[str, Tensor]:
        old = batch.field("value")
        return {"returns": (self.estimator(batch) + old) * batch.mask, "old_value": old}

    def plan(self, batch: Batch, targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"weight": self.reduction(batch)}

    def loss(self, batch: Batch, targets: Mapping[str, Tensor]) -> Loss:
        value, old, returns = batch.present("value"), targets["old_value"], targets["returns"]
        error = (value - returns) ** 2
        if self.clip is not None:
            near = old + (value - old).clamp(-self.clip, self.clip)
            error = torch.maximum(error, (near - returns) ** 2)
        loss = value_of(self.coefficient, batch) * total(0.5 * error, targets["weight"])
        return Loss(loss, {"value_loss": loss.detach()})
