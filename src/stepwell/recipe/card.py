"""A card: what there is to know of a method before running it, and the recipe that it stands for."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepwell.errors import InputError, StepwellError, UnknownName
from stepwell.parts import Demand, demands
from stepwell.recipe.recipe import Recipe
from stepwell.recipe.source import code_of, line_in


@dataclass(frozen=True)
class Card:
    """What there is to know of a method before running it.

    `proof` names the checks that hold it against an exact answer (`stepwell.check.oracles`); `note` says what
    its published variant does otherwise, and by how much, as tests measure it; `catalogue` is its number in the
    catalogue of published methods, where it has one.
    """

    id: str
    title: str
    build: Callable[..., Recipe]
    paper: str = ""
    arxiv: str = ""
    year: int | None = None
    kind: str = "training"
    processes: tuple[str, ...] = ("language",)
    differs: str = ""
    note: str = ""
    proof: tuple[str, ...] = ()
    catalogue: int | None = None
    source: str = "stepwell"

    @property
    def options(self) -> dict[str, Any]:
        """The method's options with their defaults."""
        return {name: parameter.default for name, parameter in inspect.signature(self.build).parameters.items()}

    def recipe(self, **options: Any) -> Recipe:
        """The composition with these options; an unknown one is an error that names the nearest.

        Raises `InputError` for a function that fails, naming the line in its own file, or that returns no Recipe.
        """
        check_options(self.id, options, self.build)
        try:
            recipe: Any = self.build(**options)
        except StepwellError:
            raise
        except Exception as error:
            line = line_in(error, Path(code_of(self.build).co_filename))
            given = " with " + ", ".join(f"{name}={value!r:.40}" for name, value in options.items()) if options else ""
            said = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise InputError(
                f"The method '{self.id}' cannot be built{given}; its function failed{line}: {said}"
            ) from error
        if inspect.iscoroutine(recipe):
            recipe.close()  # else Python complains of it as well
        if not isinstance(recipe, Recipe):
            raise InputError(f"The method '{self.id}' is no Recipe but {type(recipe).__name__}; return a Recipe.")
        return recipe

    def as_dict(self) -> dict[str, Any]:
        """The card for JSON: every field, the options with their defaults, and the parts by default."""
        plain = ("id", "title", "paper", "arxiv", "year", "kind", "processes", "differs", "note", "catalogue", "source")
        answer = {name: getattr(self, name) for name in plain}
        return answer | {"proof": list(self.proof), "options": self.options, "parts": self.recipe().parts()}


def check_options(owner: str, options: Mapping[str, Any], build: Callable[..., Any]) -> None:
    """Raise for an option that `build` does not have, or that is not what its default and its type say."""
    known = {name: parameter.default for name, parameter in inspect.signature(build).parameters.items()}
    for name, value in options.items():
        if name not in known:
            raise UnknownName(f"option of {owner}", name, known)
        default, demand = known[name], demands(build).get(name, Demand())
        number = isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)
        whole = demand.bare and demand.range is not None and demand.range.whole
        kinds = {
            "true or false": isinstance(default, bool) and not isinstance(value, bool),
            "a number": isinstance(default, int | float) and not isinstance(default, bool) and not number,
            "a whole number": whole and isinstance(value, float),
            "a text": isinstance(default, str) and isinstance(value, int | float),
        }
        for kind, wrong in kinds.items():
            if wrong:
                raise InputError(f"Option '{name}' of {owner} is {kind}, not '{value}'.")
        if not demand.bare:
            demand.refuse(f"'{name}' of {owner}", value)
