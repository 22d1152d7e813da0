"""Regularisers: divergence estimates and the exact divergence from a reference, and the entropy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from stepwell.batch import Batch, Read
from stepwell.errors import InputError
from stepwell.objective.gates.step import Gate
from stepwell.objective.ratio import Ratio
from stepwell.objective.reduction import Reduction, total
from stepwell.objective.state import Coefficient, value_of
from stepwell.objective.term import Loss, Term
from stepwell.parts import Part, column, parts_of
from stepwell.tensors import Tensor, torch

Estimate = Literal["k1", "k2", "k3", "abs", "k3-weighted", "k1+", "k3+", "exact"]


@dataclass(frozen=True)
class Divergence(Part):
    """An estimate of KL(pi || other) per step, (N, T), with d = log pi - log other.

    k1 = d; k2 = d^2/2; k3 = exp(-d) - 1 + d; abs = |d|; `k3-weighted` = r k3, with the gradient of both, r the `ratio`
    (TRL; pi / old of the token unless given); `k1+` and `k3+` have the value of k1 and k3 with the gradient of k2
    (verl); `exact` sums over all actions. `bounds` are those of |d| in k3 and of k3 itself (verl).

    On policy, as a per-step loss, the expected gradient is zero for k1, the reverse KL's of each state for k2,
    k3-weighted, k1+, k3+ and exact, and the *forward* KL's for k3; none is the gradient of the KL of whole sequences.
    level `sequence` applies the estimate to the row's sum of d and spreads it evenly over its steps: with k2 and
    reduction `row-sum` that is the exact gradient of the sequence KL.
    """

    estimate: Estimate = "k3"
    other: Literal["reference", "old"] = "reference"
    level: Literal["token", "sequence"] = "token"
    ratio: Ratio = field(default_factory=Ratio)
    bounds: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.estimate == "exact" and (self.other, self.level) != ("reference", "token"):
            raise InputError(
                "Divergence.estimate 'exact' compares each step's distribution with the reference's; other must be "
                f"reference and level must be token, got {self.other} and {self.level}."
            )
        for name, value, default, uses in (
            ("ratio", self.ratio, Ratio(), ("k3-weighted",)),
            ("bounds", self.bounds, None, ("k3", "k3+", "k3-weighted")),
        ):
            if value != default and self.estimate not in uses:
                raise InputError(
                    f"Divergence.{name} must be left out for the estimate {self.estimate}; it is used by "
                    f"{', '.join(uses)}."
                )

    @property
    def reads(self) -> frozenset[Read]:
        sampled = self.estimate != "exact" and self.other == "reference"
        return frozenset({Read("reference", "log_prob")} if sampled else ())

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"kl"} if self.estimate == "exact" else ())

    def __call__(self, batch: Batch) -> Tensor:
        if self.estimate == "exact":
            return batch.present("kl")
        d = (batch.log_prob - (batch.reference if self.other == "reference" else batch.old)) * batch.mask
        log_ratio = self.ratio(batch) if self.estimate == "k3-weighted" else torch.zeros_like(d)
        if self.level == "sequence":
            d, log_ratio = d.sum(1, keepdim=True), log_ratio.sum(1, keepdim=True)
        k2, k3 = 0.5 * d**2, self._k3(d)
        estimates = {
            "k1": lambda: d,
            "k2": lambda: k2,
            "k3": lambda: k3,
            "abs": lambda: d.abs(),
            "k3-weighted": lambda: log_ratio.exp() * k3,
            "k1+": lambda: d.detach() + k2 - k2.detach(),
            "k3+": lambda: k3.detach() + k2 - k2.detach(),
        }
        value = estimates[self.estimate]()
        return (value / batch.steps).expand_as(batch.mask) if self.level == "sequence" else value

    def _k3(self, d: Tensor) -> Tensor:
        if self.bounds is None:
            return torch.exp(-d) - 1 + d
        d = d.clamp(-self.bounds[0], self.bounds[0])
        return (torch.exp(-d) - 1 + d).clamp(-self.bounds[1], self.bounds[1])


@dataclass(frozen=True)
class Entropy(Part):
    """The entropy of each step's distribution, (N, T)."""

    needs = frozenset({"entropy"})

    def __call__(self, batch: Batch) -> Tensor:
        return batch.present("entropy")


@dataclass(frozen=True)
class Regulariser(Term):
    """coefficient * sum_it W_it quantity_it gate_it, with its own reduction and its own gates.

    `credit_of` is the advantage that its gates read, 0 where there is none; the quantity itself is not multiplied by
    it. `kept_only`: the weights are divided by the share of the steps that the gates keep, so that a mean over all
    steps is one over those kept.
    """

    quantity: Part = field(default_factory=Divergence)
    coefficient: float | Coefficient = 0.04
    reduction: Part = field(default_factory=Reduction)
    gates: tuple[Gate, ...] = ()
    name: str = "kl"
    credit_of: Part | None = None
    kept_only: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        diverges = any(isinstance(part, Divergence) for part in parts_of(self.quantity))
        if diverges and not isinstance(self.coefficient, Coefficient) and self.coefficient < 0:
            raise InputError(
                f"Regulariser.coefficient of a divergence must be 0 or more, got {self.coefficient}, which would drive "
                "the policy away."
            )

    def credit(self, batch: Batch) -> dict[str, Tensor]:
        if self.credit_of is None:
            return {}
        return {"advantage": (column(self.credit_of(batch)) * batch.mask).contiguous()}

    def plan(self, batch: Batch, targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
        weight, kept = self.reduction(batch), batch.mask
        advantage = targets["advantage"] if self.credit_of is not None else torch.zeros_like(batch.mask)
        for gate in self.gates:
            kept = kept * gate(batch, None, advantage)
        weight = weight * kept
        return {"weight": weight * (batch.mask.sum() / kept.sum().clamp(min=1)) if self.kept_only else weight}

    def loss(self, batch: Batch, targets: Mapping[str, Tensor]) -> Loss:
        quantity = self.quantity(batch)
        value = value_of(self.coefficient, batch) * total(quantity, targets["weight"])
        mean = (quantity.detach() * batch.mask / batch.counts.steps).sum()
        return Loss(value, {self.name: mean})


def entropy_bonus(coefficient: float = 0.01, gates: tuple[Gate, ...] = ()) -> Regulariser:
    """-coefficient * the mean of the entropy over all steps, or over those that `gates` keep."""
    return Regulariser(Entropy(), -coefficient, gates=gates, name="entropy", kept_only=bool(gates))
