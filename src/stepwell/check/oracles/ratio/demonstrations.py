"""The slopes of rules that learn from demonstrations too, written out in plain numbers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from stepwell.check.oracles.ratio.rows import Row, Slopes, Step, against_own, clipped, each, standardised
from stepwell.check.oracles.ratio.slopes import define


@define("luffy")
def _luffy(rows: Sequence[Row], o: Mapping[str, Any]) -> Slopes:
    def gain(row: Row, step: Step, a: float) -> float:
        pi = math.exp(step.present)
        return clipped(step.x, a, o["clip"], o["clip"]) if row.own else pi * o["gamma"] / (pi + o["gamma"]) ** 2

    return each(rows, standardised(rows), gain)


@define("rl-plus")
def _rl_plus(rows: Sequence[Row], o: Mapping[str, Any]) -> Slopes:
    def gain(row: Row, step: Step, a: float) -> float:
        if row.own:
            return clipped(step.x, a, o["clip"], o["clip"])
        pi, other = (
            math.exp(step.present),
            (1 - o["share"]) * math.exp(step.old) + o["share"] * math.exp(step.behaviour),
        )
        return pi / other * (1 - pi) ** o["gamma"]

    return each(rows, against_own(rows), gain)


@define("hpt")
def _hpt(rows: Sequence[Row], o: Mapping[str, Any]) -> Slopes:
    prompts = {row.prompt for row in rows}
    answer = {}
    for row, a in zip(rows, against_own(rows), strict=True):
        alike = [r for r in rows if r.prompt == row.prompt and r.own == row.own]
        own = [r.reward > o["success"] for r in rows if r.prompt == row.prompt and r.own]
        solved = statistics.fmean(own) > o["gate"]
        for step in row.steps:
            gain = a * clipped(step.x, a, o["clip"], o["clip"]) if row.own else o["imitation"]
            answer[step.place] = -(solved == row.own) * gain / (len(row.steps) * len(alike) * len(prompts))
    return answer
