"""A card: everything there is to know of a method before running it, and the recipe that it stands for."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepwell.errors import InputError, StepwellError, UnknownName
from stepwell.foreign import names as foreign_names
from stepwell.ranges import Demand, demands
from stepwell.recipe.needs import Need, needs_of
from stepwell.recipe.recipe import Recipe
from stepwell.recipe.source import code_of, line_in

COMMAND = "stepwell train --model DIR_OR_ID --data prompts.jsonl {reward}{more}--method {id} --out runs/a"


@dataclass(frozen=True)
class Card:
    """Everything there is to know of a method before running it.

    kind: what the method is used for; processes: the kinds of process that it is made for. aliases: other names that
    people type. differs: its difference from the methods it is closest to; when: the case to choose it for; note:
    the difference of its published variant or of other libraries, in figures that tests measure. proof: the checks
    that hold it against an exact answer (`stepwell.check.oracles`). catalogue: its number, or several, in the
    catalogue of published methods.
    """

    id: str
    title: str
    build: Callable[..., Recipe]
    aliases: tuple[str, ...] = ()
    paper: str = ""
    arxiv: str = ""
    year: int | None = None
    kind: str = "training"
    processes: tuple[str, ...] = ("language",)
    differs: str = ""
    when: str = ""
    note: str = ""
    proof: tuple[str, ...] = ()
    catalogue: int | tuple[int, ...] | None = None
    source: str = "stepwell"

    @property
    def options(self) -> dict[str, Any]:
        """The method's options with their defaults."""
        return {name: parameter.default for name, parameter in inspect.signature(self.build).parameters.items()}

    @property
    def needs(self) -> tuple[Need, ...]:
        """Needs of the default recipe beside a model, prompts and the first reward."""
        return tuple(needs_of(self.recipe()))

    @property
    def command(self) -> str:
        """The command that runs the method with its default options."""
        more = "".join(f"{need.arguments} " for need in self.needs if need.arguments)
        return COMMAND.format(id=self.id, reward="--reward my.py:reward " if self.recipe().rewarded else "", more=more)

    @property
    def text(self) -> str:
        """All the words of the card that a search looks at."""
        words = (self.id, *self.aliases, self.title, self.paper, self.arxiv, *self.processes)
        return "\n".join((*words, self.differs, self.when, self.note))

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
            words = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise InputError(
                f"The method '{self.id}' cannot be built{given}; its function failed{line}: {words}"
            ) from error
        if inspect.iscoroutine(recipe):
            recipe.close()  # else Python complains of it as well
        if not isinstance(recipe, Recipe):
            raise InputError(f"The method '{self.id}' must return a Recipe, got {type(recipe).__name__}.")
        return recipe

    def as_dict(self) -> dict[str, Any]:
        """The card for JSON: every field, the options with their defaults, the needs, the command and the parts."""
        plain = ("id", "title", "aliases", "paper", "arxiv", "year", "kind", "processes", "differs", "when", "note")
        entries = {name: getattr(self, name) for name in (*plain, "proof", "catalogue", "source")}
        entries = {name: list(value) if isinstance(value, tuple) else value for name, value in entries.items()}
        needs = [need.words for need in self.needs]
        return entries | {
            "options": self.options,
            "needs": needs,
            "command": self.command,
            "parts": self.recipe().parts(),
        }


def check_options(owner: str, options: Mapping[str, Any], build: Callable[..., Any]) -> None:
    """Raise for an option that `build` does not have, or that is not what its default and its type say."""
    known = {name: parameter.default for name, parameter in inspect.signature(build).parameters.items()}
    for name, value in options.items():
        if not isinstance(name, str) or name not in known:
            raise UnknownName(f"option of {owner}", name, known, hint=foreign_names.option_hint(name, known))
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
                raise InputError(f"Option '{name}' of {owner} must be {kind}, got {value!r}.")
        if not demand.bare:
            demand.refuse(f"Option '{name}' of {owner}", value)
