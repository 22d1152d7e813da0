"""Rows as plain numbers, and the credit and the gains that slopes are written out with, by no part of ours."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from stepwell.batch import Batch
from stepwell.process.base import Scores
from stepwell.trajectories import Trajectories, count


@dataclass(frozen=True)
class Step:
    """A trained step: its place, its log-probabilities, and the other numbers that rules read of it."""

    place: tuple[int, int]
    present: float
    old: float
    behaviour: float
    reference: float
    entropy: float
    value: float
    segment: int
    turn: int
    context: int
    action: int
    probabilities: Sequence[float] = field(repr=False)

    @property
    def x(self) -> float:
        """log r."""
        return self.present - self.old


@dataclass(frozen=True)
class Row:
    """A row's trained steps and its reward."""

    prompt: int
    own: bool
    reward: float
    steps: tuple[Step, ...]

    @property
    def mean(self) -> float:
        """The mean log-ratio."""
        return statistics.fmean(step.x for step in self.steps)

    @property
    def total(self) -> float:
        """The log-ratio of the sequence."""
        return math.fsum(step.x for step in self.steps)


Slopes = dict[tuple[int, int], float]
HORIZON = 6
"""Steps of the process that the rows are drawn from, at most."""


def seen(rows: Trajectories, scores: Scores, turns: Tensor) -> list[Row]:
    """The rows as plain numbers; all fields are filled, and the scores hold entropy, logits and hidden states."""
    batch = Batch(rows, count(rows), scores)
    names = ("log_prob", "old", "behaviour", "reference")
    tables = [getattr(batch, name) for name in names] + [scores["entropy"], batch.field("value")]
    whole = [batch.field("segment"), turns, scores["hidden"].argmax(-1), rows.action, scores["logits"].exp()]
    numbers = [table.tolist() for table in (*tables, *whole)]
    answer = []
    for i, mask in enumerate(rows.mask.tolist()):
        steps = [Step((i, t), *(table[i][t] for table in numbers)) for t, here in enumerate(mask) if here]
        answer.append(Row(int(rows.prompt[i]), int(rows.source[i]) == 0, float(batch.reward[i]), tuple(steps)))
    return answer


# credit, in plain numbers


def _groups(rows: Iterable[Row]) -> dict[int, list[Row]]:
    groups = defaultdict(list)
    for row in rows:
        groups[row.prompt].append(row)
    return groups


def centred(rows: Sequence[Row]) -> list[float]:
    mean = {prompt: statistics.fmean(row.reward for row in group) for prompt, group in _groups(rows).items()}
    return [row.reward - mean[row.prompt] for row in rows]


def standardised(rows: Sequence[Row]) -> list[float]:
    spread = {prompt: statistics.stdev(row.reward for row in group) for prompt, group in _groups(rows).items()}
    return [value / (spread[row.prompt] + 1e-4) for row, value in zip(rows, centred(rows), strict=True)]


def against_own(rows: Sequence[Row]) -> list[float]:
    own = {prompt: [row.reward for row in group if row.own] for prompt, group in _groups(rows).items()}
    return [
        (row.reward - statistics.fmean(own[row.prompt])) / (statistics.stdev(own[row.prompt]) + 1e-6) for row in rows
    ]


def advantages(rows: Sequence[Row], gamma: float, lam: float) -> Slopes:
    """Generalised advantages, whitened over all steps."""
    found: Slopes = {}
    for row in rows:
        carried, after = 0.0, 0.0
        for back, step in enumerate(reversed(row.steps)):
            delta = (row.reward if back == 0 else 0.0) + gamma * after - step.value
            carried, after = delta + gamma * lam * carried, step.value
            found[step.place] = carried
    mean, deviation = statistics.fmean(found.values()), math.sqrt(statistics.variance(found.values()) + 1e-8)
    return {place: (value - mean) / deviation for place, value in found.items()}


# gains, g in d loss / d log pi = -W g A


def clipped(x: float, advantage: float, low: float, high: float) -> float:
    """PPO's: r, or 0 where the ratio went on past its bound."""
    ratio = math.exp(x)
    return 0.0 if (ratio > 1 + high if advantage > 0 else ratio < 1 - low) else ratio


def each(
    rows: Sequence[Row], credit: Sequence[float], gain: Callable[[Row, Step, float], float], by: str = "token"
) -> Slopes:
    """-W g A, W the reduction's: 1 / all steps, 1 / (n rows), 1 / rows or 1 / (rows * the horizon of the process)."""
    total = sum(len(row.steps) for row in rows)
    answer: Slopes = {}
    for row, advantage in zip(rows, credit, strict=True):
        weight = {"token": 1 / total, "row": 1 / (len(row.steps) * len(rows)), "row-sum": 1 / len(rows)}
        weight["fixed"] = weight["row-sum"] / HORIZON
        answer |= {step.place: -weight[by] * gain(row, step, advantage) * advantage for step in row.steps}
    return answer
