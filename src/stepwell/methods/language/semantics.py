"""Semantics paper, trl and verl: what a paper leaves open, or a library does otherwise than it says.

The differences were read in TRL 1.16, whose functions tests run beside ours, and in verl's
`verl/trainer/ppo/core_algos.py`. `KNOWN` is the table of them, and `Semantics` says what its columns are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from stepwell.credit.group import Center, GroupCredit, Scale
from stepwell.credit.shaping import Outcome
from stepwell.errors import InputError
from stepwell.objective.ratio import Level, Ratio
from stepwell.objective.regularise import Divergence, Estimate
from stepwell.objective.surrogate import Clip
from stepwell.parts import Part


@dataclass(frozen=True)
class Semantics:
    """The parts of a policy-gradient method as one library fills them in.

    epsilon: added to a group's deviation. singleton: the advantage of a row that is alone in its group. dual: the c of
    dual-clip PPO, where it is always on. bounds: of log-ratios, without a gradient outside. estimate: of the divergence
    in the loss, weighted with the ratio or not; divergence_bounds: of the log-ratio in it, and of itself.
    """

    epsilon: float = 1e-4
    singleton: Literal["zero", "reward"] = "zero"
    dual: float | None = None
    bounds: tuple[float, float] | None = None
    estimate: Estimate = "k3"
    divergence_bounds: tuple[float, float] | None = None

    def credit(
        self, center: Center = "mean", scale: Scale = "std", reward: Part | None = None, epsilon: float = 0.0
    ) -> GroupCredit:
        """Group credit; `epsilon` 0 is the library's own."""
        outcome = Outcome() if reward is None else reward
        added = epsilon or self.epsilon
        return GroupCredit(center, scale, epsilon=added, singleton=self.singleton, reward=outcome)

    def ratio(self, level: Level = "token", mean: Literal["geometric", "product"] = "geometric") -> Ratio:
        return Ratio(level, mean, bounds=self.bounds)

    def clip(self, low: float, high: float) -> Clip:
        return Clip(low, high, dual=self.dual)

    def divergence(self) -> Divergence:
        """The divergence from the reference, in the loss."""
        return Divergence(self.estimate, bounds=self.divergence_bounds)


KNOWN = {
    "paper": Semantics(),
    "trl": Semantics(estimate="k3-weighted"),
    "verl": Semantics(1e-6, "reward", 3.0, (-20.0, 20.0), divergence_bounds=(20.0, 10.0)),
}


def semantics_of(method: str, name: str, known: str = "paper trl verl") -> Semantics:
    """The semantics by name; raises `InputError` for one that the method does not have."""
    if name not in known.split():
        raise InputError(f"The semantics of {method} must be one of {', '.join(known.split())}, got '{name}'.")
    return KNOWN[name]
