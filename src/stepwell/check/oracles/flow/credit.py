"""Advantages and weights of flow methods by hand: plain loops over rows, from each method's paper and nothing else."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stepwell.check.oracles.flow.bench import rewards
from stepwell.check.oracles.flow.steps import ChainStep, Matrices
from stepwell.errors import UnknownName
from stepwell.trajectories import Trajectories


@dataclass(frozen=True)
class Seen:
    """A row as an oracle sees it: it shares steps with others by equal states, not by the nodes that code counts by."""

    prompt: int
    reward: float
    states: tuple[tuple[float, ...], ...]
    trained: tuple[int, ...]
    source: int

    @property
    def origin(self) -> Hashable:
        """The prompt and the states before its first trained step."""
        return self.prompt, self.states[: self.trained[0]]

    def step(self, k: int) -> Hashable:
        """Its k-th step with all that led there: the same for rows that share it."""
        return self.prompt, self.states[: k + 1]


def seen(rows: Trajectories) -> list[Seen]:
    """Every row; exact equality of states is what sharing them means."""
    states = rows.action.flatten(2).tolist()
    columns = zip(
        rows.prompt.tolist(), rewards(rows).tolist(), states, rows.mask.tolist(), rows.source.tolist(), strict=True
    )
    return [
        Seen(p, r, tuple(map(tuple, s)), tuple(k for k, on in enumerate(m) if on), source)
        for p, r, s, m, source in columns
    ]


Table = list[dict[int, float]]
"""For each row a number for each of its trained steps."""


def _steps(rows: Sequence[Seen], values: Sequence[float]) -> Table:
    return [dict.fromkeys(row.trained, value) for row, value in zip(rows, values, strict=True)]


def _clip(value: float, bound: float) -> float:
    return max(-bound, min(bound, value))


def standardised(
    rows: Sequence[Seen], key: Callable[[Seen], Hashable], epsilon: float, batch: bool = False
) -> list[float]:
    """(R - mean) / (standard deviation + epsilon) over rows of a key, the deviation of all rows for `batch`."""
    answer = []
    everything = statistics.stdev([row.reward for row in rows])
    for row in rows:
        group = [other.reward for other in rows if key(other) == key(row)]
        scale = everything if batch else statistics.stdev(group)
        answer.append((row.reward - statistics.fmean(group)) / (scale + epsilon))
    return answer


def group(rows: Sequence[Seen], epsilon: float = 1e-4, bound: float = 5.0) -> Table:
    """Within a prompt."""
    return _steps(rows, [_clip(z, bound) for z in standardised(rows, lambda row: row.prompt, epsilon)])


def ddpo(rows: Sequence[Seen]) -> Table:
    """Within a prompt, clipped at 10."""
    return group(rows, bound=10.0)


def mix(rows: Sequence[Seen]) -> Table:
    """Within a prompt, over the deviation and 1e-8."""
    return group(rows, epsilon=1e-8)


def batch(rows: Sequence[Seen]) -> Table:
    """Centred within a prompt, over the deviation of the whole batch."""
    return _steps(rows, [_clip(z, 5.0) for z in standardised(rows, lambda row: row.prompt, 1e-4, batch=True)])


def branch(rows: Sequence[Seen]) -> Table:
    """Within the children of one state."""
    return _steps(rows, [_clip(z, 5.0) for z in standardised(rows, lambda row: row.origin, 1e-4)])


def strides(rows: Sequence[Seen]) -> Table:
    """Within the children of one state that were finished alike, summed over the ways to finish one step."""
    z = standardised(rows, lambda row: (row.origin, row.source), 1e-8)
    last = [row.step(row.trained[-1]) for row in rows]
    pooled = [sum(other for other, step in zip(z, last, strict=True) if step == mine) for mine in last]
    return _steps(rows, [_clip(value, 5.0) for value in pooled])


def tree(rows: Sequence[Seen]) -> Table:
    """The mean of the leaves below a step less that of all leaves below its state, over the deviation of the leaves."""
    answer: Table = []
    for row in rows:
        leaves = statistics.stdev([other.reward for other in rows if other.prompt == row.prompt])
        entry = {}
        for k in row.trained:
            below = [other.reward for other in rows if other.step(k) == row.step(k)]
            family = [other.reward for other in rows if other.step(k - 1) == row.step(k - 1)]
            entry[k] = (statistics.fmean(below) - statistics.fmean(family)) / (leaves + 1e-4)
        answer.append(entry)
    return answer


def extremes(rows: Sequence[Seen]) -> Table:
    """z within the prompt of each state's best where z >= 0.7 and worst where z < -0.7; 0 for all others."""
    z = standardised(rows, lambda row: row.prompt, 1e-4)
    kept = []
    for row, value in zip(rows, z, strict=True):
        branches = [other for other, its in zip(z, rows, strict=True) if its.origin == row.origin]
        good, bad = value == max(branches) and value >= 0.7, value == min(branches) and value < -0.7
        kept.append(_clip(value, 5.0) if good or bad else 0.0)
    return _steps(rows, kept)


