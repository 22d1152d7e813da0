"""A schedule: the times of a grid and the table of each step, as a search finds them and a user prints and saves them.

`integrate.propose` takes the steps. Where the table changes from one step to the next, the history is written anew from
the model's own predictions, so that a step may interpolate noise where the one before it interpolated data.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path as FilePath
from typing import Any

from torch import Tensor

from stepwell.distributions import Gaussian, Point
from stepwell.errors import InputError
from stepwell.rng import Rng
from stepwell.solver.grid import check_order
from stepwell.solver.integrate import History, Predict, Sampled, propose, walk
from stepwell.solver.path import Path
from stepwell.solver.table import Table
from stepwell.writing import write_whole

LONGEST = 4
"""Predictions that a table can use."""


@dataclass(frozen=True)
class ScheduleHistory:
    """The memory of a schedule, the newest first: states (N, *D), the model's own predictions there, and its solver's.

    `history[index]` forks along with the rows of a state.
    """

    solver: History = field(default_factory=History)
    times: tuple[float, ...] = ()
    states: tuple[Tensor, ...] = ()
    predictions: tuple[Tensor, ...] = ()

    def __getitem__(self, index: Any) -> ScheduleHistory:
        states, predictions = (tuple(value[index] for value in values) for values in (self.states, self.predictions))
        return ScheduleHistory(self.solver[index], self.times, states, predictions)


@dataclass(frozen=True)
class Schedule:
    """n + 1 falling times, and n tables, one a step.

    Example:
        >>> from stepwell.solver.table import table
        >>> print(Schedule("two", (1.0, 0.4, 0.0), (table("euler"), table("dpmpp-2m"))))
        two
        1         -> 0.4        euler
        0.4       -> 0          dpmpp-2m
    """

    name: str
    times: tuple[float, ...]
    tables: tuple[Table, ...]
    source: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "times", tuple(float(time) for time in self.times))
        object.__setattr__(self, "tables", tuple(self.tables))
        check_order(self.times)
        if len(self.tables) != len(self.times) - 1:
            raise InputError(
                f"The tables of schedule '{self.name}' must be {len(self.times) - 1}, one for each step, got "
                f"{len(self.tables)}."
            )

    @staticmethod
    def of(times: Sequence[float], table: Table, name: str = "") -> Schedule:
        """The same table in every step."""
        return Schedule(name or table.name, tuple(times), (table,) * (len(times) - 1), table.source)

    @property
    def steps(self) -> int:
        return len(self.tables)

    @property
    def stochastic(self) -> bool:
        return any(table.stochastic for table in self.tables)

    def __str__(self) -> str:
        lines = [
            f"{start:<9.6g} -> {end:<9.6g}  {table.name}"
            for start, end, table in zip(self.times, self.times[1:], self.tables, strict=False)
        ]
        return "\n".join([self.name, *lines])

    def save(self, file: str | FilePath) -> None:
        """Write it as JSON, with times to the last bit."""
        write_whole(file, json.dumps(asdict(self), indent=2) + "\n")

    def propose(
        self,
        predict: Predict,
        x: Tensor,
        step: int,
        path: Path,
        history: ScheduleHistory | None = None,
        *,
        output: str = "velocity",
    ) -> tuple[Gaussian | Point, ScheduleHistory]:
        """The distribution of the state at times[step + 1], given x (N, *D) at times[step], and the history after it.

        As `integrate.propose`, whose errors it has.
        """
        history, table, predicted = history or ScheduleHistory(), self.tables[step], []
        start, time, own = x, self.times[step], history.solver

        def recorded(state: Tensor, time: float) -> Tensor:
            predicted.append(predict(state, time))
            return predicted[-1]

        if step == 0 or table == self.tables[step - 1]:
            distribution, own = propose(recorded, x, step, self.times, path, table, own, output=output)
        else:
            kind, before = table.predicts, self.tables[step - 1].predicts
            raw = recorded(x, time)
            current = path.convert(raw, x, time, output, kind)
            if own.correction is not None and kind != before:  # it is stated in the kind before
                x = own.corrected(x, path.convert(raw, x, time, output, own.correction.predicts))
                own = History(own.times, own.predictions)

            def translated(state: Tensor, at: float) -> Tensor:
                return current if at == time else path.convert(predict(state, at), state, at, output, kind)

            own = _translated(own, history, before, path, output, kind)
            distribution, own = propose(translated, x, step, self.times, path, table, own, output=kind)
        times, states = (time, *history.times)[:LONGEST], (start, *history.states)[:LONGEST]
        return distribution, ScheduleHistory(own, times, states, (predicted[0], *history.predictions)[:LONGEST])

    def sample(self, predict: Predict, x: Tensor, path: Path, rng: Rng, *, output: str = "velocity") -> Sampled:
        """All steps, from x (N, *D) at times[0]; see `integrate.sample`, which it equals where the tables are one."""

        def proposed(
            counted: Predict, state: Tensor, step: int, history: ScheduleHistory | None
        ) -> tuple[Gaussian | Point, ScheduleHistory]:
            return self.propose(counted, state, step, path, history, output=output)

        return walk(proposed, predict, x, self.steps, rng)


def _translated(own: History, history: ScheduleHistory, before: str, path: Path, output: str, kind: str) -> History:
    """The solver's history in another kind of prediction, as long as the schedule's history allows."""
    converted = dict(zip(own.times, own.predictions, strict=True)) if kind == before else {}
    for time, state, prediction in zip(history.times, history.states, history.predictions, strict=True):
        if time not in converted and (kind == "velocity" or math.isfinite(path.log_snr(time))):
            converted[time] = path.convert(prediction, state, time, output, kind)
    times = tuple(sorted(converted))
    return replace(own, times=times, predictions=tuple(converted[time] for time in times))


def load_schedule(file: str | FilePath) -> Schedule:
    """A schedule that was saved. Raises `InputError` where the file is none."""
    try:
        entries = json.loads(FilePath(file).read_text())
        tables = tuple(Table(**row) for row in entries.pop("tables"))
        return Schedule(tables=tables, **entries)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{file} is not a saved schedule: {error}") from None
