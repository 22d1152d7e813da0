"""From scores to findings: each method's numbers with their intervals, and sentences that claim no more than those."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from stepwell.comparison.results import Comparison
from stepwell.comparison.statistics import Interval, difference, interquartile_mean, interval
from stepwell.figures.charts import Values


@dataclass(frozen=True)
class MethodRow:
    """One method's numbers: its final score, its gain over the start, the middle half's mean, and its cost.

    `cost` (by unit) and `steps` are means over seeds; `measures` are those of `over_seeds`.
    """

    label: str
    title: str
    score: Interval
    gain: Interval
    middle: Interval
    cost: dict[str, float]
    steps: float
    measures: dict[str, Interval] = field(default_factory=dict)


@dataclass(frozen=True)
class Pair:
    """The difference of two methods' scores, first minus second."""

    first: str
    second: str
    difference: Interval


@dataclass(frozen=True)
class Findings:
    """Rows and pairs from the highest score down, the common start, and sentences, the headline first."""

    start: Interval
    rows: list[MethodRow]
    pairs: list[Pair]
    sentences: list[str]
    start_measures: dict[str, Interval] = field(default_factory=dict)


def find(comparison: Comparison, level: float = 0.95) -> Findings | None:
    """The findings of the seeds that all methods finished; None where no method finished one."""
    entries, seeds = comparison.complete, comparison.shared_seeds
    if not seeds:
        return None
    scores = {entry.label: entry.scores("end", seeds) for entry in entries}
    starts = {entry.label: entry.scores("start", seeds) for entry in entries}
    ordered = sorted(entries, key=lambda entry: -float(scores[entry.label].mean()))
    every = [trial for entry in entries for trial in entry.trials if trial.seed in seeds]
    low, high = bounds = _bounds(comparison, [*scores.values(), *starts.values()])
    apart = (low - high, high - low)  # the bounds of a difference
    names = [name for name in every[0].measures if all(name in trial.measures for trial in every)]
    rows = []
    for entry in ordered:
        trials = [trial for trial in entry.trials if trial.seed in seeds]
        rows.append(
            MethodRow(
                label=entry.label,
                title=str(entry.card.get("title", "")),
                score=interval(scores[entry.label], level=level, bounds=bounds),
                gain=difference(scores[entry.label], starts[entry.label], level=level, bounds=apart),
                middle=interval(scores[entry.label], interquartile_mean, level=level, bounds=bounds),
                cost={unit: float(np.mean([trial.cost[unit] for trial in trials])) for unit in trials[0].cost},
                steps=float(np.mean([trial.steps for trial in trials])),
                measures={name: over_seeds([t.measures[name][1] for t in trials], level) for name in names},
            )
        )
    labels = [row.label for row in rows]
    pairs = [
        Pair(first, second, difference(scores[first], scores[second], level=level, bounds=apart))
        for place, first in enumerate(labels)
        for second in labels[place + 1 :]
    ]
    start = interval(starts[labels[0]], level=level, bounds=bounds)
    begins = {trial.seed: trial.measures for trial in every}
    before = {name: over_seeds([begins[seed][name][0] for seed in seeds], level) for name in names}
    alike = same_scores(scores)
    sentences = _sentences(comparison, start, rows, pairs, len(seeds), alike)
    sentences += [_alike(group) for group in alike]
    return Findings(start, rows, pairs, sentences, before)


def same_scores(scores: Mapping[str, Values]) -> list[list[str]]:
    """The labels, two or more together, whose scores are the same for every seed and prompt.

    Example:
        >>> same_scores({"a": np.zeros((1, 2)), "b": np.ones((1, 2)), "c": np.zeros((1, 2))})
        [['a', 'c']]
    """
    groups: dict[bytes, list[str]] = {}
    for label, table in scores.items():
        groups.setdefault(np.ascontiguousarray(table).tobytes(), []).append(label)
    return [labels for labels in groups.values() if len(labels) > 1]


def score_bounds(comparison: Comparison) -> tuple[float, float]:
    """The least and the greatest score that there can be, as far as it is known: infinite where it is not."""
    seeds = comparison.shared_seeds
    scores = [entry.scores(which, seeds) for entry in comparison.complete for which in ("start", "end")]
    return _bounds(comparison, scores)


def _bounds(comparison: Comparison, tables: Sequence[Values]) -> tuple[float, float]:
    """0 where no score is negative, and 1 where they count something, of which there is at most all."""
    least, most = min(float(table.min()) for table in tables), max(float(table.max()) for table in tables)
    counted = comparison.task["unit"] != "reward"
    return 0.0 if least >= 0 else -math.inf, 1.0 if counted and most <= 1 else math.inf


