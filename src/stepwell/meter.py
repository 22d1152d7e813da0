"""What was spent, in every unit separately: the first thing a comparison has to hold equal."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field, fields
from typing import Any


@dataclass(frozen=True)
class Cost:
    """An amount in every unit.

    `model_evaluations`: one a row and network call. `forward`, `backward`: tokens or latents sent through the
    network, padding not counted. `reward_calls`: one a row and reward function. `wall_time`: seconds.
    """

    model_evaluations: int = 0
    forward: int = 0
    backward: int = 0
    reward_calls: int = 0
    constraint_checks: int = 0
    wall_time: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Cost)))

    def __sub__(self, other: Cost) -> Cost:
        return Cost(*(getattr(self, f.name) - getattr(other, f.name) for f in fields(Cost)))


@dataclass
class Meter:
    """Counts what a process and its rewards spend; one of the few places that hold mutable state."""

    spent: Cost = field(default_factory=Cost)
    _since: float = field(default_factory=time.monotonic)

    def add(self, **amounts: int) -> None:
        """Add whole amounts to units by name; an unknown unit is an error."""
        self.spent = self.spent + Cost(**amounts)

    def read(self) -> Cost:
        """All that was spent so far, with the seconds since the meter was made or resumed."""
        return self.spent + Cost(wall_time=time.monotonic() - self._since)

    def state_dict(self) -> dict[str, Any]:
        return asdict(self.read())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.spent, self._since = Cost(**state), time.monotonic()
