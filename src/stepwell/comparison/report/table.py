"""A comparison on the terminal: one row a method, and a line of findings."""

from __future__ import annotations

import math

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from stepwell.comparison.findings import Findings, find, number, percent
from stepwell.comparison.results import Comparison
from stepwell.comparison.statistics import Interval

UNITS = {
    "wall_time": "seconds",
    "model_evaluations": "evaluations",
    "forward": "tokens forward",
    "backward": "tokens backward",
    "reward_calls": "reward calls",
    "constraint_checks": "constraint checks",
}


def unit_name(unit: str, work: str = "tokens") -> str:
    """A unit of cost in words; `work` are the units of a network's forward passes (`Process.work`).

    Example:
        >>> unit_name("forward"), unit_name("forward", "latents")
        ('tokens forward', 'latents forward')
    """
    return UNITS[unit].replace("tokens", work)


def amount(value: float) -> str:
    """A cost in few characters.

    Example:
        >>> [amount(value) for value in (0, 7.25, 812, 8_120, 3_456_000)]
        ['0', '7.2', '812', '8.1 k', '3.5 M']
    """
    for size, unit in ((1e9, " B"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= size:
            return f"{value / size:.1f}{unit}" if abs(value) < 100 * size else f"{value / size:.0f}{unit}"
    return f"{value:.0f}" if value == int(value) or abs(value) >= 100 else f"{value:.1f}"


def spread(interval: Interval, comparison: Comparison, signed: bool = False) -> str:
    """An interval in brackets."""
    low, high = (number(end, comparison, signed) for end in (interval.low, interval.high))
    return f"[{low}, {high}]"


def measure(value: Interval) -> tuple[str, str]:
    """A measure and its interval, which is empty for a single seed.

    Example:
        >>> measure(Interval(0.1234, 0.1, 0.2)), measure(Interval(3.0, float("nan"), float("nan")))
        (('0.123', '[0.1, 0.2]'), ('3', ''))
    """
    interval = "" if math.isnan(value.low) else f"[{value.low:.3g}, {value.high:.3g}]"
    return ("–" if math.isnan(value.value) else f"{value.value:.3g}"), interval


def units_spent(findings: Findings) -> list[str]:
    """The units in which anything was spent, in the order of `UNITS`."""
    return [unit for unit in UNITS if any(row.cost.get(unit) for row in findings.rows)]


def print_comparison(comparison: Comparison, console: Console | None = None) -> None:
    """Print the tables, the findings and the errors."""
    console = console or Console()
    findings = find(comparison)
    if findings is None:
        console.print(Text("No method finished a run."))
        for label, error in comparison.errors.items():
            console.print(Text(f"{label} failed ({error})."))
        return
    sign, unit = percent(comparison).strip(), comparison.task["unit"]
    scores = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    scores.add_column("method", no_wrap=True)
    for name in (" ".join(filter(None, (unit, sign))), "gain on the start"):
        scores.add_column(name, justify="right", no_wrap=True)
    costs = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    costs.add_column("spent, on average", no_wrap=True)
    spent = units_spent(findings)
    for name in ("steps", *(unit_name(cost, comparison.work) for cost in spent)):
        costs.add_column(name, justify="right")
    for row in findings.rows:
        gain = Text(f"{number(row.gain.value, comparison, True)} {spread(row.gain, comparison, True)}")
        gain.stylize("green" if row.gain.above_zero else "red" if row.gain.below_zero else "")
        name_cell = Text(row.label, style="bold")
        scores.add_row(name_cell, f"{number(row.score.value, comparison)} {spread(row.score, comparison)}", gain)
        costs.add_row(name_cell, amount(row.steps), *(amount(row.cost[cost]) for cost in spent))
    start = findings.start
    scores.add_row("[dim]start", f"{number(start.value, comparison)} {spread(start, comparison)}", "")
    console.print(scores)
    if findings.start_measures:
        console.print(_measures(findings))
    console.print(costs)
    for place, line in enumerate(findings.sentences):
        console.print(Text(line, style="bold" if place == 0 else ""))
    seeds = comparison.shared_seeds
    word = "seed" if len(seeds) == 1 else "seeds"
    samples = (
        f"{comparison.evaluation['prompts']} {comparison.held_out}, {comparison.evaluation['samples']} samples each"
    )
    console.print(Text(f"Means over {len(seeds)} {word} and {samples}; 95 % intervals in brackets.", style="dim"))


def _measures(findings: Findings) -> Table:
    """The task's measures of the samples, besides their reward; intervals stand below, since names are long."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("after training", no_wrap=True)
    for name in findings.start_measures:
        table.add_column(Text(name), justify="right")
    ends = [(Text(row.label, style="bold"), row.measures) for row in findings.rows]
    for label, measures in [*ends, (Text("start", style="dim"), findings.start_measures)]:
        cells = [Text("\n".join(filter(None, measure(value)))) for value in measures.values()]
        table.add_row(label, *cells)
    return table
