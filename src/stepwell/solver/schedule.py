"""A schedule: the times of a grid and the table of each step, as a search finds them and a user prints and saves them.

`integrate.propose` takes the steps. Where the table changes from one step to the next, the history is told anew from
what the model said, so that a step may interpolate noise where the one before it interpolated data.
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
class Past:
    """What a schedule remembers, the newest first: states (N, *D), the model's own predictions there, and the history.

    `past[index]` forks along with the rows of a state.
    """

    history: History = field(default_factory=History)
    times: tuple[float, ...] = ()
    states: tuple[Tensor, ...] = ()
    predictions: tuple[Tensor, ...] = ()

    def __getitem__(self, index: Any) -> Past:
        states, predictions = (tuple(value[index] for value in values) for values in (self.states, self.predictions))
        return Past(self.history[index], self.times, states, predictions)


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
                f"Schedule '{self.name}' has {len(self.times) - 1} steps and needs a table for each, not "
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
        """Write it as JSON, times to the last bit."""
        write_whole(file, json.dumps(asdict(self), indent=2) + "\n")

    def propose(
        self,
        predict: Predict,
        x: Tensor,
        step: int,
        path: Path,
        past: Past | None = None,
        *,
        output: str = "velocity",
    ) -> tuple[Gaussian | Point, Past]:
        """The law of the state at times[step + 1], given x (N, *D) at times[step], and the past to go on with.

        As `integrate.propose`, whose errors it has.
        """
        past, table, said = past or Past(), self.tables[step], []
        start, time, history = x, self.times[step], past.history

        def heard(state: Tensor, time: float) -> Tensor:
            said.append(predict(state, time))
            return said[-1]

        if step == 0 or table == self.tables[step - 1]:
            law, history = propose(heard, x, step, self.times, path, table, history, output=output)
        else:
            kind, before = table.predicts, self.tables[step - 1].predicts
            raw = heard(x, time)
            current = path.convert(raw, x, time, output, kind)
            if history.correction is not None and kind != before:  # it is stated in the kind before
                x = history.corrected(x, path.convert(raw, x, time, output, history.correction.predicts))
                history = History(history.times, history.predictions)

            def translated(state: Tensor, at: float) -> Tensor:
                return current if at == time else path.convert(predict(state, at), state, at, output, kind)

            history = _translated(history, past, before, path, output, kind)
            law, history = propose(translated, x, step, self.times, path, table, history, output=kind)
        times, states = (time, *past.times)[:LONGEST], (start, *past.states)[:LONGEST]
        return law, Past(history, times, states, (said[0], *past.predictions)[:LONGEST])

    def sample(self, predict: Predict, x: Tensor, path: Path, rng: Rng, *, output: str = "velocity") -> Sampled:
        """All steps, from x (N, *D) at times[0]; see `integrate.sample`, which it equals where the tables are one."""

        def law(counted: Predict, state: Tensor, step: int, past: Past | None) -> tuple[Gaussian | Point, Past]:
            return self.propose(counted, state, step, path, past, output=output)

        return walk(law, predict, x, self.steps, rng)


def _translated(history: History, past: Past, before: str, path: Path, output: str, kind: str) -> History:
    """The history in another kind of prediction, and as long as the past allows."""
    known = dict(zip(history.times, history.predictions, strict=True)) if kind == before else {}
    for time, state, prediction in zip(past.times, past.states, past.predictions, strict=True):
        if time not in known and (kind == "velocity" or math.isfinite(path.log_snr(time))):
            known[time] = path.convert(prediction, state, time, output, kind)
    times = tuple(sorted(known))
    return replace(history, times=times, predictions=tuple(known[time] for time in times))


def load_schedule(file: str | FilePath) -> Schedule:
    """A schedule that was saved. Raises `InputError` where the file is none."""
    try:
        entries = json.loads(FilePath(file).read_text())
        tables = tuple(Table(**row) for row in entries.pop("tables"))
        return Schedule(tables=tables, **entries)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{file} is not a saved schedule: {error}") from None