def others(rows: Sequence[Seen]) -> Table:
    """R less the mean of a prompt's other rows."""
    values = []
    for place, row in enumerate(rows):
        rest = [other.reward for at, other in enumerate(rows) if other.prompt == row.prompt and at != place]
        values.append(row.reward - statistics.fmean(rest))
    return _steps(rows, values)


def token(rows: Sequence[Seen]) -> Table:
    """1 / all trained steps."""
    return _steps(rows, [1.0 / sum(len(row.trained) for row in rows)] * len(rows))


def row_sum(rows: Sequence[Seen]) -> Table:
    """1 / rows."""
    return _steps(rows, [1.0 / len(rows)] * len(rows))


def edge(rows: Sequence[Seen]) -> Table:
    """1 / distinct trained steps, the rows that share one sharing it equally."""
    share: dict[Hashable, int] = {}
    for row in rows:
        for k in row.trained:
            share[row.step(k)] = share.get(row.step(k), 0) + 1
    return [{k: 1.0 / (share[row.step(k)] * len(share)) for k in row.trained} for row in rows]


@dataclass(frozen=True)
class Definition:
    """A method by hand: the kind of its random steps, its advantages, and its weights.

    `level` is the option that sets the noise, or its value; `factor` multiplies the weights of a step: by `noise`, its
    q over the mean q of all trained steps, or `guard`, q / (D |dt|). `kl` is taken off the reward, times the path's
    log-ratio to the reference.
    """

    kind: str
    level: str | float
    advantage: Callable[[Sequence[Seen]], Table]
    weight: Callable[[Sequence[Seen]], Table] = token
    factor: str = ""
    kl: str = ""


DEFINITIONS = {
    "ddpo-sf": Definition("ddpm", "eta", ddpo, row_sum),
    "ddpo-is": Definition("ddpm", "eta", ddpo),
    "flow-grpo": Definition("flow", "level", batch),
    "dance-grpo": Definition("dance", "level", group),
    "mix-grpo": Definition("flow", "level", mix),
    "tempflow-grpo": Definition("flow", "level", branch, factor="noise"),
    "g2rpo": Definition("flow", "level", strides, edge),
    "grpo-guard": Definition("flow", "level", batch, factor="guard"),
    "dynamic-treerpo": Definition("flow", "level", tree, edge),
    "b2-diffurl": Definition("ddpm", 1.0, extremes),
    "flow-dppo": Definition("flow", "level", batch),
    "loop": Definition("ddpm", "eta", others, row_sum),
    "ctrl": Definition("flow", "level", others, row_sum, kl="kl"),
    "spo": Definition("ddpm", "eta", branch),
}
"""Every method whose steps are Gaussian, by its id."""


def definition(id: str) -> Definition:
    """A method's definition by hand; an unknown one is an error that names the nearest."""
    if id not in DEFINITIONS:
        raise UnknownName("method that is defined by hand", id, DEFINITIONS)
    return DEFINITIONS[id]


def factors(rows: Sequence[Seen], factor: str, steps: Sequence[ChainStep], dimension: int) -> Table:
    """The factor of each step's weight, `steps[k - 1]` being the step that led to state k."""
    if factor == "guard":
        one = {k + 1: step.noise / (dimension * (step.time - step.target)) for k, step in enumerate(steps)}
    else:
        mean = statistics.fmean(steps[k - 1].noise for row in rows for k in row.trained)
        one = {k + 1: step.noise / mean if factor == "noise" else 1.0 for k, step in enumerate(steps)}
    return [{k: one[k] for k in row.trained} for row in rows]


def path_log_ratio(rows: Trajectories, steps: Sequence[ChainStep], numbers: Matrices, reference: Matrices) -> Tensor:
    """(N,) the sum over a row's trained steps of log p - log p_reference, Gaussians of the same deviation."""
    answer = torch.zeros(len(rows), dtype=torch.float64)
    for k, step in enumerate(steps, 1):
        here = rows.mask[:, k]
        before, after = rows.action[here, k - 1], rows.action[here, k]
        near, far = ((after - side.mean(step, before)).square().sum(1) for side in (numbers, reference))
        answer[here] += (far - near) / (2 * step.noise**2) if step.noise else 0.0
    return answer
