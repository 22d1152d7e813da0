"""The loss of each preference, balance and distillation method in plain numbers, by the method's id."""

from __future__ import annotations

import cmath
import itertools
import math
from collections.abc import Callable

from stepwell.check.oracles.preference.by_hand import (
    Numbers,
    Options,
    chosen_likelihood,
    each_group,
    guided,
    larger,
    link,
    ls,
    mean_of,
    odds,
    over_tokens,
    own,
    paired,
    parted,
    shaped,
    sigmoid,
    tailed,
    weighed,
    win_rate,
)


def dpo(v: Numbers, o: Options) -> complex:
    loss, form = o["loss"], link(o["loss"], o["beta"], o["smoothing"])
    pairs = v.pairs(o["pairs"])
    if loss.startswith("aot"):
        return sorted_pairs(v, o, pairs)

    def score(i: int, j: int) -> complex:
        value = shaped(tailed(v, i, j, o["tail"]), o["divergence"])
        return value / len(v.steps(i)) if loss in ("ipo", "sigmoid-norm") else value

    weight = (lambda i, j: own(v, i) * own(v, j)) if o["weighted"] else (lambda i, j: 1.0)
    return mean_of([weight(i, j) * form(score(i, j), score(j, i)) for i, j in pairs])


def sorted_pairs(v: Numbers, o: Options, pairs: list[tuple[int, int]]) -> complex:
    present, reference = ([x(i) for i in range(len(v.reward))] for x in (lambda i: v.score(i, "none"), _reference(v)))
    if o["loss"] == "aot":
        sides = [[x[i] - x[j] for i, j in pairs] for x in (present, reference)]
    else:
        sides = [[present[k] - reference[k] for k in side] for side in zip(*pairs, strict=True)]
    first, second = (sorted(side, key=lambda s: s.real) for side in sides)
    form = link("aot", o["beta"], o["smoothing"])
    return mean_of([form(a, b) for a, b in zip(first, second, strict=True)])


def _reference(v: Numbers) -> Callable[[int], complex]:
    return lambda i: complex(sum(v.reference[i, t] for t in v.steps(i)))


def prospect(v: Numbers, o: Options) -> complex:
    rows = range(len(v.reward))
    center = max(0.0, mean_of([v.score(i).real for i in rows]))
    losses = []
    for i in rows:
        good = v.reward[i] > o["threshold"]
        gain = sigmoid(o["beta"] * (v.score(i) - center) * (1 if good else -1))
        losses.append((o["desirable"] if good else o["undesirable"]) * (1 - gain))
    return mean_of(losses)


def consistency(v: Numbers, o: Options) -> complex:
    def group(rows: list[int]) -> complex:
        x = [v.reward[i] - o["beta"] * v.score(i) for i in rows]
        return mean_of([(a - b) ** 2 / 2 for a, b in itertools.combinations(x, 2)])

    return each_group(v, group)


def nash(v: Numbers, o: Options) -> complex:
    def group(rows: list[int]) -> complex:
        losses = []
        for i, j in itertools.combinations(rows, 2):
            label = sigmoid(win_rate(v, i) - win_rate(v, j))
            logit = o["beta"] * (v.score(i) - v.score(j))
            losses.append(-label * ls(logit) - (1 - label) * ls(-logit))
        return mean_of(losses)

    return each_group(v, group)


def self_play(v: Numbers, o: Options) -> complex:
    target = lambda i: (win_rate(v, i) - 0.5) / o["beta"]  # noqa: E731
    return each_group(v, lambda rows: mean_of([(v.score(i) - target(i)) ** 2 for i in rows]))


def discriminative(v: Numbers, o: Options) -> complex:
    def score(i: int) -> complex:
        if not o["ratio"]:
            return v.score(i, "none", mean=True)
        return mean_of([cmath.exp(v.log_prob[i, t] - v.old[i, t]) for t in v.steps(i)])

    def group(rows: list[int]) -> complex:
        good = [score(i) for i in rows if v.reward[i] > o["threshold"]]
        bad = [score(i) for i in rows if v.reward[i] <= o["threshold"]]
        if not good or not bad:
            return 0.0
        tau = o["temperature"]
        return tau * cmath.log(mean_of([cmath.exp(s / tau) for s in bad])) - mean_of(good)

    gap = larger(over_tokens(v, lambda i, t: v.old[i, t] - v.log_prob[i, t]) - o["limit"], 0.0)
    return each_group(v, group) + o["penalty"] / 2 * gap**2


def order(v: Numbers, o: Options) -> complex:
    def group(rows: list[int]) -> complex:
        best = [i for i in rows if v.reward[i] == max(v.reward[j] for j in rows)]
        if len(best) == len(rows):
            return 0.0
        total = sum(cmath.exp(o["beta"] * v.score(i, "none")) for i in rows)
        return mean_of([cmath.log(total) - o["beta"] * v.score(i, "none") for i in best])

    return each_group(v, group)


