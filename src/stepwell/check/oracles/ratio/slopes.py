"""The slope of each off-policy rule's loss in every step's log-probability, written out in plain numbers.

A definition takes rows as `Row` and a method's options, and gives d loss / d log pi of each trained step.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from stepwell.check.oracles.ratio.rows import Row, Slopes, Step, advantages, centred, clipped, each, standardised
from stepwell.check.oracles.registry import discover

Definition = Callable[[Sequence[Row], Mapping[str, Any]], Slopes]
_STATED: dict[str, Definition] = {}


def define(name: str) -> Callable[[Definition], Definition]:
    """Register a function that writes out a method's slopes for given options."""

    def registered(definition: Definition) -> Definition:
        _STATED[name] = definition
        return definition

    return registered


def stated() -> Mapping[str, Definition]:
    """The slopes of every method that has them written out, by its id."""
    discover()
    return dict(_STATED)


@define("bnpo")
def _bnpo(rows: Sequence[Row], o: Mapping[str, Any]) -> Slopes:
    answer = each(rows, standardised(rows), lambda row, step, a: clipped(step.x, a, o["clip"], o["clip"]))
    for row in rows:
        for step in row.steps:
            answer[step.place] += o["kl"] * (1 - math.exp(step.reference - step.present)) / len(answer)
    return answer


@define("dual-clip")
def _dual(rows: Sequence[Row], o: Mapping[str, Any]) -> Slopes:
    def gain(row: Row, step: Step, a: float) -> float:
        return 0.0 if a < 0 and math.exp(step.x) > o["c"] else clipped(step.x, a, o["clip"], o["clip"])

    return each(rows, standardised(rows), gain, "row")


@define("two-sided-clip")
def _two_sided(rows: Sequence[Row], o: Mapping[str, Any]) -> Slopes:
    return _dual(rows, {"c": o["delta"], "clip": o["clip"]})


@define("gmpo")
def _gmpo(rows: Sequence[Row], o: Mapping[str, Any]) -> Slopes:
    def gain(row: Row, step: Step, a: float) -> float:
        cut = [min(s.x, o["high"]) if a > 0 else max(s.x, -o["low"]) for s in row.steps]
        free = step.x < o["high"] if a > 0 else step.x > -o["low"]
        return free * math.exp(statistics.fmean(cut))

    return each(rows, standardised(rows), gain, "row")


@define("luspo")
def _luspo(rows: Sequence[Row], o: Mapping[str, Any]) -> Slopes:
    return each(rows, standardised(rows), lambda row, step, a: clipped(row.mean, a, o["low"], o["high"]), "row-sum")


@define("sspo")
def _sspo(rows: Sequence[Row], o: Mapping[str, Any]) -> Slopes:
    def gain(row: Row, step: Step, a: float) -> float:
        sentence = [s.x for s in row.steps if s.segment == step.segment]
        return clipped(statistics.fmean(sentence), a, o["low"], o["high"])

    return each(rows, standardised(rows), gain, "row")


@define("turn-ppo")
def _turn(rows: Sequence[Row], o: Mapping[str, Any]) -> Slopes:
    credit = advantages(rows, o["gamma"], o["lam"])
    answer = {}
    for row in rows:
        for step in row.steps:
            turn = [s for s in row.steps if s.turn == step.turn]
            size = 1 if o["product"] else len(turn)
            x = math.fsum(s.x for s in turn) / size
            share = [clipped(x, credit[s.place], o["clip"], o["clip"]) * credit[s.place] / size for s in turn]
            answer[step.place] = -math.fsum(share) / len(credit)
    return answer


@define("discovered-po")
def _discovered(rows: Sequence[Row], o: Mapping[str, Any]) -> Slopes:
    credit = advantages(rows, o["gamma"], o["lam"])
    answer = {}
    for row in rows:
        for step in row.steps:
            a, ratio = credit[step.place], math.exp(step.x)
            u, width = ((ratio - 1) * a, o["a"]) if a >= 0 else (step.x * a, o["b"])
            slope = ratio * a if a >= 0 else a
            lost = slope * math.tanh(u / width) ** 2 if u > 0 else 0.0  # the drift is 0 on the other side
            answer[step.place] = -(ratio * a - lost) / len(credit)
    return answer


