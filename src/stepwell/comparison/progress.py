"""The progress of a comparison: one bar in a terminal, a line for each run elsewhere."""

from __future__ import annotations

import sys
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from stepwell.terminal import one_line, screen


class ComparisonProgress:
    """A bar over all runs of a comparison, with the present run beside it."""

    def __init__(self, enabled: bool, title: str, budget: str, runs: int, console: Console | None = None):
        screened: Any = screen(sys.stderr)
        self.console = console or Console(file=screened)
        self.enabled, self.live = enabled, enabled and self.console.is_terminal
        self.runs, self.done = runs, 0
        self.title = one_line(f"{title}, {runs} runs of {budget}")
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
        self.bars = Bars(*columns, console=self.console, transient=True, disable=not self.live)
        self.bar: Any = None

    def __enter__(self) -> Self:
        if self.enabled:
            self.console.print(self.title, highlight=False, markup=False)
        self.bars.start()
        self.bar = self.bars.add_task("", total=float(self.runs))
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.stop()

    def say(self, activity: str) -> None:
        """Show what is being done now."""
        self.activity = activity = one_line(activity)
        self.bars.update(self.bar, description=activity)
        if self.enabled and not self.live:
            self.console.print(f"[{self.done + 1}/{self.runs}] {activity}", highlight=False, markup=False)

    def share(self, share: float, note: str) -> None:
        """Show the share of the present run's budget that is spent."""
        self.bars.update(self.bar, completed=self.done + min(share, 1.0), description=f"{self.activity} ({note})")

    def next(self, runs: int = 1) -> None:
        """Count finished runs."""
        self.done += runs
        self.bars.update(self.bar, completed=float(self.done))
