"""Numbers within ranges: types that say which values a setting may have, and refuse all others."""

from __future__ import annotations

import functools
import inspect
import math
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Annotated, Any, TypeVar

from stepwell.errors import InputError, UnknownChoice, UnknownName

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Range:
    """Numbers from `least` to `most`, or above `least`, and the words for them.

    `whole`: whole numbers only; `endless`: infinity too. A field says so by its type: `gamma: Share = 1.0`, or
    `p: Annotated[float, Range("a number from -1 to 1", -1, 1)]`.
    """

    words: str
    least: float = -math.inf
    most: float = math.inf
    above: bool = False
    whole: bool = False
    endless: bool = False

    def holds(self, value: Any) -> bool:
        """True for a number in the range.

        Example:
            >>> fraction = Range("above 0 and at most 1", 0, 1, above=True)
            >>> [fraction.holds(value) for value in (0.5, 1, 0, float("nan"), True, "1")]
            [True, True, False, False, False, False]
        """
        if isinstance(value, bool) or not issubclass(type(value), Integral if self.whole else Real):
            return False
        inside = self.least < value <= self.most or (value == self.least and not self.above)
        return inside and (self.endless or abs(value) != math.inf)


Share = Annotated[float, Range("a number from 0 to 1", 0, 1)]
Portion = Annotated[float, Range("a number above 0 and at most 1", 0, 1, above=True)]
Positive = Annotated[float, Range("a finite number above 0", 0, above=True)]
NotNegative = Annotated[float, Range("a finite number, 0 or more", 0)]
Width = Annotated[float, Range("a number, 0 or more", 0, endless=True)]
Size = Annotated[int, Range("a whole number, at least 1", 1, whole=True)]
Count = Annotated[int, Range("a whole number, 0 or more", 0, whole=True)]

_NUMBERS = {float: Range("a finite number"), int: Range("a whole number", whole=True)}


@dataclass(frozen=True)
class Demand:
    """The constraint that a type annotation puts on a value: any of what the fields name.

    choices: the values of a `Literal`. range: a number in it; `bare` where it is that of a plain `float` or `int`.
    kinds: an instance of one of these classes; one that stands for a number (`Checked.first_number`) has to begin in
    the range. functions: a plain function too, in place of an instance that is called.
    """

    choices: tuple[Any, ...] = ()
    range: Range | None = None
    bare: bool = False
    kinds: tuple[type, ...] = ()
    functions: bool = False

    @property
    def words(self) -> str:
        """The values that are right, as they stand after `must be`."""
        words = [self.range.words] if self.range else []
        if self.choices:
            words.append(("one of " if len(self.choices) > 1 else "") + ", ".join(sorted(map(str, self.choices))))
        return ", or ".join(words + [_with_article(kind) for kind in self.kinds])

    def holds(self, value: Any) -> bool:
        """True for a value that is right."""
        if self == Demand():
            return True
        if isinstance(value, self.kinds):
            number = value.first_number() if isinstance(value, Checked) else None
            return number is None or self.range is None or self.range.holds(number)
        if self.functions and callable(value) and not isinstance(value, Checked | type):
            return True
        chosen = any(type(value) is type(choice) and value == choice for choice in self.choices)
        return chosen or (self.range is not None and self.range.holds(value))

    def refuse(self, what: str, value: Any) -> None:
        """Raise `InputError` for a value that is not right; `what` names it, such as `Clip.low`."""
        if self.holds(value):
            return
        if isinstance(value, str) and self.choices:
            raise UnknownChoice(what, value, self.words, map(str, self.choices))
        number = value.first_number() if isinstance(value, Checked) else None
        shown = f"{value!r:.60}" if number is None else f"{_with_article(type(value))} that begins at {number!r:.60}"
        if isinstance(value, type):
            shown = f"the class {value.__name__}; write {value.__name__}()"
        raise InputError(f"{what} must be {self.words}, got {shown}.")


