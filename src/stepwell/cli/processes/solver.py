"""The arguments that choose a flow's sampler, and solvers by name or from a file."""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepwell.cli.processes.options import Number, Numbers, Text
from stepwell.errors import InputError, UnknownName

if TYPE_CHECKING:
    from stepwell.solver.table import Table


@dataclass(kw_only=True)
class SolverOptions:
    """The sampler of a flow or a pipeline."""

    solver: Text = None  # a name, see `stepwell solvers`, or a .json file of your own
    level: Number = None  # the noise level of the solver
    times: Numbers = ()  # the whole grid, from 1 (noise) to 0 (data), in place of steps and --shift
    shift: Number = None  # the factor of the time shift; above 1 for more steps near noise
    guidance: Number = None  # the scale of classifier-free guidance; 1 for none

    def settings(self, steps: int | None) -> dict[str, Any]:
        """The settings that were given, as `with_sampler` takes them; raises `InputError` for a grid given twice."""
        if self.times and (steps is not None or self.shift is not None):
            raise InputError("--times must be given without a number of steps and without --shift: it is the grid.")
        chosen: dict[str, Any] = {"level": self.level, "steps": steps, "shift": self.shift, "guidance": self.guidance}
        chosen |= {"times": self.times or None, "solver": None if self.solver is None else solver_from(self.solver)}
        return {name: value for name, value in chosen.items() if value is not None}


def drawn_with(process: Any, settings: Mapping[str, Any]) -> Any:
    """The process with other settings of its sampler, where any were given."""
    from stepwell.process.abilities import Redrawn, ability

    return ability(process, Redrawn, "A solver").with_sampler(**settings) if settings else process


def solver_from(word: str) -> Table:
    """A solver by name, or from a .json file as `stepwell solvers NAME --save FILE` writes it.

    Raises `InputError` for a file that is not there or is not JSON, and for a setting that is unknown, of the wrong
    type, or in contradiction to another.
    """
    from stepwell.solver.table import Table, table

    if not word.endswith(".json"):
        return table(word)
    as_saved = "as `stepwell solvers NAME --save FILE` writes it"
    try:
        entries = json.loads(Path(word).expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"The solver '{word}' cannot be read: {error.strerror or error}.") from error
    except ValueError as error:
        raise InputError(f"The solver '{word}' must be JSON, {as_saved}, got an error: {error}.") from error
    if not isinstance(entries, dict) or not isinstance(entries.get("name"), str):
        raise InputError(f"The solver '{word}' must be a JSON object with a name, {as_saved}, got {entries!r:.60}.")
    kinds = typing.get_type_hints(Table)
    settings = [entry.name for entry in fields(Table)]
    try:
        for name, value in entries.items():
            if name not in settings:
                raise UnknownName("setting of a solver", name, settings)
            if not _fits(value, kinds[name]):
                kind = kinds[name].__name__ if kinds[name] in (str, int, float, bool) else kinds[name]
                raise InputError(f"{name} must be of type {kind}, got {value!r}.")
        return Table(**entries)
    except InputError as error:
        raise InputError(f"The solver '{word}': {error}") from error


def _fits(value: Any, kind: Any) -> bool:
    """True for a value from JSON of an annotated type; whole numbers are numbers, and lists stand for tuples."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return any(_fits(value, each) for each in arguments)
    if origin is tuple:
        as_long = arguments[-1] is ... or (isinstance(value, list | tuple) and len(value) == len(arguments))
        return isinstance(value, list | tuple) and as_long and all(_fits(each, arguments[0]) for each in value)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
