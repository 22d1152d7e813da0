"""The commands that list and print methods, solvers and tasks: `stepwell methods`, `solvers` and `tasks`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from stepwell.cli.command import Command, named
from stepwell.cli.processes.options import Texts
from stepwell.errors import InputError

if TYPE_CHECKING:
    from stepwell.solver.table import Table


@dataclass(kw_only=True)
class Methods(Command):
    """List every method, or print the card of one."""

    id: tyro.conf.Positional[str | None] = None  # the method whose card is printed
    json: bool = False  # print JSON: a list of cards, or the one card
    search: Texts = ()  # list only methods whose id, title, paper or card holds all these words

    def run(self) -> None:
        self.load_plugins()
        from stepwell.cli.printing import print_card, print_json, print_methods
        from stepwell.methods import catalogue

        if self.id is not None:
            card = catalogue.get(self.id)
            print_json(card.as_dict()) if self.json else print_card(card)
            return
        cards = catalogue.search(" ".join(self.search))
        if self.json:
            print_json([card.as_dict() for card in cards])
        elif not cards:
            raise InputError(f"No method's card holds '{' '.join(self.search)}'; `stepwell methods` lists them all.")
        else:
            print_methods(cards)


@dataclass(kw_only=True)
class Solvers(Command):
    """List every solver of flows, or print the table of one."""

    id: tyro.conf.Positional[str | None] = None  # the solver whose table is printed; or a .json file of your own
    json: bool = False  # print JSON: a list of tables, or the one table
    save: str | None = None  # write the one table to this file, which --solver reads

    def run(self) -> None:
        self.load_plugins()
        from stepwell.cli.printing import print_json, print_solver, print_table
        from stepwell.cli.processes.solver import solver_from
        from stepwell.solver.table import TABLES
        from stepwell.writing import json_text, write_whole

        if self.id is None:
            if self.save is not None:
                raise InputError("--save writes one solver; name it, as in `stepwell solvers heun --save mine.json`.")
            if self.json:
                print_json([asdict(table) for table in TABLES.values()])
            else:
                columns = ("solver", "order", "evaluations a step", "noise", "source")
                rows = [
                    (table.name, str(table.order), str(table.evaluations), _noise(table), table.source)
                    for table in TABLES.values()
                ]
                print_table(columns, rows)
            return
        table = solver_from(self.id)
        if self.save is not None:
            if not self.save.endswith(".json"):
                raise InputError(f"--save is '{self.save}'; a name that ends in .json is right, which --solver reads.")
            if Path(named(self.save)).exists():
                raise InputError(f"'{self.save}' is there already and is not overwritten; choose another name.")
            write_whole(self.save, json_text(asdict(table), indent=2) + "\n")
            print(f"The solver {table.name} is in {self.save}; edit it and draw with --solver {self.save}.")
        elif self.json:
            print_json(asdict(table))
        else:
            print_solver(table)


@dataclass(kw_only=True)
class Tasks(Command):
    """List the tasks that methods are compared on."""

    def run(self) -> None:
        self.load_plugins()
        from stepwell.cli.printing import print_table
        from stepwell.tasks.registry import tasks

        print_table(("task", "what is learnt"), [(entry.name, entry.summary) for entry in tasks()], wrap=True)


def _noise(table: Table) -> str:
    """The noise that a step draws, in words.

    Example:
        >>> from stepwell.solver.table import table
        >>> _noise(table("heun")), _noise(table("ddpm"))
        ('none', 'eta 1')
    """
    return "none" if not table.stochastic else f"{table.noise} {table.level:.3g}"
