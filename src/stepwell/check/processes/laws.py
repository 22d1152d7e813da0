"""The laws of a process's rollouts and scores, one function each: the largest deviation found, or `LawBroken`."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from stepwell.check.processes.bench import Bench, broken, trainable
from stepwell.check.replay import hashable, outcomes
from stepwell.columns import Columns
from stepwell.distributions import Distribution
from stepwell.errors import Unenumerable
from stepwell.meter import Cost
from stepwell.process.abilities import Enumerable
from stepwell.process.base import Process, State
from stepwell.rng import Replay
from stepwell.sampling.record import Drawn
from stepwell.sampling.request import Prompt, Request
from stepwell.sampling.rollout import rollout
from stepwell.trajectories import Trajectories, concatenate, pad_steps

_OUTCOMES = 1000  # rollouts of one row that are gone through for the exact law


def ratio(bench: Bench, rows: Trajectories) -> float:
    sentence = "the score of a step is not the log-probability stored when it was drawn (row, step)"
    return bench.hold("ratio", bench.score(rows).masked_fill(~rows.mask, 0.0), rows.log_prob, sentence)


def seed(bench: Bench, drawn: Drawn) -> float:
    again = bench.draw()
    for name in ("action", "log_prob", "mask", "length", "node", "truncated", "outcome", "weight"):
        if not torch.equal(getattr(again.trajectories, name), getattr(drawn.trajectories, name)):
            broken("seed", f"two rollouts with the same seed differ in '{name}'.")
    for first, second in zip(drawn.samples.values, again.samples.values, strict=True):
        if isinstance(first, str | list | tuple | Tensor) and hashable(first) != hashable(second):
            broken("seed", f"two rollouts with the same seed gave the samples {first} and {second}.")
    return 0.0


def rows(bench: Bench, rows: Trajectories) -> float:
    scores = bench.score(rows)
    back = torch.arange(len(rows)).flip(0)
    worst = bench.hold("rows", bench.score(rows[back]), scores[back], "the order of the rows changes their scores")
    for row in range(min(len(rows), 4)):
        alone = torch.tensor([row])
        found = bench.score(rows[alone])
        worst = max(worst, bench.hold("rows", found, scores[alone], "a row scores otherwise alone"))
    return worst


def padding(bench: Bench, rows: Trajectories) -> float:
    """`rows` are those of the requests, `group` a prompt."""
    scores, steps = bench.score(rows), rows.mask.shape[1]
    wide = bench.score(pad_steps(rows, steps + 3))
    worst = bench.hold("padding", wide[:, :steps], scores, "more steps on the right change the scores")
    worst = max(worst, bench.hold("padding", wide[:, steps:], 0 * wide[:, steps:], "padded steps have a score"))
    single = [bench.process.condition([value]) for value in bench.values]
    for place, condition in enumerate(single):
        if condition is None:
            continue
        here = torch.arange(place * bench.group, (place + 1) * bench.group)
        context = condition[torch.zeros(bench.group, dtype=torch.long)]
        sentence = f"prompt {place} scores otherwise by itself than beside prompts of other lengths"
        worst = max(worst, bench.hold("padding", bench.score(rows[here], context), scores[here], sentence))
    together = bench.process.condition(bench.values)
    if together is not None:
        entries: dict[str, Any] = {}
        for key, value in together.items():
            ragged = value.dim() > 1 and len({part[key].shape[1] for part in single if part is not None}) > 1
            entries[str(key)] = pad(value, (0, 0) * (value.dim() - 2) + (2, 0)) if ragged else value  # type: ignore[arg-type]
        owner = torch.arange(len(rows)) // bench.group
        context = Columns(entries, len(single))[owner]
        sentence = "a condition padded further on the left changes the scores"
        worst = max(worst, bench.hold("padding", bench.score(rows, context), scores, sentence))
    return worst


def _counting(process: Process) -> tuple[Process, list[int]]:
    """A twin on the same meter, and the list in which it notes the number of rows of every proposal."""
    proposed: list[int] = []
    twin = copy.copy(process)

    def propose(state: State) -> Distribution:
        proposed.append(len(state))
        return process.propose(state)

    vars(twin)["propose"] = propose
    return twin, proposed


def _spent(process: Process, act: Callable[[], object]) -> Cost:
    """The cost of an act, held to whole, non-negative counts."""
    before = process.meter.read()
    act()
    cost = process.meter.read() - before
    for unit in ("model_evaluations", "forward", "backward", "reward_calls", "constraint_checks"):
        amount = getattr(cost, unit)
        if not isinstance(amount, int) or amount < 0:
            broken("meter", f"the count of '{unit}' is {amount!r}; a count is a whole number of at least 0.")
    return cost


def _units(cost: Cost) -> tuple[int, int, int]:
    return cost.model_evaluations, cost.forward, cost.backward


def _different_beginnings(rows: Trajectories, wanted: Tensor) -> int:
    """The number of distributions that the wanted steps (N, T) need: rows that share their past may share its cost."""
    beginnings = set()
    for prompt, row, steps in zip(rows.prompt.tolist(), rows.action.tolist(), wanted.tolist(), strict=True):
        beginnings |= {(prompt, hashable(row[:step])) for step, here in enumerate(steps) if here}
    return len(beginnings)


def meter(bench: Bench, rows: Trajectories, evaluations_per_step: int | None) -> float:
    process, (counting, proposals) = bench.process, _counting(bench.process)
    once = _spent(process, lambda: bench.draw(counting))
    twice = _spent(process, lambda: [bench.draw(), bench.draw()])
    drawn = bench.draw().trajectories
    place = torch.arange(drawn.mask.shape[1])
    proposed = (place >= process.free_steps) & (place < drawn.length.cpu()[:, None])
    steps = _different_beginnings(drawn, proposed)
    if _units(twice) != _units(once + once):
        broken("meter", f"a rollout counts {_units(once)}, the same two times over {_units(twice)}.")
    if once.forward < steps or once.model_evaluations < 1 or once.backward:
        sentence = f"a rollout that proposes after {steps} different beginnings counts {_units(once)}"
        broken("meter", f"{sentence} (evaluations, forward, backward): each goes forward, and nothing backward.")
    wanted = (evaluations_per_step or 0) * sum(proposals)
    if evaluations_per_step is not None and once.model_evaluations != wanted:
        broken("meter", f"a rollout counts {once.model_evaluations} model evaluations, where {wanted} were made.")
    state = process.start(bench.values[:1], bench.rng.split("start"))
    idle = _spent(process, lambda: (state[torch.tensor([0])], process.condition(bench.values)))
    if any(_units(idle)):
        broken("meter", f"a fork and a condition ran no model, yet count {_units(idle)}.")
    cost = _spent(process, lambda: bench.score(rows))
    padded = _spent(process, lambda: bench.score(pad_steps(rows, rows.mask.shape[1] + 3)))
    if _units(padded) != _units(cost):
        broken("meter", f"padding is counted: the same rows cost {_units(cost)}, and padded {_units(padded)}.")
    distinct = _different_beginnings(rows, rows.mask)
    if cost.forward < distinct or cost.backward:
        broken(
            "meter",
            f"scoring {distinct} steps without gradient counts {_units(cost)} (evaluations, forward, backward).",
        )
    learns = bool(rows.mask.any()) and trainable(process.module)
    if learns and not _spent(process, lambda: process.score(rows)).backward:
        broken("meter", "scoring with a gradient counts nothing backward.")
    return 0.0


def gradient(bench: Bench, rows: Trajectories) -> float:
    log_prob = bench.process.score(rows).log_prob
    outside = log_prob[~rows.mask]
    bench.hold("gradient", outside, torch.zeros_like(outside), "a step that is masked out has a score")
    parameters = trainable(bench.process.module)
    if not log_prob.requires_grad:
        broken("gradient", "the scores do not depend on the module's parameters.")
    found = torch.autograd.grad(log_prob.sum(), parameters, allow_unused=True)
    gradients = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]
    if not all(bool(gradient.isfinite().all()) for gradient in gradients):
        broken("gradient", "the gradient of the scores is not finite.")
    if not any(bool(gradient.any()) for gradient in gradients):
        broken("gradient", "the gradient of the scores is 0 in every parameter.")
    if any(parameter.dtype != torch.float64 for parameter in parameters) or log_prob.dtype != torch.float64:
        return 0.0
    direction = _direction(bench, parameters)
    near, far = (_slope(bench, rows, parameters, direction, width) for width in (1e-5, 1e-4))
    analytic = float(sum((g * along).sum() for g, along in zip(gradients, direction, strict=True)))
    uncertain = abs(near - far)  # of both, by curvature and by rounding
    if not abs(near - analytic) < 1e-4 * (1 + abs(analytic)) + 2 * uncertain:
        broken("gradient", f"the slope of the scores is {near:.8g}, their gradient says {analytic:.8g}.")
    return 0.0


def _slope(
    bench: Bench, rows: Trajectories, parameters: Sequence[nn.Parameter], direction: Sequence[Tensor], width: float
) -> float:
    """The central difference of the sum of all scores along a direction."""
    ends = []
    for sign in (1, -1):
        with _moved(parameters, [sign * width * along for along in direction]):
            ends.append(float(bench.score(rows).sum()))
    return (ends[0] - ends[1]) / (2 * width)


def _direction(bench: Bench, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """A random direction in the space of the parameters."""
    return [
        bench.rng.split("direction", place).normal(*parameter.shape, dtype=parameter.dtype).to(parameter.device)
        for place, parameter in enumerate(parameters)
    ]


@contextmanager
def _moved(parameters: Sequence[nn.Parameter], by: Sequence[Tensor]) -> Iterator[None]:
    """The parameters moved for a while, and then put back bit for bit."""
    before = [parameter.detach().clone() for parameter in parameters]
    try:
        for parameter, amount in zip(parameters, by, strict=True):
            parameter.data += amount
        yield
    finally:
        for parameter, value in zip(parameters, before, strict=True):
            parameter.data.copy_(value)


def frozen(bench: Bench, rows: Trajectories) -> float:
    process, twin = bench.process, bench.process.frozen()
    scores = twin.score(rows).log_prob
    worst = bench.hold("frozen", scores, bench.score(rows), "the frozen twin scores otherwise than the original")
    if scores.requires_grad:
        broken("frozen", "the scores of the frozen twin carry a gradient.")
    if twin.module is not process.module and trainable(twin.module):
        broken("frozen", "a parameter of the frozen twin requires a gradient.")
    if bool(rows.mask.any()) and not _spent(process, lambda: twin.score(rows)).forward:
        broken("frozen", "what the frozen twin spends is not on the original's meter.")
    parameters = trainable(process.module)
    with _moved(parameters, [0.1 * along for along in _direction(bench, parameters)]):
        after = twin.score(rows).log_prob
    return max(worst, bench.hold("frozen", after, scores, "the frozen twin changed when the original learned"))


def exact_law(bench: Bench) -> float:
    worst = 0.0
    for place, value in enumerate(bench.values):
        request = Request(Prompt(place, value), 1, horizon=bench.horizon)
        draw = partial(rollout, bench.process, [request])
        for script in ([], [-1]):  # the first path may end at once; so may that of the last first choice, not both
            path = Replay(script)
            draw(path)
            if math.prod(path.branches) > _OUTCOMES:
                raise Unenumerable(f"one row has about {math.prod(path.branches):.0e} outcomes")
        probability, parts = zip(*outcomes(draw, limit=_OUTCOMES), strict=True)
        scores = bench.score(concatenate([part.trajectories for part in parts], renumber=True)).sum(1)
        found = torch.tensor(probability, dtype=torch.float64)
        sentence = f"the probability of drawing a row for prompt {place} is not the one it is scored with"
        worst = max(worst, bench.hold("exact law", found, scores.double().exp().cpu(), sentence))
        total = torch.tensor([math.fsum(probability)], dtype=torch.float64)
        bench.hold("exact law", total, torch.ones_like(total), "the probabilities of all outcomes do not add up to 1")
        if isinstance(bench.process, Enumerable) and bench.horizon is None:
            strings, exact = bench.process.strings(), bench.process.string_probabilities(value).detach()
            table = dict.fromkeys(strings, 0.0)
            for weight, part in zip(probability, parts, strict=True):
                text = part.samples.values[0]
                table[text] = table.get(text, 0.0) + weight
            found = torch.tensor([table[text] for text in strings], dtype=torch.float64)
            worst = max(worst, bench.hold("exact law", found, exact, "a string is not drawn with its probability"))
    return worst
