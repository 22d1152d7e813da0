"""One line that says how far a comparison is, in a terminal; a line a run elsewhere."""

from __future__ import annotations

from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars


class Progress:
    """A bar over all runs of a comparison, with the run of the moment beside it."""

    def __init__(self, enabled: bool, title: str, budget: str, runs: int, console: Console | None = None):
        self.console = console or Console(stderr=True)
        self.enabled, self.live = enabled, enabled and self.console.is_terminal
        self.runs, self.done = runs, 0
        self.title = f"{title}, {runs} runs of {budget}"
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
        self.bars = Bars(*columns, console=self.console, transient=True, disable=not self.live)
        self.bar: Any = None

    def __enter__(self) -> Self:
        if self.enabled:
            self.console.print(self.title, highlight=False)
        self.bars.start()
        self.bar = self.bars.add_task("", total=float(self.runs))
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.stop()

    def say(self, what: str) -> None:
        """What is being done now."""
        self.what = what
        self.bars.update(self.bar, description=what)
        if self.enabled and not self.live:
            self.console.print(f"[{self.done + 1}/{self.runs}] {what}", highlight=False, markup=False)

    def share(self, share: float, note: str) -> None:
        """How much of the present run's budget is spent."""
        self.bars.update(self.bar, completed=self.done + min(share, 1.0), description=f"{self.what} ({note})")

    def next(self) -> None:
        """A run is over."""
        self.done += 1
        self.bars.update(self.bar, completed=float(self.done))
