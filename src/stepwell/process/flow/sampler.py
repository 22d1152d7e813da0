"""The sampler of a flow: a table for each step of a grid of times, and guidance; all of it can be set anew."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from numbers import Real
from typing import Any

from stepwell.errors import InputError, UnknownName
from stepwell.solver import grid
from stepwell.solver.path import Path, shift_time
from stepwell.solver.schedule import Schedule
from stepwell.solver.table import Table
from stepwell.solver.table import table as table_named

SETTINGS = {
    "solver": "a solver's name, a Table, or a Schedule, which brings its own times",
    "level": "the noise level of the solver",
    "steps": "the number of steps, equal in time after the shift",
    "times": "the grid itself, from noise to 0",
    "shift": "the factor of the time shift",
    "guidance": "the scale of classifier-free guidance",
    "tail": "(step, solver, steps): another solver, in that many steps, for what is left after a step",
    "stride": "(step, stride): after a step, only every so many-th time of the grid, the last one always",
}


@dataclass(frozen=True)
class SamplerSettings:
    """A schedule, and the scale of guidance. `solver` and `shift`, where there is one, made the schedule."""

    schedule: Schedule
    solver: Table | Schedule
    shift: float | None = 1.0
    guidance: float = 1.0

    @property
    def times(self) -> tuple[float, ...]:
        """(n + 1,) from noise to 0."""
        return self.schedule.times

    @property
    def tables(self) -> tuple[Table, ...]:
        """(n,) one a step."""
        return self.schedule.tables

    @cached_property
    def deterministic(self) -> Schedule:
        """The same schedule without any noise."""
        return replace(self.schedule, tables=tuple(table.deterministic for table in self.tables))

    @cached_property
    def remembers(self) -> bool:
        """True where some step depends on earlier predictions."""
        return any(table.remembers for table in self.tables)


def sampler_with(sampler: SamplerSettings | None, path: Path, settings: Mapping[str, Any]) -> SamplerSettings:
    """The sampler with other settings (`SETTINGS`); raises `InputError` for what contradicts itself."""
    for name in settings:
        if name not in SETTINGS:
            raise UnknownName("setting of a flow's sampler", name, SETTINGS)
    solver = settings.get("solver", None if sampler is None else sampler.solver)
    solver = table_named(solver) if isinstance(solver, str) else solver
    if not isinstance(solver, Table | Schedule):
        raise InputError(f"solver must be a name, a Table or a Schedule, got a {type(solver).__name__}.")
    guidance = _number("guidance", settings.get("guidance", 1.0 if sampler is None else sampler.guidance))
    if not 0.0 <= guidance < math.inf:
        raise InputError(f"guidance must be 0 or more, got {guidance}.")
    if isinstance(solver, Schedule):
        for name in ("level", "steps", "times", "shift", "tail", "stride"):
            if name in settings:
                raise InputError(f"{name} cannot be set beside the schedule '{solver.name}', which has its own steps.")
        grid.check_grid(solver.times, path)
        return SamplerSettings(solver, solver, None, guidance)
    if "level" in settings:
        solver = solver.replace(level=_number("level", settings["level"]))
    shift = settings.get("shift", None if sampler is None else sampler.shift)
    times = _times(sampler, path, settings, shift)
    if "times" in settings:
        shift = None
    kept = sampler is not None and not {"solver", "level", "steps", "times", "shift"} & settings.keys()
    schedule = sampler.schedule if sampler is not None and kept else Schedule.of(times, solver)
    made = SamplerSettings(schedule, solver, shift, guidance)
    if "stride" in settings:
        made = _strided(made, *_several("stride", settings["stride"], 2))
    if "tail" in settings:
        made = _with_tail(made, path, *_several("tail", settings["tail"], 3))
    return made


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise InputError(f"{name} must be a number, got {value!r}.")
    return float(value)


def _several(name: str, value: Any, count: int) -> Any:
    if not isinstance(value, tuple | list) or len(value) != count:
        raise InputError(f"{name} must be {SETTINGS[name]}; got {value!r}.")
    return value


def _times(
    sampler: SamplerSettings | None, path: Path, settings: Mapping[str, Any], shift: float | None
) -> tuple[float, ...]:
    if "times" in settings:
        try:
            times = [float(time) for time in settings["times"]]
        except (TypeError, ValueError):
            raise InputError(f"times must be falling numbers, got {settings['times']!r:.60}.") from None
        if "shift" in settings or settings.get("steps", len(times) - 1) != len(times) - 1:
            raise InputError(
                "times cannot be given beside steps or shift; give the grid itself, or what it is made from."
            )
        return grid.check_grid(times, path)
    if sampler is not None and "steps" not in settings and "shift" not in settings:
        return sampler.times
    steps = settings.get("steps", None if sampler is None else len(sampler.times) - 1)
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise InputError(f"steps must be a whole number of at least 1, got {steps!r}.")
    return grid.shifted(steps, path, 1.0 if shift is None else _number("shift", shift))


def _strided(sampler: SamplerSettings, step: int, stride: int) -> SamplerSettings:
    """After `step` steps only every `stride`-th time, and 0 at the end whatever the stride leaves over."""
    last = len(sampler.times) - 1
    if stride < 1 or not 0 <= step <= last:
        raise InputError(f"stride must be (step, stride) with 0 <= step <= {last} and stride >= 1, got {step, stride}.")
    places = [*range(step), *range(step, last, stride), last]
    return replace(sampler, schedule=Schedule.of([sampler.times[i] for i in places], sampler.tables[0]))


def _with_tail(sampler: SamplerSettings, path: Path, step: int, solver: str | Table, steps: int) -> SamplerSettings:
    """After `step` steps another solver, in `steps` steps that are equal in the time before the shift."""
    last = len(sampler.times) - 1
    if steps < 1 or not 0 <= step < last:
        raise InputError(
            f"tail must be (step, solver, steps) with 0 <= step < {last} and steps >= 1, got step {step} and {steps} "
            "steps."
        )
    solver = table_named(solver) if isinstance(solver, str) else solver
    factor = sampler.shift or 1.0
    begin = shift_time(sampler.times[step], 1.0 / factor)
    rest = [shift_time(begin * (1.0 - i / steps), factor) for i in range(1, steps)]
    times: Sequence[float] = (*sampler.times[: step + 1], *rest, 0.0)
    tables = (*sampler.tables[:step], *(solver,) * steps)
    name = f"{sampler.schedule.name}, then {solver.name}"
    return replace(sampler, schedule=Schedule(name, grid.check_grid(times, path), tables))