@define("sapo")
def _sapo(rows: Sequence[Row], o: Mapping[str, Any]) -> Slopes:
    def gain(row: Row, step: Step, a: float) -> float:
        ratio, tau = math.exp(step.x), o["positive"] if a > 0 else o["negative"]
        return ratio / math.cosh(tau * (ratio - 1) / 2) ** 2

    return each(rows, standardised(rows), gain, "row")


@define("vespo")
def _vespo(rows: Sequence[Row], o: Mapping[str, Any]) -> Slopes:
    def gain(row: Row, step: Step, a: float) -> float:
        sign = "positive" if a >= 0 else "negative"
        ratio = math.exp(row.total)
        return ratio ** o[f"{sign}_shape"] * math.exp(o[f"{sign}_rate"] * (1 - ratio))

    return each(rows, standardised(rows), gain)


@define("tis")
def _tis(rows: Sequence[Row], o: Mapping[str, Any]) -> Slopes:
    def gain(row: Row, step: Step, a: float) -> float:
        steps = row.steps if o["sequence"] else (step,)
        rho = math.prod(math.exp(s.old - s.behaviour) for s in steps)
        inside = o["floor"] <= rho <= o["cap"]
        weight = rho if inside else 0.0 if o["mask"] else min(max(rho, o["floor"]), o["cap"])
        return weight * clipped(step.x, a, 0.2, 0.2)

    return each(rows, standardised(rows), gain)


@define("m2po")
def _m2po(rows: Sequence[Row], o: Mapping[str, Any]) -> Slopes:
    far = {step.place: step.present - step.behaviour for row in rows for step in row.steps}
    credit = standardised(rows)
    moved = [step.place for row, a in zip(rows, credit, strict=True) for step in row.steps if a * far[step.place] > 0]
    kept = sorted(moved, key=lambda place: abs(far[place]))
    while kept and statistics.fmean(far[place] ** 2 for place in kept) > o["threshold"]:
        kept.pop()
    dropped = set(moved) - set(kept)
    return each(rows, credit, lambda row, step, a: (step.place not in dropped) * math.exp(far[step.place]))


def _covariances(rows: Sequence[Row], credit: Sequence[float]) -> Slopes:
    steps = [(step, a) for row, a in zip(rows, credit, strict=True) for step in row.steps]
    credited, likely = statistics.fmean(a for _, a in steps), statistics.fmean(step.present for step, _ in steps)
    return {step.place: (a - credited) * (step.present - likely) for step, a in steps}


@define("clip-cov")
def _clip_cov(rows: Sequence[Row], o: Mapping[str, Any]) -> Slopes:
    credit = standardised(rows)
    found = _covariances(rows, credit)
    answer = each(rows, credit, lambda row, step, a: clipped(step.x, a, o["clip"], o["clip"]))
    open_ = [place for place, value in found.items() if o["low"] < value < o["high"] and answer[place] != 0]
    assert int(o["fraction"] * len(found)) >= len(open_), "which of the steps are dropped is drawn by lot"
    return answer | dict.fromkeys(open_, 0.0)


@define("kl-cov")
def _kl_cov(rows: Sequence[Row], o: Mapping[str, Any]) -> Slopes:
    credit = standardised(rows)
    found = _covariances(rows, credit)
    answer = each(rows, credit, lambda row, step, a: math.exp(step.x))
    top = sorted(found, key=lambda place: found[place])[-max(1, int(o["fraction"] * len(found))) :]
    moved = {step.place: step.x for row in rows for step in row.steps}
    return answer | {p: answer[p] + o["coefficient"] * math.copysign(1, moved[p]) / len(found) for p in top}


@define("high-entropy")
def _high_entropy(rows: Sequence[Row], o: Mapping[str, Any]) -> Slopes:
    ordered = sorted(step.entropy for row in rows for step in row.steps)
    place = (1 - o["top"]) * (len(ordered) - 1)
    below = ordered[math.floor(place)]
    border = below + (place - math.floor(place)) * (ordered[math.ceil(place)] - below)

    def gain(row: Row, step: Step, a: float) -> float:
        return (step.entropy >= border) * clipped(step.x, a, o["low"], o["high"])

    return each(rows, standardised(rows), gain)


