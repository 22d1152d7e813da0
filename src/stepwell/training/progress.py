"""The view of a run: live in a terminal, one line a step elsewhere, or nothing."""

from __future__ import annotations

import contextlib
import math
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from stepwell.guarded import said_of
from stepwell.terminal import one_line, screen
from stepwell.training.settings import Settings

# The metrics that have a place of their own in the view, by their labels there.
SHOWN = {
    "reward": "reward",
    "evaluation": "evaluation/reward",
    "length": "length",
    "truncated": "truncated",
    "kl": "kl",
    "kl to old": "old_kl",
    "clip fraction": "clip_fraction",
    "gradient norm": "gradient_norm",
    "learning rate": "learning_rate",
}
UNITS = {"model_evaluations": "evaluations", "forward": "tokens forward", "backward": "tokens backward"}
BARS = "▁▂▃▄▅▆▇█"
REMEMBERED = 512


class View(Protocol):
    """A place that shows how a run goes on; `share_done` is from 0 to 1."""

    def start(self, settings: Settings, recipe_name: str) -> None: ...

    def step(
        self,
        metrics: Mapping[str, Any],
        clock: Mapping[str, Any],
        completions: Sequence[Mapping[str, Any]],
        share_done: float,
    ) -> None: ...

    def close(self) -> None: ...


def make_progress(enabled: bool, console: Console | None = None) -> View:
    """The view of a run: none unless `enabled`, live in a terminal, lines elsewhere (a file, a notebook's log)."""
    if not enabled:
        return Dispensable(None)
    # Standard output, since standard error is for failures, and may be all that a script looks at.
    screened: Any = screen(sys.stdout)
    return Dispensable(Progress(console or Console(file=screened)))


class Dispensable:
    """A view that is given up at its first failure, since the run is not about it; None shows nothing."""

    def __init__(self, view: View | None):
        self._view = view

    def start(self, settings: Settings, recipe_name: str) -> None:
        self._try(lambda view: view.start(settings, recipe_name))

    def step(
        self,
        metrics: Mapping[str, Any],
        clock: Mapping[str, Any],
        completions: Sequence[Mapping[str, Any]],
        share_done: float,
    ) -> None:
        self._try(lambda view: view.step(metrics, clock, completions, share_done))

    def close(self) -> None:
        self._try(lambda view: view.close())

    def _try(self, act: Callable[[View], None]) -> None:
        if self._view is None:
            return
        view = self._view
        try:
            act(view)
        except Exception as error:
            self._view = None
            with contextlib.suppress(Exception):  # a warning is one where warnings are errors
                view.close()
                warnings.warn(f"The view of the run is left out from now on: {said_of(error)}.", stacklevel=2)


