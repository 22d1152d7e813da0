"""The cost of a run in every unit separately: the first thing that a comparison has to hold equal."""

from __future__ import annotations

import operator
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from stepwell.errors import InputError


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
        return Cost(*map(operator.add, _amounts(self), _amounts(other)))

    def __sub__(self, other: Cost) -> Cost:
        return Cost(*map(operator.sub, _amounts(self), _amounts(other)))


_amounts = operator.attrgetter(*(entry.name for entry in fields(Cost)))


@dataclass
class Meter:
    """Counts what a process and its rewards spend; one of the few places that hold mutable state."""

    spent: Cost = field(default_factory=Cost)
    _since: float = field(default_factory=time.monotonic)

    def add(self, **amounts: int) -> None:
        """Add whole amounts to units by name; an unknown unit is an error."""
        self.spent = self.spent + Cost(**amounts)

    def read(self) -> Cost:
        """The cost so far, with the seconds since the meter was made or resumed."""
        return self.spent + Cost(wall_time=time.monotonic() - self._since)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Count nothing that is spent inside, time included: evaluation is not part of a comparison."""
        spent, begin = self.spent, time.monotonic()
        try:
            yield
        finally:
            self.spent, self._since = spent, self._since + time.monotonic() - begin

    def state_dict(self) -> dict[str, Any]:
        return asdict(self.read())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.spent, self._since = Cost(**state), time.monotonic()


UNITS = {"seconds": "wall_time", "tokens": "", "evaluations": "model_evaluations", "reward-calls": "reward_calls"}
_SCALES = {"": 1.0, "k": 1e3, "M": 1e6, "B": 1e9}
_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0}


@dataclass(frozen=True)
class Budget:
    """The most that may be spent, in one unit: seconds, tokens (forward and backward), evaluations, ..., steps.

    Example:
        >>> Budget.parse("2M-tokens")
        Budget(amount=2000000.0, unit='tokens')
        >>> Budget.parse("5m").amount
        300.0
        >>> str(Budget.parse("2M-tokens")), str(Budget.parse("0.5s"))
        ('2,000,000 tokens', '0.5 seconds')
    """

    amount: float
    unit: str

    @classmethod
    def parse(cls, text: str) -> Budget:
        """`60s`, `5m`, `1h`, `200-steps`, `2M-tokens`, `10k-evaluations` or `50k-reward-calls`.

        Raises InputError for anything else.
        """
        time = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text.strip())
        if time and float(time[1]) > 0:
            return cls(float(time[1]) * _SECONDS[time[2]], "seconds")
        amount = re.fullmatch(r"(\d+(?:\.\d+)?)([kMB]?)-([a-z-]+)", text.strip())
        if amount and float(amount[1]) > 0 and amount[3] in (*UNITS, "steps"):
            return cls(float(amount[1]) * _SCALES[amount[2]], amount[3])
        raise InputError(
            f"A budget must be like 60s, 5m, 200-steps, 2M-tokens, 10k-evaluations or 50k-reward-calls, got '{text}'."
        )

    def spent(self, cost: Cost, steps: int) -> float:
        """The amount of this budget's unit in a cost; steps are counted by the caller."""
        if self.unit == "steps":
            return float(steps)
        return float(cost.forward + cost.backward if self.unit == "tokens" else getattr(cost, UNITS[self.unit]))

    def fraction(self, cost: Cost, steps: int) -> float:
        """The share of the budget that is spent; 1 or more means stop."""
        return self.spent(cost, steps) / self.amount

    def __str__(self) -> str:
        amount = f"{self.amount:,.0f}" if self.amount == int(self.amount) else f"{self.amount:,g}"
        return f"{amount} {self.unit}"
