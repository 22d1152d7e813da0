"""The methods that come with Stepwell and those of installed packages and plugins: found, not listed by hand."""

from __future__ import annotations

import functools
import importlib
import os
import pkgutil
from pathlib import Path

from stepwell.errors import InputError, UnknownName
from stepwell.process.exact import TabularLanguage
from stepwell.process.flow.process import Flow
from stepwell.process.language.process import Language
from stepwell.recipe.card import Card
from stepwell.recipe.plugins import load_installed
from stepwell.recipe.registry import CARDS


@functools.cache
def _find() -> None:
    """Import every file of this room and of its folders, and what installed packages offer, once."""
    for module in pkgutil.walk_packages([os.fspath(Path(__file__).parent)], "stepwell.methods."):
        importlib.import_module(module.name)
    load_installed()


def names() -> list[str]:
    """The ids of all methods, sorted."""
    _find()
    return sorted(CARDS)


def get(id: str) -> Card:
    """The card of a method; an unknown id is an error that names the nearest."""
    _find()
    if id not in CARDS:
        raise UnknownName("method", id, CARDS)
    return CARDS[id]


def check_room(card: Card, room: str | None) -> None:
    """Raise `InputError` for a flow's method on a language model, and the reverse (`room_of` the process)."""
    if room is None or card.room == room or card.room not in _KINDS:
        return
    others = [name for name in names() if CARDS[name].room == room]
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
