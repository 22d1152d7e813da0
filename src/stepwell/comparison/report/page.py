"""A comparison as one self-contained page: findings, curves, differences, costs, completions, cards."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from stepwell.comparison.findings import Findings, find, number, percent, score_bounds
from stepwell.comparison.report.gallery import samples_note, samples_of
from stepwell.comparison.report.table import amount, measure, spread, unit_name, units_spent
from stepwell.comparison.results import Comparison, Entry
from stepwell.comparison.statistics import Interval
from stepwell.figures import charts
from stepwell.figures.charts import Bar, Curve, Values
from stepwell.writing import write_whole

AXES = {
    "seconds": ("seconds of training", lambda point: point["wall_time"]),
    "tokens": ("tokens, forward and backward", lambda point: point["cost/forward"] + point["cost/backward"]),
    "evaluations": ("model evaluations", lambda point: point["cost/model_evaluations"]),
    "reward-calls": ("reward calls", lambda point: point["cost/reward_calls"]),
    "steps": ("steps", lambda point: point["step"]),
}
GRID = 80
"""Points of a curve that is drawn for several seeds."""
FEW = 6
"""The most methods in one chart; more of them get a panel each, and a table of their differences."""


def write_report(comparison: Comparison, path: str | Path) -> Path:
    """Write the page of a comparison to `path` (report.html in it, if it is a folder), at one stroke."""
    path = Path(path)
    path = path / "report.html" if path.is_dir() else path
    write_whole(path, render(page(comparison)))
    return path


def render(content: Mapping[str, Any]) -> str:
    """The page; all text in `content` is escaped, charts excepted."""
    return str(_template().render(**content))


@cache
def _template() -> Any:
    import jinja2

    source = resources.files("stepwell.comparison.report").joinpath("report.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    return environment.from_string(source)


def chart(title: str, drawn: str, note: str = "", kind: str = "") -> dict[str, Any]:
    """A chart as the template reads it."""
    from markupsafe import Markup

    return {"title": title, "note": note, "svg": Markup(drawn), "kind": kind}


def page(comparison: Comparison) -> dict[str, Any]:
    """The content of a comparison's page, by the names that the template reads."""
    findings = find(comparison)
    task, seeds = comparison.task, comparison.shared_seeds
    series = {entry.label: place for place, entry in enumerate(comparison.entries)}
    made = comparison.made
    names = ", ".join(entry.label for entry in comparison.entries)
    if len(comparison.entries) > FEW:
        names = f"{len(comparison.entries)} methods"
    samples = comparison.evaluation["samples"]
    judged_on = "held-out prompts"
    if task.get("same_prompts"):
        judged_on = "the training prompts, sampled anew from random numbers that training does not use"
    groups = [samples_of(entry, series[entry.label], comparison) for entry in comparison.complete if entry.samples]
    images = any(group["images"] for group in groups)
    return {
        "title": f"{task['title']}: {names}",
        "eyebrow": "Stepwell comparison",
        "heading": f"{task['title']}: {names}",
        "sentences": ["No method finished a run."] if findings is None else findings.sentences,
        "description": task["description"],
        "facts": [
            ("budget", f"{comparison.budget} a run"),
            ("seeds", len(seeds)),
            (comparison.held_out, comparison.evaluation["prompts"]),
            ("samples a prompt", samples),
            ("made", str(made.get("when", ""))[:16].replace("T", " ")),
        ],
        "errors": list(comparison.errors.items()),
        "tables": [] if findings is None else _tables(comparison, findings, series),
        "legend": [(entry.label, series[entry.label]) for entry in comparison.complete],
        "sections": [] if findings is None else _sections(comparison, findings, series),
        "images": images,
        "samples": groups,
        "samples_title": "Single samples" if comparison.figure else "Samples" if images else "Completions",
        "samples_note": samples_note(comparison, images) if seeds else "",
        "cards": [
            {**_blank_card(), **entry.card, "label": entry.label, "series": series[entry.label]}
            for entry in comparison.entries
        ],
        "commands": [made["command"]] if made.get("command") else [],
        "reproduction": reproduction(comparison.settings, made),
        "footnote": (
            f"Scores are mean rewards on {judged_on}; the middle half is their interquartile mean. Brackets are "
            "95 % intervals from a bootstrap over seeds and prompts, widened for few seeds, each by itself and not "
            "corrected for their number, and cut where no mean can lie (below 0 where no score was negative, beyond "
            "100 %); differences are paired by seed and prompt. A method is called better only where the interval "
            "excludes zero. Made with Stepwell."
        ),
    }


def _tables(comparison: Comparison, findings: Findings, series: Mapping[str, int]) -> list[dict[str, Any]]:
    scores = _table(comparison, findings, series)
    return [scores, _measures(comparison, findings, series)] if findings.start_measures else [scores]