class Progress:
    """The live view where `console` is a terminal, else one line a step."""

    def __init__(self, console: Console):
        self.console = console
        self._live: Live | None = None
        self._title, self._limit = "", ""
        self._metrics: Mapping[str, Any] = {}
        self._completions: Sequence[Mapping[str, Any]] = ()
        self._rewards: list[float] = []
        self._pace = Pace(time.monotonic())

    def start(self, settings: Settings, recipe_name: str) -> None:
        self._title = one_line(recipe_name)
        steps = None if settings.steps is None else f"{settings.steps} steps"
        budget = None if settings.budget is None else str(settings.budget)
        self._limit = " or ".join(limit for limit in (steps, budget) if limit)
        self._pace = Pace(time.monotonic())
        if self.console.is_terminal:
            self._live = Live(console=self.console, refresh_per_second=4, get_renderable=self.view)
            self._live.start()

    def step(
        self,
        metrics: Mapping[str, Any],
        clock: Mapping[str, Any],
        completions: Sequence[Mapping[str, Any]],
        share_done: float,
    ) -> None:
        self._metrics = {**metrics, "cost/wall_time": clock.get("wall_time", metrics.get("wall_time"))}
        self._completions = completions or self._completions
        if isinstance(metrics.get("reward"), int | float):
            self._rewards = [*self._rewards, float(metrics["reward"])][-REMEMBERED:]
        self._pace.at(time.monotonic(), share_done)
        if self._live is None:
            self.console.print(Text(self.line()), soft_wrap=True)

    def close(self) -> None:
        """Leave the last view on the screen and give the terminal back; further calls do nothing."""
        if self._live is not None:
            live, self._live = self._live, None
            live.stop()

    def line(self) -> str:
        """The present state in one line."""
        shown = {label: self._metrics.get(name) for label, name in SHOWN.items()}
        words = [f"step {self._metrics.get('step', '?')}", f"{100 * self._pace.share:.0f}%"]
        words += [f"{label} {number(value)}" for label, value in shown.items() if isinstance(value, int | float)]
        return "  ".join([*words, *(f"{unit} {amount}" for unit, amount in costs(self._metrics)), self._pace.words()])

    def view(self) -> RenderableType:
        """The whole picture at the console's present width."""
        width = self.console.width
        head = Text.assemble((self._title, "bold"), f"  {self._limit}  ", (self._pace.words(), "dim"))
        head.truncate(width, overflow="ellipsis")
        bar = Table.grid(expand=True)  # by itself, a bar ends no line
        bar.add_row(ProgressBar(total=1.0, completed=min(self._pace.share, 1.0), width=width))
        if not self._metrics:
            return Group(head, bar, Text("the first step is being drawn", style="dim"))
        return Group(head, bar, self._numbers(width), self._texts(width))

    def _numbers(self, width: int) -> RenderableType:
        """Metrics and costs, side by side in as many columns as fit."""
        cells = [("step", Text(str(self._metrics.get("step", "?"))))]
        for label, name in SHOWN.items():
            value = self._metrics.get(name)
            if isinstance(value, int | float):
                text = Text(number(value))
                if name == "reward" and self.console.encoding.startswith("utf"):
                    text.append(" " + sparkline(self._rewards, 12), style="cyan")
                cells.append((label, text))
        cells += [(unit, Text(amount)) for unit, amount in costs(self._metrics)]
        across = max(1, min(4, width // 40))
        deep = math.ceil(len(cells) / across)
        table = Table.grid(padding=(0, 1), expand=True)
        for _ in range(across):
            table.add_column(style="dim", no_wrap=True, ratio=2)
            table.add_column(no_wrap=True, ratio=3)
        for row in range(deep):
            chosen = [cells[place] if place < len(cells) else ("", Text()) for place in range(row, across * deep, deep)]
            table.add_row(*(part for label, text in chosen for part in (Text(label), text)))
        return table

    def _texts(self, width: int) -> RenderableType:
        """A few completions: the tail of the prompt, the completion, the reward, a line each."""
        table = Table(box=None, expand=True, pad_edge=False, header_style="dim")
        table.add_column("reward", justify="right", width=8, no_wrap=True)
        space = max(width - 8 - 4, 8)
        with_prompt = width >= 60
        share = space // 3 if with_prompt else 0
        if with_prompt:
            table.add_column("prompt", width=share, no_wrap=True, style="dim")
        table.add_column("completion", width=space - share, no_wrap=True)
        for completion in self._completions[: max(1, self.console.height - 14)]:
            reward = Text(number(completion.get("reward")))
            prompt = [Text(tail(said(completion.get("prompt")), share))] if with_prompt else []
            table.add_row(reward, *prompt, Text(both_ends(said(completion.get("completion")), space - share)))
        return table


class Pace:
    """The progress of a run and an estimate of its end, by the share of it done since this pace was made."""

    def __init__(self, begin: float):
        self.begin, self.now, self.share = begin, begin, 0.0
        self._first: tuple[float, float] | None = None

    def at(self, now: float, share: float) -> None:
        """The share done at a time; a resumed run's first share is not counted as this session's work."""
        if self._first is None:
            self._first = (now, share)
        self.now, self.share = now, share

    def remaining(self) -> float | None:
        """Seconds until the end, or None while it cannot be estimated."""
        if self._first is None:
            return None
        seconds, share = self.now - self._first[0], self.share - self._first[1]
        if share <= 0.0:  # one step only: as if the run had begun with it
            seconds, share = self.now - self.begin, self.share
        return max(1.0 - self.share, 0.0) * seconds / share if share > 0.0 else None

    def words(self) -> str:
        """The time gone and the time left."""
        left = self.remaining()
        return f"{duration(self.now - self.begin)} gone, {'?' if left is None else duration(left)} left"


def costs(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The cost so far, in every unit that is not zero."""
    amounts = []
    for name, value in metrics.items():
        unit = name.removeprefix("cost/")
        if unit != name and isinstance(value, int | float) and value:
            amount = duration(value) if unit == "wall_time" else whole(value)
            amounts.append((UNITS.get(unit, unit.replace("_", " ")), amount))
    return amounts


def number(value: Any) -> str:
    """A number in at most eight places.

    Example:
        >>> [number(value) for value in (0.51234, 12345.6, 1e-6, float("nan"), None)]
        ['0.512', '12346', '1.0e-06', 'nan', '-']
    """
    if not isinstance(value, int | float):
        return "-"
    if not math.isfinite(value):
        return str(value)
    if value == 0 or 1e-3 <= abs(value) < 1e3:
        return f"{value:.3g}"
    return f"{value:.0f}" if 1e3 <= abs(value) < 1e7 else f"{value:.1e}"


def whole(value: float) -> str:
    """An amount with its thousands named.

    Example:
        >>> [whole(value) for value in (950, 1500, 2_500_000)]
        ['950', '1.5k', '2.5M']
    """
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.0f}"


def duration(seconds: float) -> str:
    """Seconds as a person says them.

    Example:
        >>> [duration(value) for value in (4.2, 75, 3700)]
        ['4s', '1m15s', '1h01m']
    """
    count = round(seconds)
    if count < 60:
        return f"{count}s"
    return f"{count // 60}m{count % 60:02d}s" if count < 3600 else f"{count // 3600}h{count % 3600 // 60:02d}m"


def sparkline(values: Sequence[float], width: int) -> str:
    """The course of the values in at most `width` characters, each the mean of its share of them.

    Example:
        >>> sparkline([0, 1, 2, 3], 4)
        '▁▃▆█'
    """
    values = [value for value in values if math.isfinite(value)]
    count = min(width, len(values))
    parts = [values[place * len(values) // count : (place + 1) * len(values) // count] for place in range(count)]
    means = [math.fsum(part) / len(part) for part in parts]
    low, high = (min(means), max(means)) if means else (0.0, 0.0)
    spread = high - low
    return "".join(BARS[round((mean - low) / spread * (len(BARS) - 1)) if spread > 0 else 0] for mean in means)


def said(value: Any) -> str:
    """A prompt or completion on one line, without characters that would move a terminal's cursor."""
    if isinstance(value, list | tuple) and value and isinstance(value[-1], Mapping):
        value = value[-1].get("content")
    return one_line(value if isinstance(value, str) else "" if value is None else str(value))


def tail(text: str, width: int) -> str:
    """The end of the text, for a prompt's question is there."""
    return text if len(text) <= width else "…" + text[len(text) - width + 1 :]


def both_ends(text: str, width: int) -> str:
    """The beginning and the end of the text, for a completion's answer is there."""
    if len(text) <= width or width < 8:
        return text[: max(width, 0)]
    head = (width - 3) * 2 // 3
    return text[:head] + " … " + text[len(text) - (width - 3 - head) :]