@define("steer")
def _steer(rows: Sequence[Row], o: Mapping[str, Any]) -> Slopes:
    credit, change = standardised(rows), {}
    for row, a in zip(rows, credit, strict=True):
        for step in row.steps:
            pi = math.exp(step.present)
            slope = (1 - pi) * (step.present + step.entropy)
            if o["exact"]:
                rest = math.fsum(v**2 * (math.log(v) + step.entropy) for v in step.probabilities)
                slope = pi * (step.present + step.entropy) - rest
            change[step.place] = abs(math.exp(step.x) * a * slope)
    largest = max(0.02, *change.values())

    def gain(row: Row, step: Step, a: float) -> float:
        return o["least"] ** (change[step.place] / largest) * clipped(step.x, a, o["clip"], o["clip"])

    return each(rows, credit, gain)


@define("thr")
def _thr(rows: Sequence[Row], o: Mapping[str, Any]) -> Slopes:
    credit = standardised(rows)

    def error(step: Step) -> list[float]:
        return [(symbol == step.action) - p for symbol, p in enumerate(step.probabilities)]

    def gain(row: Row, step: Step, a: float) -> float:
        good = [r for r, value in zip(rows, credit, strict=True) if r.prompt == row.prompt and value > 0]
        same = [s for r in good for s in r.steps if s.context == step.context]
        influence = a * math.fsum(u * v for s in same for u, v in zip(error(step), error(s), strict=True))
        sign = math.copysign(1, influence) if same else 0
        return (1 + o["p"] * sign) * clipped(step.x, a, o["clip"], o["clip"])

    return each(rows, credit, gain, "row")


@define("topr")
def _topr(rows: Sequence[Row], o: Mapping[str, Any]) -> Slopes:
    credit = [row.reward - o["baseline"] for row in rows]

    def gain(row: Row, step: Step, a: float) -> float:
        return 1.0 if a >= 0 else min(o["maximum"], math.exp(row.total))

    return each(rows, credit, gain, "row-sum")


@define("asymre")
def _asymre(rows: Sequence[Row], o: Mapping[str, Any]) -> Slopes:
    return each(rows, [a - o["shift"] for a in centred(rows)], lambda row, step, a: 1.0, "row-sum")


@define("opmd")
def _opmd(rows: Sequence[Row], o: Mapping[str, Any]) -> Slopes:
    return each(rows, centred(rows), lambda row, step, a: 1 / (1 + o["tau"]))


@define("rec-one-side")
def _one_side(rows: Sequence[Row], o: Mapping[str, Any]) -> Slopes:
    def gain(row: Row, step: Step, a: float) -> float:
        found = clipped(step.x, a, o["low"], o["high"])
        return found if o["importance"] else float(found > 0)

    return each(rows, standardised(rows), gain)


@define("rec-two-side")
def _two_side(rows: Sequence[Row], o: Mapping[str, Any]) -> Slopes:
    def gain(row: Row, step: Step, a: float) -> float:
        ratio = math.exp(step.x)
        return (1 - o["low"] <= ratio <= 1 + o["high"]) * (ratio if o["importance"] else 1.0)

    return each(rows, standardised(rows), gain)


@define("rec-ring")
def _ring(rows: Sequence[Row], o: Mapping[str, Any]) -> Slopes:
    def gain(row: Row, step: Step, a: float) -> float:
        ratio = math.exp(step.x)
        back = ratio <= 1 - o["far_low"] if a > 0 else ratio >= 1 + o["far_high"]
        kept = 1 - o["low"] <= ratio <= 1 + o["high"] or back
        return kept * (ratio if o["importance"] else 1.0)

    return each(rows, standardised(rows), gain)


@define("dppo")
def _dppo(rows: Sequence[Row], o: Mapping[str, Any]) -> Slopes:
    def gain(row: Row, step: Step, a: float) -> float:
        before, now = math.exp(step.behaviour), math.exp(step.present)
        over = now - before > o["high"] if a > 0 else before - now > o["low"]
        return 0.0 if over else now / before

    return each(rows, standardised(rows), gain)


@define("off-policy-masking")
def _masking(rows: Sequence[Row], o: Mapping[str, Any]) -> Slopes:
    def gain(row: Row, step: Step, a: float) -> float:
        drift = statistics.fmean(s.behaviour - s.present for s in row.steps)
        return (a >= 0 or drift <= o["threshold"]) * clipped(step.x, a, o["clip"], o["clip"])

    return each(rows, standardised(rows), gain, "row")
