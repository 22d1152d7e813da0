"""The methods that come with Stepwell and those of installed packages and plugins: found, not listed by hand."""

from __future__ import annotations

import functools
import importlib
import os
import pkgutil
from pathlib import Path

from stepwell.errors import InputError, UnknownName
from stepwell.process.kinds import kinds
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


def check_kind(card: Card, kind: str | None) -> None:
    """Raise `InputError` for a method that is not for this kind of process (`Process.kind`); None is any."""
    if kind is None or kind in card.processes:
        return
    others = [name for name in names() if kind in CARDS[name].processes]
    hint = f"such as {', '.join(others[:4])}; one of your own is registered with processes=('{kind}',)"
    words = kinds()
    made_for = " and ".join(words[each] for each in card.processes)
    raise InputError(
        f"The method '{card.id}' trains {made_for}, and not {words[kind]}; choose a method for them, {hint}."
    )
