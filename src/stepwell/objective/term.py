"""An objective is a sum of terms; each term plans on a whole batch and is differentiable on any part of it."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from stepwell.batch import Batch, Read
from stepwell.columns import Columns
from stepwell.objective.state import Coefficient
from stepwell.parts import Node, declared, parts_of
from stepwell.process.models import Models
from stepwell.rng import Rng
from stepwell.tensors import Tensor, torch
from stepwell.trajectories import Trajectories

Coupling = Literal["rows", "groups", "batch"]


@dataclass(frozen=True)
class Loss:
    """A loss and what to log, both sums that are already divided by the global counts: parts of a batch add up."""

    value: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)

    def __add__(self, other: Loss) -> Loss:
        metrics = dict(self.metrics)
        for name, value in other.metrics.items():
            metrics[name] = metrics[name] + value if name in metrics else value
        return Loss(self.value + other.value, metrics)


class Term(Node, ABC):
    """One summand of an objective, a frozen dataclass with a `coefficient`.

    `draw(rows, models, rng)` draws what a loss needs beyond the rollout, once for it: entries of `rows.points`.
    `credit(batch)` and `plan(batch, targets)` see the whole batch without a gradient and give (N,) or (N, T)
    targets; `loss(batch, targets)` sees any part of it. `coupling` says which rows a loss must see together:
    none (`rows`), those of a prompt (`groups`), or all (`batch`).
    """

    coefficient: float | Coefficient
    coupling: Coupling = "rows"

    def draw(self, rows: Trajectories, models: Models, rng: Rng) -> dict[str, Tensor]:
        """Entries (N, ...) drawn at random for each row: noised points, depths of backpropagation."""
        return {}

    def credit(self, batch: Batch) -> dict[str, Tensor]:
        """Targets that hold for the whole rollout: advantages, pairs, residuals."""
        return {}

    def plan(self, batch: Batch, targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Targets that hold for one minibatch: reduction weights and gates."""
        return {}

    @abstractmethod
    def loss(self, batch: Batch, targets: Mapping[str, Tensor]) -> Loss:
        """The loss of the rows given, as their share of the whole minibatch's."""

    def __add__(self, other: Term | Objective) -> Objective:
        return Objective((self,)) + other

    def __mul__(self, factor: float) -> Self:
        if isinstance(self.coefficient, Coefficient):
            raise TypeError(
                f"{type(self).__name__}.coefficient must be a number to be multiplied by {factor}, got the coefficient "
                f"'{self.coefficient.name}', which changes as training goes on."
            )
        return dataclasses.replace(self, coefficient=self.coefficient * factor)  # type: ignore[type-var]

    __rmul__ = __mul__


@dataclass(frozen=True)
class Objective:
    """A sum of terms, in two phases.

    `credit` (once a rollout) and `plan` (once a minibatch, after `credit`) take the whole batch and no gradient;
    `loss` takes any rows of the minibatch with their targets. Summed over any split of the rows the losses and
    their gradients are those of the whole, for terms whose coupling allows the split.
    """

    terms: tuple[Term, ...]

    def __add__(self, other: Term | Objective) -> Objective:
        return Objective(self.terms + (other.terms if isinstance(other, Objective) else (other,)))

    def __mul__(self, factor: float) -> Objective:
        return Objective(tuple(term * factor for term in self.terms))

    __rmul__ = __mul__

    def draw(self, rows: Trajectories, models: Models, rng: Rng) -> Trajectories:
        """The rows with the points that the terms draw for them; of one name, the first term's."""
        points: dict[str, Tensor] = {}
        for key, term in self._named():
            points = {**term.draw(rows, models, rng.split("draw", key)), **points}
        return rows.replace(points=Columns(points, len(rows))) if points else rows

    @property
    def needs(self) -> frozenset[str]:
        """Scores to compute with a gradient in the loss."""
        return declared(self.terms, lambda node: node.needs)

    @property
    def reads(self) -> frozenset[Read]:
        """Fields of the rows to fill before credit is given."""
        return declared(self.terms, lambda node: node.reads)

    @property
    def present(self) -> frozenset[str]:
        """Scores of the whole minibatch that planning reads."""
        return declared(self.terms, lambda node: node.present)

    @property
    def plans_on_scores(self) -> bool:
        """True where planning reads the present policy: it is done anew before every update, after one more forward."""
        nodes = (part for part in parts_of(self.terms) if isinstance(part, Node))
        return bool(self.present) or any(node.when == "minibatch" for node in nodes)

    @property
    def coupling(self) -> Coupling:
        """The closest coupling of any term."""
        kinds = {term.coupling for term in self.terms}
        return "batch" if "batch" in kinds else "groups" if "groups" in kinds else "rows"

    @property
    def states(self) -> dict[str, Coefficient]:
        """The coefficients that change as training goes on, by name."""
        return {part.name: part for part in parts_of(self.terms) if isinstance(part, Coefficient)}

    def credit(self, batch: Batch) -> Columns:
        """Targets of the whole rollout, one entry a term."""
        return self._targets(batch, lambda term, key: term.credit(batch))

    def plan(self, batch: Batch, targets: Columns | None = None) -> Columns:
        """Targets of a whole minibatch; `targets` are its rows of what `credit` gave for the rollout."""
        given = self.credit(batch) if targets is None else targets
        return self._targets(batch, lambda term, key: {**given[key], **term.plan(batch, given[key])})

    def loss(self, batch: Batch, targets: Columns) -> Loss:
        """The sum of the terms' losses of the rows given."""
        losses = [term.loss(batch, targets[key]) for key, term in self._named()]
        total = losses[0]
        for loss in losses[1:]:
            total = total + loss
        return total

    def _targets(self, batch: Batch, give: Callable[[Term, str], Mapping[str, Any]]) -> Columns:
        with torch.no_grad():
            entries = {key: Columns(dict(give(term, key)), len(batch)) for key, term in self._named()}
        return Columns(entries, len(batch))

    def _named(self) -> list[tuple[str, Term]]:
        return [(str(place), term) for place, term in enumerate(self.terms)]
