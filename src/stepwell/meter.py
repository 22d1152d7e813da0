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
from stepwell.ranges import Demand, Range


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
NEAR = 0.1
"""The share of a budget in seconds that a run may end before or after it."""
POSITIVE = Demand(range=Range("a finite number above 0", 0, above=True))
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

    def __post_init__(self) -> None:
        POSITIVE.refuse("Budget.amount", self.amount)
        Demand(choices=(*UNITS, "steps")).refuse("Budget.unit", self.unit)

    @classmethod
    def parse(cls, text: str) -> Budget:
        """`60s`, `5m`, `1h`, `200-steps`, `2M-tokens`, `10k-evaluations` or `50k-reward-calls`.

        Raises InputError for anything else.
        """
        text = f"{text}"
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

    def share(self, cost: Cost, steps: int) -> float:
        """The share of a run that is over: its fraction, or 1 where it has to stop before the budget is spent.

        Steps are not cut. Of a budget in seconds a further step, as long as the mean of those made, may end up to
        `NEAR` beyond it; one that would end later is made only if the run then ends nearer to its budget than now.

        Example:
            >>> minute = Budget(60.0, "seconds")
            >>> [minute.share(Cost(wall_time=seconds), steps) for seconds, steps in ((30, 10), (57, 19), (50, 1))]
            [0.5, 0.95, 1.0]
        """
        fraction = self.fraction(cost, steps)
        if self.unit != "seconds" or not steps or fraction >= 1:
            return fraction
        beyond = fraction + fraction / steps - 1
        return 1.0 if beyond > max(NEAR, 1 - fraction) else fraction

    def missed(self, cost: Cost, steps: int) -> str:
        """One sentence for a run that ended further than `NEAR` from its budget in seconds; empty for others.

        Example:
            >>> Budget(60.0, "seconds").missed(Cost(wall_time=63.0), 21)
            ''
            >>> Budget(60.0, "seconds").missed(Cost(wall_time=80.0), 2)
            'The run took 80 s for a budget of 60 s: a step, which is never cut, took 40 s on average.'
        """
        if self.unit != "seconds" or not steps or abs(self.fraction(cost, steps) - 1) <= NEAR:
            return ""
        mean = cost.wall_time / steps
        took = f"The run took {cost.wall_time:.3g} s for a budget of {self.amount:.3g} s"
        return f"{took}: a step, which is never cut, took {mean:.3g} s{'' if steps == 1 else ' on average'}."

    def __str__(self) -> str:
        amount = f"{self.amount:,.0f}" if self.amount == int(self.amount) else f"{self.amount:,g}"
        return f"{amount} {self.unit}"