def _with_article(kind: type) -> str:
    if kind is types.NoneType:
        return "None"
    return f"{'an' if kind.__name__[0] in 'AEIOU' else 'a'} {kind.__name__}"


@functools.cache
def demands(thing: Callable[..., Any]) -> dict[str, Demand]:
    """The constraints on a class's fields, or on a function's arguments; none where their types cannot be read."""
    try:
        hints = typing.get_type_hints(thing, include_extras=True)
    except (NameError, TypeError, AttributeError):  # annotations that name what is not there; a partial has none
        return {}
    return {name: demand for name, hint in hints.items() if (demand := _demand(hint)) is not None}


def _demand(hint: Any) -> Demand | None:
    """The constraint of one annotation; None where it has none, or a member that cannot be checked."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    choices: list[Any] = []
    ranges: list[Range] = []
    plain: list[Range] = []
    kinds: list[type] = []
    for member in typing.get_args(hint) if union else (hint,):
        noted = [note for note in getattr(member, "__metadata__", ()) if isinstance(note, Range)]
        if noted:
            ranges += noted
        elif member in _NUMBERS:
            plain.append(_NUMBERS[member])
        elif typing.get_origin(member) is typing.Literal:
            choices += typing.get_args(member)
        elif isinstance(member, type):
            kinds.append(member)
        else:
            return None
    checked = [kind for kind in kinds if issubclass(kind, Checked)]
    if not (choices or ranges or plain or checked):
        return None
    called = any("__call__" in vars(base) for kind in checked for base in kind.__mro__)
    number = next(iter(ranges + plain), None)
    return Demand(tuple(choices), number, bool(plain) and not ranges, tuple(kinds), called)


class Checked:
    """A dataclass whose fields are what their types say: one of a `Literal`'s values, a number in its `Range`, a part.

    Anything else is refused as the object is made.
    """

    def __post_init__(self) -> None:
        for name, demand in demands(type(self)).items():  # type: ignore[arg-type]
            demand.refuse(f"{type(self).__name__}.{name}", getattr(self, name))

    def first_number(self) -> float | None:
        """The number that this stands for at first, where it takes the place of a number; None where it does not."""
        return None


_KINDS = {str: "a text", bool: "True or False", types.NoneType: "None", dict: "a dictionary", list: "a list"}
_ABSTRACT = {Mapping: "a dictionary", Sequence: "a list", Callable: "a function"}
"""Kinds of arguments besides numbers, in words."""


@dataclass(frozen=True)
class Kinds:
    """Any of several kinds of values, for an argument whose annotation says no more: a text, a list, a number, ...

    `items` is the class of what a list holds, where it may hold nothing else.
    """

    demand: Demand
    classes: tuple[type, ...]
    words: tuple[str, ...]
    items: type | None = None

    def holds(self, value: Any) -> bool:
        """True for a value of one of the kinds. Texts are no lists, and True is no number."""
        numbers = self.demand.range is not None and self.demand.range.holds(value)
        chosen = bool(self.demand.choices) and self.demand.holds(value)
        return numbers or chosen or any(_is_a(value, kind) for kind in self.classes)

    def refuse(self, name: str, value: Any) -> None:
        """Raise `InputError` for a value of another kind."""
        if self.holds(value):
            wrong = [] if self.items is None else [item for item in value if not isinstance(item, self.items)]
            if wrong:
                kind = _KINDS.get(self.items) or _with_article(self.items)  # type: ignore[arg-type]
                raise InputError(f"Each of {name} must be {kind}, got {wrong[0]!r:.60}.")
            return
        if isinstance(value, str) and self.demand.choices:
            self.demand.refuse(name, value)
        words = ([self.demand.words] if self.demand.words else []) + list(self.words)
        raise InputError(f"{name} must be {', or '.join(words)}, got {value!r:.60}.")


def _is_a(value: Any, kind: type) -> bool:
    if kind is Sequence:
        return (isinstance(value, Sequence) and not isinstance(value, str | bytes)) or hasattr(value, "tolist")
    return callable(value) if kind is Callable else isinstance(value, kind)  # type: ignore[comparison-overlap]


@functools.cache
def kinds_of(function: Callable[..., Any]) -> dict[str, Kinds]:
    """The kinds of a function's arguments, or of a class's fields, by name; none for those that may be anything."""
    found: dict[str, Kinds] = {}
    names = vars(sys.modules[function.__module__])
    for name, annotation in function.__annotations__.items():
        try:
            hint = eval(annotation, dict(names)) if isinstance(annotation, str) else annotation
        except (NameError, TypeError, AttributeError):  # names that only type checkers import
            continue
        kinds = _kinds(hint)
        if kinds is not None and name != "return":
            found[name] = kinds
    return found


def _kinds(hint: Any) -> Kinds | None:
    """The kinds that an annotation allows; None where one of them cannot be told."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    choices: list[Any] = []
    ranges: list[Range] = []
    classes: list[Any] = []
    for member in typing.get_args(hint) if union else (hint,):
        origin = typing.get_origin(member)
        noted = [note for note in getattr(member, "__metadata__", ()) if isinstance(note, Range)]
        if noted or member in _NUMBERS:
            ranges += noted or [_NUMBERS[member]]
        elif origin is typing.Literal:
            choices += typing.get_args(member)
        elif member is not Any and isinstance(member, type) and not getattr(member, "_is_protocol", False):
            classes.append(member)
        elif isinstance(origin, type):
            classes.append(origin)
        else:
            return None
    words = [_KINDS.get(kind) or _ABSTRACT.get(kind) or _with_article(kind) for kind in classes]
    demand = Demand(tuple(choices), next(iter(ranges), None))
    return Kinds(demand, tuple(classes), tuple(dict.fromkeys(words)), _items(hint))


