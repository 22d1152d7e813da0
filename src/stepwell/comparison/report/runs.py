"""Single training runs as a page: the curves of every metric, costs, and completions early and late in training."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stepwell.comparison.report.gallery import embedded, shown
from stepwell.comparison.report.page import chart, count_of, number_or_nan, plain, render, reproduction, write_report
from stepwell.comparison.report.table import UNITS, amount, unit_name
from stepwell.comparison.results import FILE, Comparison
from stepwell.errors import InputError
from stepwell.figures import charts
from stepwell.figures.charts import Curve
from stepwell.guarded import said_of
from stepwell.paths import usable
from stepwell.sampling.request import Prompt
from stepwell.tasks.registry import plainly
from stepwell.training.log import CLOCK, COMPLETIONS, METRICS, RUN, SAMPLES, read_lines
from stepwell.writing import write_whole

FIRST = ("reward", "evaluation/reward", "length", "truncated", "kl", "old_kl", "clip_fraction", "gradient_norm")
"""The metrics that come first; all others follow by name."""
MOST_POINTS = 400
"""The most points of a curve."""
MOST_PICTURES = 6
"""The most pictures of a run's samples, spread over all that it drew."""


@dataclass(frozen=True)
class RunFolder:
    """The content of a run's folder: a metrics entry a step, completions, run.json, and the seconds since the start."""

    label: str
    path: Path
    metrics: list[dict[str, Any]]
    completions: list[dict[str, Any]]
    about: dict[str, Any]
    seconds: float | None


def report_runs(folders: Sequence[str | Path], out: str | Path) -> Path:
    """Write one page on the runs in these folders to `out`, at one stroke, and return its path.

    One folder with a comparison.json is reported as a comparison. Raises `InputError` for a folder without a run.
    """
    if not folders:
        raise InputError("folders must name at least one run, got none.")
    out = usable(out, "The file of the page")
    out = out / "report.html" if out.is_dir() else out
    places = [usable(folder, "The folder of a run") for folder in folders]
    if len(places) == 1 and (places[0] / FILE).is_file():
        comparison = Comparison.load(places[0])
        if not comparison.complete and not comparison.errors:
            raise InputError(f"'{places[0]}' must hold at least one run of its comparison, got no finished run.")
        with _as_written(places[0] / FILE):
            return write_report(comparison, out)
    runs = [_read(place) for place in places]
    labels = [run.label for run in runs]
    if len(set(labels)) < len(labels):  # names may repeat, paths do not
        runs = [RunFolder(**{**vars(run), "label": str(run.path)}) for run in runs]
    with _as_written(*(run.path for run in runs)):
        page = render(runs_page(runs))
    write_whole(out, page)
    return out


@contextlib.contextmanager
def _as_written(*places: Path) -> Iterator[None]:
    """Refuse files that hold other things than Stepwell writes into them."""
    try:
        yield
    except (TypeError, ValueError, KeyError, AttributeError, IndexError, OverflowError) as error:
        words = ", ".join(f"'{place}'" for place in places)
        raise InputError(f"{words} must be as Stepwell wrote it; it cannot be drawn: {said_of(error)}.") from error