def mirror(v: Numbers, o: Options) -> complex:
    total: complex = 0.0
    for rows in v.groups():
        for i in rows:
            others = [v.reward[j] for j in rows if j != i]
            advantage = v.reward[i] - mean_of(others) if others else 0.0
            for t in v.steps(i):
                d = v.log_prob[i, t] - v.old[i, t]
                total += -cmath.exp(d) * advantage + cmath.exp(d) * (cmath.exp(-d) - 1 + d) / o["step"]
    return total / len(v.reward)


def balance(v: Numbers, o: Options) -> complex:
    return mean_of([(v.score(i) - v.reward[i] / o["beta"]) ** 2 / 2 for i in range(len(v.reward))])


def variance(v: Numbers, o: Options) -> complex:
    total: complex = 0.0
    for rows in v.groups():
        residual = [v.score(i) - v.reward[i] / o["beta"] for i in rows]
        total += sum((x - mean_of(residual)) ** 2 / 2 for x in residual)
    return total / len(v.reward)


def sub_balance(v: Numbers, o: Options) -> complex:
    losses = []
    for i in range(len(v.reward)):
        steps = v.steps(i)
        flow = [v.value[i, t] for t in steps] + [v.reward[i] / o["beta"]]
        d = [v.log_prob[i, t] - v.reference[i, t] for t in steps]
        total, weights = 0.0, 0.0
        for a, b in itertools.combinations(range(len(flow)), 2):
            weight = o["lam"] ** (b - a - 1)
            total, weights = total + weight * (flow[a] + sum(d[a:b]) - flow[b]) ** 2, weights + weight
        losses.append(total / weights)
    return mean_of(losses)


def teacher_penalty(v: Numbers, o: Options) -> complex:
    advantage: dict[int, float] = {}
    for rows in v.groups():
        rewards = [v.reward[i] for i in rows]
        mean = mean_of(rewards)
        spread = math.sqrt(sum((r - mean) ** 2 for r in rewards) / max(len(rows) - 1, 1))
        advantage |= {i: 0.0 if len(rows) == 1 else (v.reward[i] - mean) / (spread + 1e-4) for i in rows}

    def step(i: int, t: int) -> complex:
        ratio, a = cmath.exp(v.log_prob[i, t] - v.old[i, t]), advantage[i]
        bounded = min(max(ratio.real, 1 - o["clip"]), 1 + o["clip"])
        clipped = ratio if bounded == ratio.real else bounded
        d = v.log_prob[i, t] - v.teacher[i, t]
        penalty = d**2 / 2 if o["estimate"] == "k2" else cmath.exp(-d) - 1 + d
        here = not o["failing"] or v.reward[i] <= 0
        return larger(-ratio * a, -clipped * a) + (o["kl"] * penalty if here else 0.0)

    return over_tokens(v, step)


def teacher_score(v: Numbers, o: Options) -> complex:
    def advantage(i: int, t: int) -> float:
        a = {k: v.teacher[i, k] - v.old[i, k] for k in v.steps(i)}
        if o["to_go"]:
            return sum(value for k, value in a.items() if k >= t)
        before = sum(abs(value) for k, value in a.items() if k < t) / sum(abs(value) for value in a.values())
        return a[t] * (1 + o["front"] * (1 - before))

    def step(i: int, t: int) -> complex:
        ratio = math.exp(v.log_prob[i, t].real - v.old[i, t])
        return -min(ratio, o["maximum"]) * advantage(i, t) * v.log_prob[i, t]

    return over_tokens(v, step)


def step_pairs(v: Numbers, o: Options) -> complex:
    losses = []
    for i, j in v.pairs("all"):
        weight = 1 / (1 + math.exp(o["beta"] * (v.score(i) - v.score(j)).real))
        losses.append(-weight * (weighed(v, i, 1, o) - weighed(v, j, -1, o)))
    return mean_of(losses)


