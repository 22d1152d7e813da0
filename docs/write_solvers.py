"""Writes docs/solvers.md from the tables of all solvers; a test says whether it is up to date."""

from __future__ import annotations

import inspect
from dataclasses import fields
from pathlib import Path

import stepwell as sw
from stepwell.solver.table import Table

MEASURED = Path(__file__).with_name("solvers_measured.md")
"""What `make bench NAME=...` measured, if it did; it stands at the end of the page as it is."""


def page() -> str:
    lines = [
        "# The solvers",
        "",
        "Written by `make docs` from `stepwell.solver.table.TABLES`; `stepwell solvers` lists the same, and `stepwell",
        "solvers NAME` prints one. A solver is a row of choices over one exponential integrator, so a new one is an",
        "edited row:",
        "",
        "```bash",
        "stepwell solvers dpmpp-2m --save mine.json     # edit it, then draw with it",
        "stepwell sample --pipeline DIR --prompt 'a cat' --solver mine.json --steps 10",
        "```",
        "",
        "```python",
        'process.with_sampler(solver=sw.solvers()["dpmpp-2m"].replace(order=3, weights="exact"), steps=10)',
        "```",
        "",
        "A step of two evaluations asks the model twice, but mostly once in the last step, to t = 0. Solvers that draw",
        "noise have a density in every step, which is what policy gradients train; the others follow the ODE.",
        "",
        "| solver | order | evaluations a step | noise | what differs from the plainest row | source |",
        "|---|---|---|---|---|---|",
    ]
    for table in sw.solvers().values():
        noise = f"{table.noise}, level {table.level:.3g}" if table.stochastic else "none"
        cells = (f"`{table.name}`", table.order, table.evaluations, noise, choices(table), table.source)
        lines.append("| " + " | ".join(f"{cell}".replace("|", "/") for cell in cells) + " |")
    lines += ["", "## What a row says", "", "```text", settings(), "```", ""]
    if MEASURED.is_file():
        lines += [MEASURED.read_text().strip(), ""]
    return "\n".join(lines)


def choices(table: Table) -> str:
    """The entries that are not the defaults, but for those that have columns of their own."""
    shown = {"name", "order", "noise", "level", "source"}
    other = [entry for entry in fields(Table) if entry.name not in shown]
    words = [f"`{entry.name}={getattr(table, entry.name)}`" for entry in other]
    return ", ".join(w for w, entry in zip(words, other, strict=True) if getattr(table, entry.name) != entry.default)


def settings() -> str:
    """The part of the table's docstring that explains its entries."""
    text = inspect.getdoc(Table) or ""
    return text.split("\n\n", 1)[1].split("\n\nExample:", 1)[0]


if __name__ == "__main__":
    Path(__file__).with_name("solvers.md").write_text(page())