def over_seeds(values: Sequence[float | None], level: float = 0.95) -> Interval:
    """The mean of a measure, one number a seed, with its interval over seeds.

    One seed has no interval: its ends are NaN. Where a seed's number is missing all three are.

    Example:
        >>> over_seeds([0.25]).value, over_seeds([0.25, None]).value
        (0.25, nan)
    """
    numbers = [value for value in values if value is not None]
    if len(numbers) < len(values):
        return Interval(math.nan, math.nan, math.nan, level)
    if len(numbers) == 1:
        return Interval(numbers[0], math.nan, math.nan, level)
    return interval([[value] for value in numbers], level=level)


def number(value: float, comparison: Comparison, signed: bool = False) -> str:
    """A score in the task's unit: a bare `reward` as it is, anything that is counted (`solved`, ...) in percent."""
    if comparison.task["unit"] == "reward":
        return f"{value:+.3g}" if signed else f"{value:.3g}"
    return f"{100 * value:+.1f}" if signed else f"{100 * value:.1f}"


def percent(comparison: Comparison) -> str:
    """The percent sign behind a score; empty for a bare `reward`."""
    return "" if comparison.task["unit"] == "reward" else "\N{NO-BREAK SPACE}%"


def _sentences(
    comparison: Comparison,
    start: Interval,
    rows: Sequence[MethodRow],
    pairs: Sequence[Pair],
    seeds: int,
    alike: Sequence[Sequence[str]],
) -> list[str]:
    unit, sign = comparison.task["unit"], percent(comparison)
    best, last = rows[0], rows[-1]
    highest, lowest, origin = (f"{number(each.value, comparison)}{sign}" for each in (best.score, last.score, start))
    spent = f"After {comparison.budget} each"
    against = [pair for pair in pairs if pair.first == best.label]
    beaten = [pair.second for pair in against if pair.difference.above_zero]
    level = [pair.second for pair in against if not pair.difference.above_zero]
    equal = next((list(group) for group in alike if best.label in group), [])
    said = [best.label]
    means = f"all reach {highest}" if highest == lowest else f"their means are from {lowest} to {highest}"
    if len(rows) == 1:
        head = f"{spent}, {best.label} reaches {highest} {unit}, from {origin}; "
        head += {True: "the gain is real", False: "the gain may be chance"}[best.gain.above_zero] + "."
    elif not any(pair.difference.above_zero for pair in pairs):
        head = f"{spent}, no method is shown to be better than another: every interval of a difference contains zero; "
        head += f"{means} {unit}, from {origin}."
    elif not beaten:
        head = f"{spent}, no method is shown to be better than all others; {means} {unit}, from {origin}."
    elif not level:
        others = f"all {len(beaten)} others" if len(beaten) > 1 else beaten[0]
        head = f"{spent}, {best.label} has the highest mean ({highest} {unit}, from {origin}) and is better than "
        head += f"{others}."
    elif set(level) <= set(equal):
        said = equal
        head = f"{spent}, {_listed(equal)} are better than {_listed(beaten)} ({highest} {unit} each, from {origin})."
    else:
        head = f"{spent}, {best.label} ({highest} {unit}, from {origin}) is better than {_listed(beaten)}, but not "
        head += f"shown to be better than {_listed(level)}."
    sentences = [head]
    for row in (row for row in rows if row.label not in said):
        beaten = [pair.second for pair in pairs if pair.first == row.label and pair.difference.above_zero]
        if beaten:
            sentences.append(f"{row.label} is better than {_listed(beaten)}.")
    if len(rows) > 1:
        sentences.append(_gains(rows))
    if seeds == 1:
        others = "samples" if comparison.task.get("same_prompts") else "prompts"
        sentences.append(f"There was one seed: the intervals cover other {others}, but not other seeds.")
    for label, error in comparison.errors.items():
        sentences.append(f"{label} failed ({error.rstrip('.')}).")
    return sentences


def _alike(labels: Sequence[str]) -> str:
    return (
        f"{_listed(labels)} ended with the very same scores, and cannot be told apart by them; more steps, prompts or "
        "samples may do so."
    )


def _gains(rows: Sequence[MethodRow]) -> str:
    up = [row.label for row in rows if row.gain.above_zero]
    down = [row.label for row in rows if row.gain.below_zero]
    rest = [row.label for row in rows if row.label not in up + down]
    if len(up) == len(rows):
        return "Every method improved on the start."
    if len(rest) == len(rows):
        return "No method's change from the start is more than chance may explain."
    parts = [(up, "improved on the start"), (down, "fell below the start"), (rest, "did not measurably change")]
    return "; ".join(f"{_listed(labels)} {what}" for labels, what in parts if labels) + "."


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
