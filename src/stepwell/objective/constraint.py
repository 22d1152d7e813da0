"""Constraints on the mean of a reward, kept by a price that rises while they are broken."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from stepwell.batch import Batch
from stepwell.objective.state import Coefficient, Multiplier, value_of
from stepwell.objective.term import Loss, Term
from stepwell.parts import Part
from stepwell.tensors import Tensor


@dataclass(frozen=True)
class Priced(Part):
    """price * part, with the price at the moment when credit is given."""

    part: Part
    price: Coefficient = field(default_factory=lambda: Multiplier("price"))

    @property
    def compares(self) -> bool:
        return self.part.compares

    def __call__(self, batch: Batch) -> Tensor:
        return value_of(self.price, batch) * self.part(batch)


@dataclass(frozen=True)
class Watch(Term):
    """No loss: the mean of a part over the rows, as a metric that coefficients may follow."""

    part: Part
    name: str
    coefficient: float | Coefficient = 1.0

    def credit(self, batch: Batch) -> dict[str, Tensor]:
        return {"watched": self.part(batch)}

    def loss(self, batch: Batch, targets: Mapping[str, Tensor]) -> Loss:
        return Loss(0.0 * batch.log_prob.sum(), {self.name: targets["watched"].sum() / batch.counts.rows})