def _read(folder: Path) -> RunFolder:
    metrics = [entry for entry in read_lines(folder / METRICS) if isinstance(entry, dict)]
    if not metrics:
        reason = "no finished step" if folder.is_dir() else "a file" if folder.exists() else "no such folder"
        raise InputError(f"'{folder}' must be a run's folder, with at least one line in {METRICS}, got {reason}.")
    try:
        about = json.loads((folder / RUN).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        about = {}
    clock = read_lines(folder / CLOCK)
    with _as_written(folder):
        seconds = clock[-1].get("seconds", {}).get("wall_time") if clock else None
    name = folder.resolve().name
    return RunFolder(
        name, folder, metrics, read_lines(folder / COMPLETIONS), about if isinstance(about, dict) else {}, seconds
    )


def runs_page(runs: Sequence[RunFolder]) -> dict[str, Any]:
    """The content of the page of runs, by the names that the template reads."""
    names = ", ".join(run.label for run in runs)
    galleries = [gallery for run in runs for gallery in _pictures(run, len(runs) > 1)]
    drawing = {run.label for run in runs if any("picture" in entry for entry in run.completions)}
    facts: list[tuple[str, Any]] = [("runs", len(runs)), ("steps", ", ".join(str(len(run.metrics)) for run in runs))]
    methods = list(dict.fromkeys(str(run.about["method"]) for run in runs if run.about.get("method")))
    if methods:
        facts.append(("methods", ", ".join(methods)))
    return {
        "title": f"Runs: {names}" if len(runs) > 1 else f"Run: {names}",
        "eyebrow": "Stepwell training runs" if len(runs) > 1 else "Stepwell training run",
        "heading": names,
        "sentences": [_sentence(run) for run in runs],
        "description": "A single run has no interval: whether one method is better than another takes several seeds of "
        "each, as `stepwell compare` runs them.",
        "facts": facts,
        "errors": [],
        "tables": [_table(runs)],
        "legend": [(run.label, place) for place, run in enumerate(runs)],
        "sections": _sections(runs) + galleries,
        "images": bool(galleries),
        "samples": [
            _samples(run, place) for place, run in enumerate(runs) if run.completions and run.label not in drawing
        ],
        "samples_title": "Completions",
        "samples_note": "The first and the last answers in the log.",
        "cards": [
            _card(run, place) for place, run in enumerate(runs) if run.about.get("card") or run.about.get("parts")
        ],
        "commands": [],
        "reproduction": [
            (f"{run.label}: {name}" if len(runs) > 1 else name, value)
            for run in runs
            for name, value in reproduction(run.about.get("settings", {}), run.about)
        ],
        "footnote": "Rewards are those of training; evaluation/reward is the mean over held-out prompts, where the run "
        "was evaluated. Made with Stepwell.",
    }


def _sentence(run: RunFolder) -> str:
    """The reward's change between the first and the last tenth of the run."""
    rewards = np.array([number_or_nan(entry.get("reward")) for entry in run.metrics])
    rewards = rewards[np.isfinite(rewards)]
    if not len(rewards):
        return f"{run.label}: {count_of(len(run.metrics), 'step')}, without a reward of the policy's own samples."
    tenth = max(1, len(rewards) // 10)
    first, last = float(rewards[:tenth].mean()), float(rewards[-tenth:].mean())
    ends = f"from {first:.3g} to {last:.3g} over {count_of(len(rewards), 'step')}"
    return f"{run.label}: the training reward went {ends} (means of the first and the last tenth)."


def _table(runs: Sequence[RunFolder]) -> dict[str, Any]:
    units = [unit for unit in UNITS if unit == "wall_time" or any(r.metrics[-1].get(f"cost/{unit}") for r in runs)]
    rows = []
    for place, run in enumerate(runs):
        last = run.metrics[-1]
        spent = {unit: last.get(f"cost/{unit}") for unit in units} | {"wall_time": run.seconds}
        rewarded = f"{number_or_nan(last['reward']):.3g}" if "reward" in last else "–"
        cells = [plain(rewarded), plain(str(len(run.metrics)))]
        cells += [plain("" if spent[unit] is None else amount(float(spent[unit] or 0))) for unit in units]
        rows.append({"label": run.label, "series": place, "kind": "", "cells": cells})
    works = " or ".join(dict.fromkeys(str(run.about.get("work", "tokens")) for run in runs))
    header = ["run", "last reward", "steps", *(unit_name(unit, works) for unit in units)]
    return {"title": "Costs", "note": "The cost of each run, in every unit.", "header": header, "rows": rows}


def _sections(runs: Sequence[RunFolder]) -> list[dict[str, Any]]:
    """A chart for every metric with numbers that are not all the same."""
    names = {name for run in runs for entry in run.metrics for name in entry}
    names -= {"step", "updates"} | {name for name in names if name.startswith("cost/")}
    ordered = [name for name in FIRST if name in names] + sorted(names - set(FIRST))
    drawn = []
    for name in ordered:
        lines = [line for place, run in enumerate(runs) for line in _lines(run, place, name)]
        if any(len(line.y) == 1 or np.ptp(line.y) > 0 for line in lines):
            drawn.append(chart(name.replace("_", " "), charts.curves(lines, "steps", name)))
    note = "Thin: each step. Thick: the moving average."
    return [{"title": "Curves", "note": note, "legend": len(runs) > 1, "small": False, "charts": drawn}]


def _lines(run: RunFolder, series: int, name: str) -> list[Curve]:
    """A metric over the steps: each step, and in a long run its moving average."""
    points = [(entry.get("step", place + 1), entry.get(name)) for place, entry in enumerate(run.metrics)]
    numbers = [(float(step), float(value)) for step, value in points if isinstance(value, int | float)]
    if not numbers:
        return []
    x, y = np.array(numbers).T
    every = -(-len(x) // MOST_POINTS)
    if len(x) < 30:
        return [Curve(run.label, series, x, y)]
    smooth = charts.smoothed(y, max(3, len(y) // 20))
    return [
        Curve(run.label, series, x[::every], y[::every], faint=True),
        Curve(run.label, series, x[::every], smooth[::every]),
    ]


def _pictures(run: RunFolder, several: bool) -> list[dict[str, Any]]:
    """A section with the pictures that a run drew of its samples, their rewards below; none where it drew none."""
    from markupsafe import Markup

    files = sorted((run.path / SAMPLES).glob("step-*.png"))
    few = min(MOST_PICTURES, len(files))
    chosen = [files[i * (len(files) - 1) // max(few - 1, 1)] for i in range(few)]
    drawn = []
    for file in chosen:
        step = int("".join(filter(str.isdigit, file.stem)) or 0)
        captions = [_prompt_and_reward(entry) for entry in run.completions if entry.get("step") == step]
        image = embedded(file.read_bytes())
        tag = '<img src="{}" width="{}" height="{}" alt="samples of step {}">'
        element = Markup(tag).format(image["address"], image["width"], image["height"], step)
        drawn.append(chart(f"step {step}", element, ", ".join(captions)))
    title = f"Samples of {run.label}" if several else "Samples"
    note = "Completions from the log, side by side, with their prompts and rewards."
    return [{"title": title, "note": note, "legend": False, "small": False, "charts": drawn}] if drawn else []


def _prompt_and_reward(entry: Mapping[str, Any], most: int = 24) -> str:
    prompt, reward = shown(entry.get("prompt", "")), f"{number_or_nan(entry.get('reward')):.2g}"
    return f"{prompt if len(prompt) <= most else prompt[: most - 1] + '…'}: {reward}"


def _samples(run: RunFolder, series: int, count: int = 6) -> dict[str, Any]:
    """The first and the last answers of the log."""
    chosen = (
        run.completions if len(run.completions) <= 2 * count else run.completions[:count] + run.completions[-count:]
    )
    rows = [
        {
            "prompt": shown(entry.get("prompt", "")),
            "before": plainly(Prompt(0, None), entry.get("completion", "")),
            "before_reward": entry.get("reward"),
            "note": f"step {entry.get('step')}",
        }
        for entry in chosen
    ]
    about = f"steps {chosen[0].get('step')} to {chosen[-1].get('step')}"
    columns = ("answer", "")
    return {"label": run.label, "series": series, "about": about, "columns": columns, "rows": rows, "images": False}


def _card(run: RunFolder, series: int) -> dict[str, Any]:
    card = run.about.get("card") or {}
    blank: dict[str, Any] = {
        "title": "",
        "differs": "",
        "paper": "",
        "year": None,
        "arxiv": "",
        "parts": [],
        "options": {},
        "proof": [],
    }
    options = {**card.get("options", {}), **run.about.get("options", {})}
    parts = run.about.get("parts") or card.get("parts") or []
    name = run.about.get("method") or card.get("id") or ""
    title = f"{name}: {card.get('title', '')}" if name and card.get("title") else str(name)
    return blank | card | {"label": run.label, "title": title, "series": series, "options": options, "parts": parts}
