"""Where methods register: the decorator, and the cards by id. It knows no process and no method."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

from stepwell.errors import InputError, UnknownName
from stepwell.process.kinds import kinds
from stepwell.recipe.card import Card
from stepwell.recipe.recipe import Recipe
from stepwell.recipe.source import code_of

KINDS = ("training",)
"""Kinds of card: what a method is used for."""

CARDS: dict[str, Card] = {}
"""The cards of all methods that were registered so far, by id; `stepwell.methods.get` finds the others as well."""

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
        >>> @method("shout", title="A method of one's own")
        ... def shout(volume: float = 1.0) -> Recipe:
        ...     return Recipe(volume * Policy())
        >>> CARDS["shout"].recipe(volume=2.0).whole.terms[0].coefficient
        2.0
        >>> forget("shout")
    """

    def register(build: Callable[..., Recipe]) -> Callable[..., Recipe]:
        if not isinstance(id, str) or not re.fullmatch(r"[^\s,:=]+", id):
            raise InputError(f"The id of a method is {id!r:.40}; a text without spaces, commas, colons and = is right.")
        code, taken = code_of(build), code_of(CARDS[id].build) if id in CARDS else None
        if taken is not None and (taken.co_filename, taken.co_qualname) != (code.co_filename, code.co_qualname):
            raise InputError(f"There is a method '{id}' already, from {CARDS[id].source}; give yours another id.")
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
        if card.get("kind", "training") not in KINDS:
            raise UnknownName(f"kind of method for '{id}'", str(card["kind"]), KINDS)
        processes = card.get("processes", ("language",))
        if not isinstance(processes, tuple) or not processes:
            raise InputError(f"The processes of method '{id}' must be a tuple of kinds, got {processes!r:.60}.")
        for each in processes:
            if each not in kinds():
                raise UnknownName(f"kind of process for method '{id}'", str(each), kinds())
        CARDS[id] = Card(id, title, build, **{"source": _loading[-1], **card})
        return build

    return register


def forget(id: str) -> None:
    """Take a method out of the registry."""
    CARDS.pop(id, None)
