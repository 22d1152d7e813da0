"""Where methods are found: the decorator that registers one, its card, and a user's own from a file or a package."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import inspect
import math
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from types import CodeType
from typing import Any

from stepwell.errors import InputError, StepwellError, UnknownName
from stepwell.parts import Demand, demands
from stepwell.process.exact import TabularLanguage
from stepwell.process.flow import Flow
from stepwell.process.language import Language
from stepwell.recipe import Recipe

ROOMS = ("language", "flow", "masked", "control", "steering")


@dataclass(frozen=True)
class Card:
    """What there is to know of a method before running it.

    `proof` names the checks that hold it against an exact answer (`stepwell.check.oracles`); `note` says what its
    published variant does otherwise, and by how much, as tests measure it; `catalogue` is its number in the catalogue
    of published methods, where it has one.
    """

    id: str
    title: str
    build: Callable[..., Recipe]
    paper: str = ""
    arxiv: str = ""
    year: int | None = None
    room: str = "language"
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
            line = _line_in(error, Path(_code_of(self.build).co_filename))
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
        plain = ("id", "title", "paper", "arxiv", "year", "room", "differs", "note", "catalogue", "source")
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


def check_room(card: Card, room: str | None) -> None:
    """Raise `InputError` for a flow's method on a language model, and the reverse (`room_of` the process)."""
    if room is None or card.room == room or card.room not in _KINDS:
        return
    others = [name for name in names() if _CARDS[name].room == room]
    hint = f"such as {', '.join(others[:4])}; one of your own is registered with room='{room}'"
    raise InputError(
        f"The method '{card.id}' trains {_KINDS[card.room]}, and not {_KINDS[room]}; choose a method for them, {hint}."
    )


def room_of(process: object) -> str | None:
    """The room whose methods are made for a process: `language`, `flow`, or None where it could be any."""
    if isinstance(process, Flow):
        return "flow"
    return "language" if isinstance(process, Language | TabularLanguage) else None


_KINDS = {"language": "language models", "flow": "flows"}
_CARDS: dict[str, Card] = {}
_loading = ["stepwell"]


def method(id: str, *, title: str, **card: Any) -> Callable[[Callable[..., Recipe]], Callable[..., Recipe]]:
    """Register a function that builds a Recipe; its parameters are the method's options and all have defaults.

    A registered method is listed, documented, property-tested and comparable with no further line.

    Example:
        >>> from stepwell.objective.policy import Policy
        >>> @method("shout", title="A method of one's own")
        ... def shout(volume: float = 1.0) -> Recipe:
        ...     return Recipe(volume * Policy())
        >>> get("shout").recipe(volume=2.0).whole.terms[0].coefficient
        2.0
        >>> forget("shout")
    """

    def register(build: Callable[..., Recipe]) -> Callable[..., Recipe]:
        if not isinstance(id, str) or not re.fullmatch(r"[^\s,:=]+", id):
            raise InputError(f"The id of a method is {id!r:.40}; a text without spaces, commas, colons and = is right.")
        code, taken = _code_of(build), _code_of(_CARDS[id].build) if id in _CARDS else None
        if taken is not None and (taken.co_filename, taken.co_qualname) != (code.co_filename, code.co_qualname):
            raise InputError(f"There is a method '{id}' already, from {_CARDS[id].source}; give yours another id.")
        known = [entry.name for entry in fields(Card) if entry.name not in ("id", "title", "build")]
        for name in card:
            if name not in known:
                raise UnknownName(f"entry of the card of '{id}' named", name, known)
        proof = card.get("proof", ())
        if not isinstance(proof, list | tuple) or not all(isinstance(name, str) for name in proof):
            raise InputError(f"The proof of method '{id}' is {proof!r:.60}; a tuple of oracles' names is right.")
        for name, parameter in inspect.signature(build).parameters.items():
            if parameter.default is inspect.Parameter.empty:
                raise InputError(f"Option '{name}' of method '{id}' has no default; every option needs one.")
        room = card.get("room", "language")
        if room not in ROOMS:
            raise UnknownName(f"room for method '{id}'", room, ROOMS)
        _CARDS[id] = Card(id, title, build, **{"source": _loading[-1], **card})
        return build

    return register


def forget(id: str) -> None:
    """Take a method out of the registry."""
    _CARDS.pop(id, None)


def names() -> list[str]:
    """The ids of all methods, sorted."""
    _load_own()
    return sorted(_CARDS)


def get(id: str) -> Card:
    """The card of a method; an unknown id is an error that names the nearest."""
    _load_own()
    if id not in _CARDS:
        raise UnknownName("method", id, _CARDS)
    return _CARDS[id]


def load_plugin(path: str | Path) -> None:
    """Run a user's file, whose decorators register methods and tasks."""
    path = Path(path).absolute()  # as tracebacks name it
    if not path.is_file():
        raise InputError(f"There is no plugin file '{path}'; give the path of a Python file that registers methods.")
    name = f"stepwell_plugin_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise InputError(f"The plugin '{path}' is no Python file; its name has to end in .py.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    _loading.append(str(path))
    try:
        spec.loader.exec_module(module)
    except InputError:
        raise
    except (Exception, SystemExit) as error:
        line = _line_in(error, path)
        said = error.msg if isinstance(error, SyntaxError) else str(error)
        raise InputError(
            f"The plugin '{path}' failed{line}: {type(error).__name__}{f': {said}' if said else ''}"
        ) from error
    finally:
        _loading.pop()


def _code_of(build: Callable[..., Any]) -> CodeType:
    """The code of a function that builds, behind `functools.partial` and decorators; of a class, that of its maker."""
    inner = inspect.unwrap(build.func if isinstance(build, functools.partial) else build)
    found: CodeType | None = getattr(inner, "__code__", None) or getattr(inner.__init__, "__code__", None)
    if found is None:
        raise InputError(f"A method is built by a function, not by {build!r:.60}.")
    return found


def _line_in(error: BaseException, path: Path) -> str:
    if isinstance(error, SyntaxError) and error.lineno:
        return f" at line {error.lineno}"
    trace, line = error.__traceback__, ""
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == str(path):
            line = f" at line {trace.tb_lineno}"
        trace = trace.tb_next
    return line


def _load_own() -> None:
    """Import the methods that come with Stepwell and those of installed packages, once."""
    if "stepwell.methods.flow" in sys.modules:
        return
    importlib.import_module("stepwell.methods.language")
    importlib.import_module("stepwell.methods.language_preference")
    importlib.import_module("stepwell.methods.language_comparison")
    importlib.import_module("stepwell.methods.language_target")
    importlib.import_module("stepwell.methods.language_ratio")
    importlib.import_module("stepwell.methods.language_trl")
    importlib.import_module("stepwell.methods.language_credit")
    importlib.import_module("stepwell.methods.flow")
    for entry in importlib.metadata.entry_points(group="stepwell.plugins"):
        _loading.append(entry.value)
        try:
            entry.load()
        except Exception as error:
            raise InputError(f"The installed plugin '{entry.name}' ({entry.value}) failed: {error}") from error
        finally:
            _loading.pop()
