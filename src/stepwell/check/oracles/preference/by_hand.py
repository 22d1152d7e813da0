"""Every preference, balance and distillation loss written out in plain numbers, pair by pair and step by step.

Losses are functions of complex log-probabilities: a step of 1e-30 i in one of them has the exact slope as its
imaginary part, so that neither autograd nor a difference quotient is trusted.
"""

from __future__ import annotations

import cmath
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from stepwell.columns import Columns
from stepwell.rng import Rng
from stepwell.trajectories import Trajectories, make

Options = Mapping[str, Any]


@dataclass(frozen=True)
class Numbers:
    """Rows as numbers: (N, T) arrays, of which `log_prob` is complex, and (N,) rewards, prompts and lengths."""

    log_prob: np.ndarray
    reference: np.ndarray
    teacher: np.ndarray
    old: np.ndarray
    squares: np.ndarray
    value: np.ndarray
    mask: np.ndarray
    action: np.ndarray
    segment: np.ndarray
    kept: np.ndarray
    value_after: np.ndarray
    ends: np.ndarray
    reward: np.ndarray
    prompt: np.ndarray
    length: np.ndarray

    def steps(self, row: int) -> list[int]:
        return [t for t in range(self.mask.shape[1]) if self.mask[row, t]]

    def score(self, row: int, against: str = "reference", mean: bool = False) -> complex:
        other = 0 * self.reference if against == "none" else getattr(self, against)
        total = sum(self.log_prob[row, t] - other[row, t] for t in self.steps(row))
        return total / max(len(self.steps(row)), 1) if mean else total

    def groups(self) -> list[list[int]]:
        return [[i for i in range(len(self.prompt)) if self.prompt[i] == key] for key in sorted(set(self.prompt))]

    def pairs(self, kind: str = "extremes") -> list[tuple[int, int]]:
        found = []
        for group in self.groups():
            mean = sum(self.reward[i] for i in group) / len(group)
            best, worst = max(self.reward[i] for i in group), min(self.reward[i] for i in group)
            for i, j in itertools.permutations(group, 2):
                fits = {
                    "all": True,
                    "mean": self.reward[i] > mean > self.reward[j],
                    "extremes": self.reward[i] == best and self.reward[j] == worst,
                    "kept": bool(self.kept[i] and self.kept[j]),
                }[kind]
                if fits and self.reward[i] > self.reward[j]:
                    found.append((i, j))
        return found


