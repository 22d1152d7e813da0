"""The place where methods register: the decorator, and the cards by id. It knows no process and no method."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

from stepwell.errors import InputError, UnknownName, folded
from stepwell.process.kinds import kinds
from stepwell.recipe.card import Card
from stepwell.recipe.recipe import Recipe
from stepwell.recipe.source import code_of

KINDS = ("training",)
"""Kinds of card, by what a method is used for."""

CARDS: dict[str, Card] = {}
"""The cards of all methods that were registered so far, by id; `stepwell.methods.get` finds the others as well."""

NAME = r"[^\s,:=]+"
"""The form of ids and aliases: commas, colons and = separate them from options where methods are written in a row."""

_loading = ["stepwell"]


@contextmanager
def registering(source: str) -> Iterator[None]:
    """Cards that are registered inside name `source` as where they come from."""
    _loading.append(source)
    try:
        yield
    finally:
        _loading.pop()


def method(id: str, *, title: str, **card: Any) -> Callable[[Callable[..., Recipe]], Callable[..., Recipe]]:
    """Register a function that builds a Recipe; its parameters are the method's options and all have defaults.

    A registered method is listed, documented, property-tested and comparable with no further line.

    Example:
        >>> from stepwell.objective.policy import Policy
        >>> @method("shout", title="A method of one's own", aliases=("yell",))
        ... def shout(volume: float = 1.0) -> Recipe:
        ...     return Recipe(volume * Policy())
        >>> find("YELL").recipe(volume=2.0).whole.terms[0].coefficient
        2.0
        >>> forget("shout")
    """

    def register(build: Callable[..., Recipe]) -> Callable[..., Recipe]:
        made = Card(id, title, build, **{"source": _loading[-1], **_checked(id, card)})
        _check_build(id, build)
        for name in (id, *made.aliases):
            other = find(name)
            if other is not None and not (other.id == id and _same_function(other.build, build)):
                raise InputError(
                    f"There is a method '{name}' already, {_origin(other, name)}; give yours another name."
                )
        CARDS[id] = made
        return build

    return register


def find(name: str) -> Card | None:
    """The card of the method with this id or alias, however its case, hyphens, underscores and spaces are typed."""
    if name in CARDS:
        return CARDS[name]
    return next((card for card in CARDS.values() if folded(name) in map(folded, (card.id, *card.aliases))), None)


def forget(id: str) -> None:
    """Take a method out of the registry."""
    CARDS.pop(id, None)


def _checked(id: str, card: dict[str, Any]) -> dict[str, Any]:
    """The entries of a card, if each is known and what it has to be."""
    if not isinstance(id, str) or not re.fullmatch(NAME, id):
        raise InputError(f"The id of a method must be a text without spaces, commas, colons and =, got {id!r:.40}.")
    known = [entry.name for entry in fields(Card) if entry.name not in ("id", "title", "build")]
    for name in card:
        if name not in known:
            raise UnknownName(f"entry of the card of '{id}' named", name, known)
    proof, aliases = card.get("proof", ()), card.get("aliases", ())
    if not isinstance(proof, list | tuple) or not all(isinstance(name, str) for name in proof):
        raise InputError(f"The proof of method '{id}' must be a tuple of oracles' names, got {proof!r:.60}.")
    if not isinstance(aliases, tuple) or not all(
        isinstance(name, str) and re.fullmatch(NAME, name) for name in aliases
    ):
        raise InputError(f"The aliases of method '{id}' must be a tuple of names such as ids, got {aliases!r:.60}.")
    if card.get("kind", "training") not in KINDS:
        raise UnknownName(f"kind of method for '{id}'", str(card["kind"]), KINDS)
    processes = card.get("processes", ("language",))
    if not isinstance(processes, tuple) or not processes:
        raise InputError(f"The processes of method '{id}' must be a tuple of kinds, got {processes!r:.60}.")
    for each in processes:
        if each not in kinds():
            raise UnknownName(f"kind of process for method '{id}'", str(each), kinds())
    return card


def _check_build(id: str, build: Callable[..., Recipe]) -> None:
    """Raise `InputError` for a builder that is no function, or has an option without a default."""
    code_of(build)
    for name, parameter in inspect.signature(build).parameters.items():
        if parameter.default is inspect.Parameter.empty:
            raise InputError(f"Option '{name}' of method '{id}' has no default; every option needs one.")


def _same_function(one: Callable[..., Recipe], other: Callable[..., Recipe]) -> bool:
    """True for the same function of the same file, which may be run again, as notebooks and reloads do."""
    places = [(code.co_filename, code.co_qualname) for code in map(code_of, (one, other))]
    return places[0] == places[1]


def _origin(card: Card, name: str) -> str:
    """The origin of a name that is taken, as a message says it."""
    return f"from {card.source}" if folded(name) == folded(card.id) else f"an alias of '{card.id}' from {card.source}"
