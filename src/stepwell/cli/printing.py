"""What the command line prints: tables, cards of methods, and JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table as Grid
from rich.text import Text

from stepwell.recipe.card import Card
from stepwell.solver.table import Table
from stepwell.writing import json_text


def print_json(value: Any) -> None:
    """JSON on standard output."""
    print(json_text(value, indent=2))


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table as wide as the terminal; its first column is never cut."""
    table = Grid(box=box.SIMPLE_HEAD, pad_edge=False)
    for place, name in enumerate(header):
        table.add_column(name, no_wrap=place == 0, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell, style="bold" if place == 0 else "") for place, cell in enumerate(row)))
    Console().print(table)


def print_card(card: Card) -> None:
    """Everything there is to know of a method."""
    about = card.as_dict()
    console = Console()
    console.print(Text.assemble((card.id, "bold"), f"  {card.title}", f" ({card.year})" if card.year else ""))
    table = Grid.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    link = f"https://arxiv.org/abs/{card.arxiv}" if card.arxiv else ""
    options = "\n".join(f"{name} = {value!r}" for name, value in about["options"].items())
    number = "" if card.catalogue is None else str(card.catalogue)
    for label, text in (
        ("what differs", card.differs),
        ("as published", card.note),
        ("paper", card.paper),
        ("arXiv", link),
        ("for", ", ".join(card.processes)),
        ("options", options or "none"),
        ("parts", "\n".join(about["parts"])),
        ("proof", ", ".join(about["proof"]) or "none yet"),
        ("catalogue", number),
        ("from", card.source),
    ):
        if text:
            table.add_row(label, Text(text))
    console.print(table)


def print_solver(solver: Table) -> None:
    """The table of a solver, a setting a line."""
    grid = Grid.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in asdict(solver).items():
        grid.add_row(name, Text(f"{value}", style="bold" if name == "name" else ""))
    Console().print(grid)