def _measures(comparison: Comparison, findings: Findings, series: Mapping[str, int]) -> dict[str, Any]:
    def cells(measures: Mapping[str, Interval]) -> list[dict[str, Any]]:
        return [plain(*measure(value)) for value in measures.values()]

    rows = [
        {"label": row.label, "series": series[row.label], "kind": "", "cells": cells(row.measures)}
        for row in findings.rows
    ]
    rows.append({"label": "start", "series": None, "kind": "start", "cells": cells(findings.start_measures)})
    seeds = len(comparison.shared_seeds)
    over = f", with 95 % intervals over {seeds} seeds" if seeds > 1 else "; one seed has no interval"
    return {
        "title": "Measures",
        "note": f"Taken of the same samples after training, besides the reward: means{over}.",
        "header": ["method", *findings.start_measures],
        "rows": rows,
    }


def _table(comparison: Comparison, findings: Findings, series: Mapping[str, int]) -> dict[str, Any]:
    spent = units_spent(findings)
    named = [unit_name(name, comparison.work) for name in spent]
    unit = " ".join(filter(None, (comparison.task["unit"], percent(comparison).strip())))

    def scored(score: Interval, signed: bool = False) -> dict[str, Any]:
        tone = ("up" if score.above_zero else "down" if score.below_zero else "") if signed else "score"
        small = spread(score, comparison, signed)
        return {"text": number(score.value, comparison, signed), "small": small, "tone": tone}

    rows = []
    for row in findings.rows:
        cells = [scored(row.score), scored(row.gain, signed=True), plain(number(row.middle.value, comparison))]
        cells += [plain(amount(row.steps)), *(plain(amount(row.cost[name])) for name in spent)]
        rows.append({"label": row.label, "series": series[row.label], "kind": "", "cells": cells})
    start = [scored(findings.start), *[plain("")] * (3 + len(spent))]
    rows.append({"label": "start", "series": None, "kind": "start", "cells": start})
    return {
        "title": "Scores and costs",
        "note": f"Means over {count_of(len(comparison.shared_seeds), 'seed')}, from the highest score down.",
        "header": ["method", unit, "gain on the start", "middle half", "steps", *named],
        "rows": rows,
    }


def _sections(comparison: Comparison, findings: Findings, series: Mapping[str, int]) -> list[dict[str, Any]]:
    sections = [_figure(comparison)] if comparison.figure else []
    sections.append(_learning(comparison, findings, series))
    if findings.pairs:
        sections.append(_differences(comparison, findings))
    labels = [row.label for row in findings.rows]
    costs = []
    for name in units_spent(findings):
        values = [row.cost[name] for row in findings.rows]
        texts = [amount(value) for value in values]
        unit = unit_name(name, comparison.work)
        svg = charts.bars(labels, [series[label] for label in labels], values, texts, f"Cost in {unit}")
        costs.append(chart(unit.capitalize(), svg))
    note = f"The average cost of a run, in every unit, without evaluation; the budget was {comparison.budget}."
    sections.append({"title": "Cost", "note": note, "legend": False, "small": True, "charts": costs})
    return sections


def _learning(comparison: Comparison, findings: Findings, series: Mapping[str, int]) -> dict[str, Any]:
    """Held-out scores by cost, and rewards in training; of many methods held-out scores alone, a panel each."""
    shown, unit = bool(percent(comparison)), comparison.task["unit"]
    many, level = len(comparison.complete) > FEW, findings.start.value
    axes = [comparison.budget_unit, "steps"] if comparison.budget_unit != "steps" else ["steps", "seconds"]
    drawn = []
    for axis in axes[:1] if many else axes:
        name = AXES[axis][0].replace("tokens", comparison.work)
        lines = [_curve(comparison, entry, series[entry.label], axis) for entry in comparison.complete]
        title = f"{unit.capitalize()} by {name}"
        draw = charts.multiples if many else charts.curves
        about = comparison.held_out + (", %" if shown else "")
        drawn.append(chart(title, draw(lines, name, title, percent=shown, level=level), about, "full" if many else ""))
    if not many:
        lines = [_training(comparison, entry, series[entry.label]) for entry in comparison.complete]
        title = "Reward while training"
        svg = charts.curves(lines, "steps", title, percent=shown)
        drawn.append(chart(title, svg, "training prompts, moving average"))
    one = len(comparison.shared_seeds) == 1
    band = f"The bands are 95 % intervals over {comparison.held_out}" if one else "The bands span the seeds"
    note = f"{band}; the dotted line is the common start" + ("; other methods are grey." if many else ".")
    return {"title": "Learning", "note": note, "legend": not many, "small": False, "charts": drawn}


