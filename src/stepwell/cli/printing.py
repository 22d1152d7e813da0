"""Output of the command line: tables, lists and cards of methods, and JSON. Plain text, so that it comes at once."""

from __future__ import annotations

import collections
import json
import os
import shutil
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from stepwell.terminal import one_line, printable
from stepwell.writing import json_text

if TYPE_CHECKING:
    from stepwell.recipe.card import Card
    from stepwell.solver.table import Table

GAP = "  "
ENDLESS = 10**6
"""The width of output that goes into a file or another program."""
TITLE = 44
"""Columns that a list of methods has for titles where there is room for more than them."""
ADVICE = 36
"""Columns that it takes for the advice of when to use a method to be worth showing."""


def print_json(value: Any) -> None:
    """JSON on standard output; characters that would steer a terminal are written as JSON's escapes."""
    text = json_text(value, indent=2)
    print("".join(letter if letter.isprintable() or letter == "\n" else _escaped(letter) for letter in text))


def _escaped(letter: str) -> str:
    """A character as JSON writes it in ASCII."""
    return json.dumps(letter)[1:-1] if ord(letter) != 127 else "\\u007f"


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], wrap: bool = False) -> None:
    """A table of one line a row, whose last column is cut to the terminal, or wrapped."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    widths[-1] = min(widths[-1], max(_width() - sum(widths[:-1]) - len(GAP) * (len(widths) - 1), len(header[-1])))
    print(_styled(_line(header, widths), "1"))
    for row in rows:
        pieces = (wrap and textwrap.wrap(row[-1], widths[-1], break_on_hyphens=False)) or [row[-1]]
        print(_line((*row[:-1], pieces[0]), widths))
        for piece in pieces[1:]:
            print(_line((*[""] * len(row[:-1]), piece), widths))


def print_methods(cards: Sequence[Card]) -> None:
    """The methods by what they are for, a line each: id and title, and when to use it where there is room."""
    from stepwell.process.kinds import kinds

    widths, plural = _method_widths(cards), kinds()
    groups = collections.defaultdict(list)
    for card in cards:
        made_for = " and ".join(plural.get(kind, kind) for kind in card.processes)
        groups[f"{card.kind} of {made_for}"].append(card)
    for place, (group, members) in enumerate(sorted(groups.items(), key=lambda entry: -len(entry[1]))):
        print("\n" * (place > 0) + _styled(f"{group} ({len(members)})", "1"))
        for card in members:
            print(_line((card.id, card.title, card.when or card.differs)[: len(widths)], widths))


def _method_widths(cards: Sequence[Card]) -> list[int]:
    """The widths of ids, titles and, where there is room, advice."""
    ids, titles = max(len(card.id) for card in cards), max(len(card.title) for card in cards)
    left = _width() - ids - len(GAP)
    if _width() == ENDLESS:
        return [ids, titles, left]
    advice = left - TITLE - len(GAP)
    return [ids, TITLE, advice] if advice >= ADVICE else [ids, max(left, 8)]


def print_card(card: Card) -> None:
    """Everything there is to know of a method."""
    about = card.as_dict()
    proof = f"{', '.join(card.proof)}: exact answers, which `stepwell check {card.id}` computes and compares"
    print(f"{_styled(card.id, '1')}  {one_line(card.title)}{f' ({card.year})' if card.year else ''}")
    _print_labelled(
        {
            "also": ", ".join(card.aliases),
            "when": card.when,
            "what differs": card.differs,
            "note": card.note,
            "paper": card.paper,
            "arXiv": f"https://arxiv.org/abs/{card.arxiv}" if card.arxiv else "",
            "for": ", ".join(card.processes),
            "needs": "\n".join(about["needs"]),
            "options": "\n".join(f"{name} = {value!r}" for name, value in card.options.items()) or "none",
            "parts": "\n".join(about["parts"]),
            "proved by": proof if card.proof else "no exact answer yet",
            "from": card.source,
        }
    )
    print(f"\n{about['command']}")


def print_solver(solver: Table) -> None:
    """The table of a solver, a setting a line."""
    _print_labelled({name: f"{value}" for name, value in asdict(solver).items()})


def _print_labelled(entries: dict[str, str]) -> None:
    """Each label with its text beside it, wrapped to the terminal; labels without a text are left out."""
    width = max(map(len, entries)) + len(GAP)
    for label, text in entries.items():
        pieces = [
            piece
            for line in printable(text).splitlines()
            for piece in textwrap.wrap(line, max(_width() - width, 20), break_on_hyphens=False)
        ]
        for place, piece in enumerate(pieces):
            print(_styled(f"{'' if place else label:{width}}", "2") + piece)


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    """Cells side by side; one that is wider than its column ends in an ellipsis."""
    *first, last = (
        _cut(one_line(cell) if cell.strip() else cell, width) for cell, width in zip(cells, widths, strict=True)
    )
    return GAP.join([*(f"{cell:{width}}" for cell, width in zip(first, widths, strict=False)), last]).rstrip()


def _cut(text: str, width: int) -> str:
    ellipsis = "…" if "utf" in (sys.stdout.encoding or "").lower() else "..."
    return text if len(text) <= width else text[: width - len(ellipsis)].rstrip() + ellipsis


def _width() -> int:
    """Columns of the terminal, or of COLUMNS; endless where the output goes into a file or another program."""
    if not sys.stdout.isatty() and "COLUMNS" not in os.environ:
        return ENDLESS
    return shutil.get_terminal_size().columns


def _styled(text: str, code: str) -> str:
    """The text in a style of terminals (1: bold, 2: dim), where it goes to one."""
    return f"\033[{code}m{text}\033[0m" if sys.stdout.isatty() and "NO_COLOR" not in os.environ else text
