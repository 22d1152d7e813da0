"""The methods that come with Stepwell and those of installed packages and plugins: found, not listed by hand."""

from __future__ import annotations

import functools
import importlib
import os
import pkgutil
import re
from pathlib import Path

from stepwell.errors import InputError, UnknownName, folded
from stepwell.foreign.names import method_hint
from stepwell.process.kinds import kinds
from stepwell.recipe.card import Card
from stepwell.recipe.plugins import load_installed
from stepwell.recipe.registry import CARDS, find

MENTIONS = 3
"""Cards that may mention a word for it to point to one of them; a word in more of them says nothing."""


@functools.cache
def _find() -> None:
    """Import every file of this folder and of those in it, and the plugins of installed packages, once."""
    for module in pkgutil.walk_packages([os.fspath(Path(__file__).parent)], "stepwell.methods."):
        importlib.import_module(module.name)
    load_installed()


def names() -> list[str]:
    """The ids of all methods, sorted."""
    _find()
    return sorted(CARDS)


def get(name: str) -> Card:
    """The card of a method, by id or alias.

    Case, hyphens, underscores and spaces do not matter. An unknown name is an error that names the nearest method.

    Example:
        >>> get("Dr_GRPO").id, get("rf++").id
        ('dr-grpo', 'reinforce++')
    """
    _find()
    if not isinstance(name, str):
        raise InputError(f"A method is named by a text, such as 'grpo', got {name!r:.60}.")
    card = find(name)
    if card is None:
        spellings = {alias: card.id for card in CARDS.values() for alias in (card.title, *card.aliases)}
        raise UnknownName("method", name, CARDS, {**spellings, **_mentioned(name)}, hint=method_hint(name))
    return card


def search(words: str) -> list[Card]:
    """The cards that hold all these words: in ids, aliases, titles, papers, and in what they say.

    Case does not matter, and hyphens and underscores are spaces.

    Example:
        >>> [card.id for card in search("Group_Sequence policy-optimization")]
        ['gspo']
    """
    wanted = _spaced(words).split()
    return [card for card in map(get, names()) if all(word in _spaced(card.text) for word in wanted)]


def _spaced(text: str) -> str:
    """The text in lower case, with spaces for hyphens and underscores."""
    return text.casefold().replace("-", " ").replace("_", " ")


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


def _mentioned(name: str) -> dict[str, str]:
    """The method whose card mentions this name, such as that of another variant; nothing where many cards do."""
    cards = [card.id for card in CARDS.values() if folded(name) in _words(card.text)]
    return {name: min(cards)} if 0 < len(cards) <= MENTIONS else {}


def _words(text: str) -> set[str]:
    """The words of a text, folded; words with hyphens as a whole and in pieces."""
    whole = re.findall(r"[\w+@-]+", text)
    return {folded(word) for words in whole for word in (words, *words.split("-"))}