def some_rows(seed: int = 1) -> tuple[Trajectories, dict[str, torch.Tensor]]:
    """Rows of ragged groups with holes in their masks, all fields that a method may read, and scores by name."""
    rng, prompt = Rng(seed), torch.tensor([0, 0, 1, 2, 0, 1, 3, 2, 1, 0])
    length = torch.tensor([5, 3, 4, 5, 2, 5, 4, 1, 3, 4])
    count, steps = len(prompt), 5
    mask = (torch.arange(steps) < length[:, None]) & (rng.uniform(count, steps) < 0.85)
    mask[:, 0] = True
    present, reference, teacher, old, value = (
        (rng.normal(count, steps, dtype=torch.float64) - 1.5).clamp(max=-0.05) * mask for _ in range(5)
    )
    segment = (torch.arange(steps) // 2).expand(count, steps).contiguous()
    vines = {
        "value_after": rng.split("vines").normal(count, 3, dtype=torch.float64).gather(1, segment),
        "ends": (segment == ((length - 1) // 2)[:, None]).double(),
    }
    rows = make(
        (rng.uniform(count, steps) * 2).long(),
        old,
        mask,
        length=length,
        prompt=prompt,
        reward=rng.normal(count, dtype=torch.float64),
        segment=segment,
        old_log_prob=old,
        reference_log_prob=reference,
        value=value,
        info=Columns({"teacher_log_prob": teacher, **vines}, count),
    )
    squares = (0.1 + 0.8 * rng.uniform(count, steps, dtype=torch.float64)) * mask
    return rows, {"log_prob": present, "sum_of_squares": squares, "value": value}


def numbers(rows: Trajectories, scores: Mapping[str, torch.Tensor]) -> Numbers:
    """The rows of `some_rows`, with what a method drew for them, as numbers."""
    kept = torch.zeros(len(rows)) if rows.points is None else rows.points["kept"]
    assert rows.info is not None
    tensors = {
        "log_prob": scores["log_prob"].detach().to(torch.complex128),
        "reference": rows.reference_log_prob,
        "teacher": rows.info["teacher_log_prob"],
        **{name: rows.info[name] for name in ("value_after", "ends")},
        "old": rows.old_log_prob,
        "squares": scores["sum_of_squares"],
        "value": scores["value"],
        "kept": kept,
        **{name: getattr(rows, name) for name in ("mask", "action", "segment", "reward", "prompt", "length")},
    }
    return Numbers(**{name: np.asarray(value) for name, value in tensors.items()})


def slopes(loss: Callable[[Numbers], complex], view: Numbers) -> tuple[float, np.ndarray]:
    """The loss and its slope in every log-probability."""
    answer = np.zeros(view.mask.shape)
    for row, step in zip(*view.mask.nonzero(), strict=True):
        moved = view.log_prob.copy()
        moved[row, step] += 1e-30j
        answer[row, step] = complex(loss(replace(view, log_prob=moved))).imag / 1e-30
    return complex(loss(view)).real, answer


def ls(z: complex) -> complex:
    """log sigmoid."""
    return -cmath.log(1 + cmath.exp(-z))


def sigmoid(z: complex) -> complex:
    return 1 / (1 + cmath.exp(-z))


def larger(a: complex, b: complex) -> complex:
    return a if complex(a).real >= complex(b).real else b


def link(name: str, beta: float, e: float = 0.0) -> Callable[[complex, complex], complex]:
    """The loss of a pair's two scores."""

    def logistic(a: complex, b: complex) -> complex:
        return -(1 - e) * ls(beta * (a - b)) - e * ls(-beta * (a - b))

    def exact(a: complex, b: complex) -> complex:
        q = sigmoid(beta * (a - b))
        return q * cmath.log(q / (1 - e)) + (1 - q) * cmath.log((1 - q) / e)

    def blend(a: complex, b: complex) -> complex:
        u, m = beta * (a - b), sigmoid(beta * (a - b) / 0.05)
        return (1 - m) * -ls(u) + m * cmath.exp(-u)

    return {
        "sigmoid": logistic,
        "sigmoid-norm": logistic,
        "aot": logistic,
        "aot-unpaired": logistic,
        "robust": lambda a, b: (-(1 - e) * ls(beta * (a - b)) + e * ls(-beta * (a - b))) / (1 - 2 * e),
        "exo-pair": exact,
        "hinge": lambda a, b: larger(1 - beta * (a - b), 0.0),
        "ipo": lambda a, b: (a - b - 0.5 / beta) ** 2,
        "nca-pair": lambda a, b: -ls(beta * a) - (ls(-beta * a) + ls(-beta * b)) / 2,
        "bco-pair": lambda a, b: -ls(beta * a) - ls(-beta * b),
        "sppo-hard": lambda a, b: (a - 0.5 / beta) ** 2 + (b + 0.5 / beta) ** 2,
        "apo-zero": lambda a, b: 1 - sigmoid(beta * a) + sigmoid(beta * b),
        "apo-down": lambda a, b: sigmoid(beta * a) + 1 - sigmoid(beta * (a - b)),
        "discopop": blend,
    }[name]


def odds(a: complex, b: complex) -> complex:
    """-log sigmoid of the difference of log odds."""
    return -ls(cmath.log(cmath.exp(a) / (1 - cmath.exp(a))) - cmath.log(cmath.exp(b) / (1 - cmath.exp(b))))


def shaped(s: complex, divergence: str, alpha: float = 0.5) -> complex:
    """f' of the ratio exp(s)."""
    ratio = cmath.exp(s)
    return {
        "reverse-kl": lambda: s,
        "forward-kl": lambda: 1 - 1 / ratio,
        "js": lambda: cmath.log(2 * ratio / (1 + ratio)),
        "alpha": lambda: (ratio ** (alpha - 1) - 1) / (alpha - 1),
    }[divergence]()


def mean_of(values: list[Any]) -> Any:
    return sum(values) / max(len(values), 1)


def paired(
    v: Numbers, form: Callable[..., complex], score: Callable[[int], complex], kind: str = "extremes"
) -> complex:
    """The mean over pairs of a link of the rows' scores."""
    return mean_of([form(score(i), score(j)) for i, j in v.pairs(kind)])


def chosen_likelihood(v: Numbers, kind: str = "extremes") -> complex:
    """-the mean log-probability of the steps of chosen rows."""
    taken = [v.log_prob[i, t] for i, _ in v.pairs(kind) for t in v.steps(i)]
    return -mean_of(taken)


def tailed(v: Numbers, i: int, j: int, tail: float) -> complex:
    """Row i's score where its steps beyond row j's number count `tail` times."""
    shared = min(len(v.steps(i)), len(v.steps(j)))
    taken = enumerate(v.steps(i))
    return sum((1.0 if k < shared else tail) * (v.log_prob[i, t] - v.reference[i, t]) for k, t in taken)


def parted(v: Numbers, i: int, j: int) -> complex:
    """Row i's score of the step in which it parts from row j."""
    both = min(v.length[i], v.length[j])
    first = next((t for t in range(both) if v.action[i, t] != v.action[j, t]), both)
    if first >= v.length[i]:
        return 0.0
    inside = [t for t in v.steps(i) if t >= first and v.segment[i, t] == v.segment[i, first]]
    return sum(v.log_prob[i, t] - v.reference[i, t] for t in inside)


def guided(v: Numbers, i: int, alpha: float, beta: float) -> complex:
    """Row i's score, each step times 1 + alpha beta (log guide - log reference)."""
    gain = alpha * beta * (v.teacher - v.reference)
    return sum((1 + gain[i, t]) * (v.log_prob[i, t] - v.reference[i, t]) for t in v.steps(i))


def weighed(v: Numbers, i: int, sign: int, o: Options) -> complex:
    """Row i's log-probabilities, each times sigmoid(-+rate d) and its softmax of +-temperature times its step's worth.

    The factors are constants: they have no imaginary part.
    """
    worth = {t: v.reward[i] if v.ends[i, t] else v.value_after[i, t] for t in v.steps(i)}
    mass = sum(math.exp(sign * o["temperature"] * s) for s in worth.values())
    total: complex = 0.0
    for t, s in worth.items():
        d = v.log_prob[i, t].real - v.reference[i, t]
        factor = math.exp(sign * o["temperature"] * s) / mass / (1 + math.exp(sign * o["rate"] * d))
        total += factor * v.log_prob[i, t]
    return total


def own(v: Numbers, i: int) -> float:
    """WPO's weight of row i."""
    return math.exp(mean_of([v.log_prob[i, t].real - math.log(v.squares[i, t]) for t in v.steps(i)]))


def win_rate(v: Numbers, i: int) -> float:
    others = [j for j in range(len(v.reward)) if v.prompt[j] == v.prompt[i] and j != i]
    return sum(sigmoid(v.reward[i] - v.reward[j]).real for j in others) / max(len(others), 1)


def each_group(v: Numbers, function: Callable[[list[int]], complex]) -> complex:
    return mean_of([function(group) for group in v.groups()])


def over_tokens(v: Numbers, function: Callable[[int, int], complex]) -> complex:
    return mean_of([function(i, t) for i in range(len(v.reward)) for t in v.steps(i)])
