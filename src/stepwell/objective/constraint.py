"""Constraints on the mean of a reward, kept by a price that rises while they are broken."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from stepwell.objective.state import Multiplier, State, value_of
from stepwell.objective.term import Loss, Term
from stepwell.parts import Batch, Part


@dataclass(frozen=True)
class Priced(Part):
    """price * part, the price as the loop keeps it when credit is given."""

    part: Part
    price: State = field(default_factory=lambda: Multiplier("price"))

    @property
    def compares(self) -> bool:  # type: ignore[override]
        return self.part.compares

    def __call__(self, batch: Batch) -> Tensor:
        return value_of(self.price, batch) * self.part(batch)


@dataclass(frozen=True)
class Watch(Term):
    """No loss: the mean of a part over the rows, as a metric that states may follow."""

    part: Part
    name: str
    coefficient: float | State = 1.0

    def credit(self, batch: Batch) -> dict[str, Tensor]:
        return {"watched": self.part(batch)}

    def loss(self, batch: Batch, targets: Mapping[str, Tensor]) -> Loss:
        return Loss(0.0 * batch.log_prob.sum(), {self.name: targets["watched"].sum() / batch.counts.rows})