def _differences(comparison: Comparison, findings: Findings) -> dict[str, Any]:
    """The difference of every two methods with its interval; of many methods the differences alone, in a table."""
    shown, unit = bool(percent(comparison)), comparison.task["unit"]
    axis = f"difference in {unit}" + (", percentage points" if shown else "")
    bars = {}
    for pair in findings.pairs:
        gap = pair.difference
        sure = gap.above_zero or gap.below_zero
        name = f"{pair.first} − {pair.second}"
        bars[pair.first, pair.second] = Bar(name, 2, gap.value, gap.low, gap.high, sure)
    labels = [row.label for row in findings.rows]
    if len(labels) > FEW:
        place = {label: number for number, label in enumerate(labels)}
        cells = {(place[first], place[second]): bar for (first, second), bar in bars.items()}
        drawn = chart(
            f"Row minus column: {axis}", charts.matrix(labels, cells, "Paired differences", percent=shown), kind="full"
        )
        note = (
            "Paired by seed and prompt. Filled: the 95 % interval excludes zero. Otherwise neither method is shown to "
            "be better; = marks pairs whose scores are all the same."
        )
    else:
        drawn = chart(
            "Difference of each pair, with its 95 % interval",
            charts.forest(list(bars.values()), axis, "Paired differences", percent=shown),
            kind="wide",
        )
        note = "Paired by seed and prompt. Hollow: the interval contains zero, so neither method is shown to be better."
    return {"title": "Differences", "note": note, "legend": False, "small": False, "charts": [drawn]}


def _figure(comparison: Comparison) -> dict[str, Any]:
    """The section of the task's own picture, in the colours of the legend."""
    drawn = chart("All methods", charts.safe(comparison.figure), str(comparison.task.get("caption", "")), "whole")
    note = f"Held-out samples before and after training on seed {comparison.shared_seeds[0]}."
    return {"title": "Samples", "note": note, "legend": True, "small": False, "charts": [drawn]}


def _curve(comparison: Comparison, entry: Entry, series: int, axis: str) -> Curve:
    """The held-out score over a common grid: mean and span of the seeds, or one seed's interval over prompts."""
    of_point = AXES[axis][1]
    trials = [trial for trial in entry.trials if trial.seed in comparison.shared_seeds]
    last = min(float(of_point(trial.curve[-1])) for trial in trials)
    grid = np.linspace(0.0, last, GRID)
    table, error = (
        np.array([np.interp(grid, [of_point(p) for p in t.curve], [p.get(what, 0.0) for p in t.curve]) for t in trials])
        for what in ("score", "error")
    )
    mean = table.mean(0)
    if len(trials) > 1:
        return Curve(entry.label, series, grid, mean, table.min(0), table.max(0))
    low, high = score_bounds(comparison)
    return Curve(entry.label, series, grid, mean, *((mean + z * error[0]).clip(low, high) for z in (-1.96, 1.96)))


def _training(comparison: Comparison, entry: Entry, series: int) -> Curve:
    """The reward while training: the mean over seeds, as a moving average."""
    trials = [trial for trial in entry.trials if trial.seed in comparison.shared_seeds]
    steps = min(len(trial.history) for trial in trials)
    table = np.array([[number_or_nan(point.get("reward")) for point in trial.history[:steps]] for trial in trials])
    mean: Values = table.mean(0) if steps else np.zeros(0)
    return Curve(entry.label, series, np.arange(1, steps + 1, dtype=float), charts.smoothed(mean, max(1, steps // 20)))


def plain(text: str, small: str = "") -> dict[str, Any]:
    """A cell that is neither good nor bad."""
    return {"text": text, "small": small, "tone": ""}


def count_of(count: int, word: str) -> str:
    """A number with its noun."""
    return f"{count} {word}" if count == 1 else f"{count} {word}s"


def number_or_nan(value: Any) -> float:
    """A metric as a float; NaN for one that is missing or is not a number."""
    return float(value) if isinstance(value, int | float) else float("nan")


def reproduction(settings: Mapping[str, Any], made: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Settings and versions as name and value."""
    rows = [("settings", ", ".join(f"{name} = {value}" for name, value in settings.items() if value not in (None, [])))]
    if made.get("versions"):
        rows.append(("versions", ", ".join(f"{name} {value}" for name, value in made["versions"].items())))
    words = [str(made["device"])] if made.get("device") else []
    words += [count_of(made[name], noun) for name, noun in (("cores", "core"), ("threads", "thread")) if made.get(name)]
    if words:
        rows.append(("machine", ", ".join(words)))
    return rows


def _blank_card() -> dict[str, Any]:
    return {"title": "", "differs": "", "paper": "", "year": None, "arxiv": "", "parts": [], "options": {}, "proof": []}