def _items(hint: Any) -> type | None:
    """The class of what a list holds, or None: numbers are of too many classes."""
    held = typing.get_args(hint) if typing.get_origin(hint) is Sequence else ()
    kind = held[0] if held and isinstance(held[0], type) else None
    return None if kind in (None, Any, *_NUMBERS) or getattr(kind, "_is_protocol", False) else kind


def check_kinds(of: Callable[..., Any], values: Mapping[str, Any], owner: str = "") -> None:
    """Raise `InputError` for a value that is none of the kinds its annotation names."""
    for name, kinds in kinds_of(of).items():
        if name in values:
            kinds.refuse(f"{owner}{name}", values[name])


def _refuse_unknown(owner: str, signature: inspect.Signature, named: Mapping[str, Any]) -> None:
    """Raise `UnknownName` for a keyword that a function does not have, with ours for another library's name."""
    if any(entry.kind is entry.VAR_KEYWORD for entry in signature.parameters.values()):
        return
    for name in named:
        if name not in signature.parameters:
            from stepwell.foreign.names import keyword_hint

            known = list(signature.parameters)
            raise UnknownName(f"{owner}() argument", name, known, hint=keyword_hint(name, known))


def checked(*besides: str) -> Callable[[F], F]:
    """Make a function refuse arguments of another kind than their annotations', before anything else.

    `besides` are arguments that it checks itself. Numbers of numpy and torch arrive as Python's own.

    Example:
        >>> @checked()
        ... def twice(number: float, times: int = 2) -> float:
        ...     return number * times
        >>> twice("3")
        Traceback (most recent call last):
        ...
        stepwell.errors.InputError: number must be a finite number, got '3'.
    """

    def decorate(function: F) -> F:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def checking(*positional: Any, **named: Any) -> Any:
            _refuse_unknown(function.__name__, signature, named)
            given = signature.bind(*positional, **named)
            check_kinds(function, {name: value for name, value in given.arguments.items() if name not in besides})
            for name, value in given.arguments.items():
                if isinstance(value, Real) and hasattr(value, "item"):
                    given.arguments[name] = value.item()
            return function(*given.args, **given.kwargs)

        return typing.cast(F, checking)

    return decorate