LOSSES: dict[str, Callable[[Numbers, Options], complex]] = {
    "dpo": dpo,
    "ipo": lambda v, o: paired(v, link("ipo", o["beta"]), lambda i: v.score(i, mean=o["semantics"] == "trl")),
    "slic": lambda v, o: (
        paired(v, lambda a, b: larger(o["margin"] - a + b, 0.0), lambda i: v.score(i, "none"))
        + o["likelihood"] * chosen_likelihood(v)
    ),
    "exo": lambda v, o: paired(v, link("exo-pair", o["beta"], o["smoothing"]), v.score),
    "nca": lambda v, o: paired(v, link("nca-pair", o["beta"]), v.score),
    "robust-dpo": lambda v, o: paired(v, link("robust", o["beta"], o["smoothing"]), v.score),
    "bco": lambda v, o: paired(v, link("bco-pair", o["beta"]), v.score),  # the running mean begins at 0
    "apo": lambda v, o: paired(v, link(f"apo-{o['anchor']}", o["beta"]), v.score),
    "discopop": lambda v, o: paired(v, link("discopop", o["beta"]), v.score),
    "f-dpo": lambda v, o: paired(v, link(o["loss"], o["beta"]), lambda i: shaped(v.score(i), o["divergence"])),
    "ld-dpo": lambda v, o: mean_of(
        [
            link("sigmoid", o["beta"])(tailed(v, i, j, o["tail"]), tailed(v, j, i, o["tail"]))
            for i, j in v.pairs("extremes")
        ]
    ),
    "wpo": lambda v, o: mean_of(
        [own(v, i) * own(v, j) * link(o["loss"], o["beta"])(v.score(i), v.score(j)) for i, j in v.pairs("extremes")]
    ),
    "kto": prospect,
    "simpo": lambda v, o: paired(
        v,
        lambda a, b: (
            -(1 - o["smoothing"]) * ls(o["beta"] * (a - b) - o["gamma"])
            - o["smoothing"] * ls(o["gamma"] - o["beta"] * (a - b))
        ),
        lambda i: v.score(i, "none", mean=True),
    ),
    "alphapo": lambda v, o: paired(
        v,
        lambda a, b: -ls(o["beta"] * (a - b) - o["gamma"]),
        lambda i: (1 - cmath.exp(v.score(i, "none", mean=True)) ** -o["alpha"]) / o["alpha"],
    ),
    "cpo": lambda v, o: (
        paired(v, link("sigmoid", o["beta"], o["smoothing"]), lambda i: v.score(i, "none"))
        + o["likelihood"] * chosen_likelihood(v)
    ),
    "orpo": lambda v, o: o["odds"] * paired(v, odds, lambda i: v.score(i, "none", mean=True)) + chosen_likelihood(v),
    "rso": lambda v, o: paired(v, link(o["loss"], o["beta"]), v.score, "kept"),
    "online-dpo": lambda v, o: paired(v, link(o["loss"], o["beta"]), v.score),
    "iterative-dpo": lambda v, o: paired(v, link("sigmoid", o["beta"]), v.score),
    "pre-dpo": lambda v, o: paired(v, link("sigmoid", o["beta"]), lambda i: v.score(i, "teacher"), o["pairs"]),
    "step-dpo": lambda v, o: mean_of(
        [link("sigmoid", o["beta"])(parted(v, i, j), parted(v, j, i)) for i, j in v.pairs(o["pairs"])]
    ),
    "tgdpo": lambda v, o: mean_of(
        [
            link("sigmoid", o["beta"])(guided(v, i, o["alpha"], o["beta"]), guided(v, j, -o["alpha"], o["beta"]))
            for i, j in v.pairs("extremes")
        ]
    ),
    "full-step-dpo": step_pairs,
    "copg": consistency,
    "dno": nash,
    "sppo": self_play,
    "disco": discriminative,
    "op-gfn": order,
    "mdpo": mirror,
    "trajectory-balance": balance,
    "vargrad": variance,
    "sub-trajectory-balance": sub_balance,
    "kdrl": teacher_penalty,
    "on-policy-distillation": teacher_score,
}
"""The whole loss by id; options are the card's."""

WAYS: dict[str, list[Options]] = {
    "dpo": [
        {"pairs": "all", "beta": 0.7, "smoothing": 0.2},
        {"pairs": "mean", "weighted": True, "tail": 0.3},
        *({"loss": name, "beta": 0.7, "smoothing": 0.1} for name in ("robust", "exo-pair", "aot", "aot-unpaired")),
        {"loss": "sigmoid-norm", "beta": 0.7, "smoothing": 0.1, "divergence": "alpha"},
        {"loss": "ipo", "beta": 0.7, "divergence": "js", "tail": 0.3},
        {"loss": "hinge", "beta": 0.7, "divergence": "forward-kl"},
        {"loss": "discopop", "beta": 0.05, "divergence": "alpha", "weighted": True},
        *({"loss": name, "beta": 0.7, "tail": 0.3} for name in ("nca-pair", "bco-pair", "sppo-hard")),
        *({"loss": name, "beta": 0.7, "pairs": "all"} for name in ("apo-zero", "apo-down")),
    ],
    "ipo": [{"semantics": "trl", "beta": 0.7}],
    "apo": [{"anchor": "down", "beta": 0.7}],
    "f-dpo": [{"divergence": "alpha", "loss": "hinge", "beta": 0.7}, {"divergence": "forward-kl"}],
    "wpo": [{"loss": "hinge"}],
    "kto": [{"beta": 0.7, "desirable": 1.3, "undesirable": 0.8, "threshold": -0.2}],
    "simpo": [{"smoothing": 0.1}],
    "cpo": [{"smoothing": 0.1, "beta": 0.7}],
    "rso": [{"loss": "sigmoid", "accept": 3}],
    "online-dpo": [{"loss": "ipo", "beta": 0.7}],
    "pre-dpo": [{"pairs": "all"}],
    "step-dpo": [{"pairs": "extremes"}],
    "full-step-dpo": [{"beta": 0.7, "temperature": 2.0, "rate": 0.3}, {"temperature": 0.0, "rate": 0.0}],
    "disco": [{"ratio": True, "temperature": 2.0, "threshold": 0.0, "limit": -2.0, "penalty": 0.7}],  # so that it bites
    "kdrl": [{"kl": 0.5, "failing": True, "estimate": "k3"}],
    "on-policy-distillation": [{"to_go": True}, {"front": 0.5, "maximum": 1.1}],
}
"""Options that an oracle tries beside the defaults."""
