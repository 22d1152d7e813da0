"""Benches of methods: a small process of the kind that a method is for, and rows that its own planner drew from it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stepwell.batch import Read
from stepwell.check.oracles.flow.steps import near
from stepwell.data.stream import PromptStream
from stepwell.errors import InputError
from stepwell.planning.base import Planner
from stepwell.process.exact.table import END, TabularLanguage, markov
from stepwell.process.flow.build import flow
from stepwell.process.models import Models
from stepwell.recipe.recipe import Recipe
from stepwell.reward.mixing import Rewards
from stepwell.rng import Rng
from stepwell.sampling.request import Prompt
from stepwell.training.collect import collect
from stepwell.training.scoring import fill
from stepwell.trajectories import FIELDS, Trajectories, concatenate

OLD_LOG_PROB = Read("policy", "log_prob")


def bench(recipe: Recipe, kind: str = "language") -> tuple[Models, Trajectories]:
    """A small process of a kind, and rows that an earlier version of it drew, with all that the method reads.

    The recipe's own planner asks for the rows, so that its notes are there. Raises `InputError` for a kind of process
    that has no bench, and for a read of the rows that neither they nor the planner's notes have.
    """
    if kind not in BENCHES:
        raise InputError(
            f"kind must be one of {', '.join(BENCHES)}, got '{kind}': there is no small process of that kind to check "
            "a method on."
        )
    models, rows = BENCHES[kind](recipe)
    tables = (table for table in (rows.info, rows.points) if table is not None)
    known = {*FIELDS, "origin", *(name for table in tables for name, _ in table.items())}
    for read in sorted(recipe.whole.reads):
        if read.name not in known:
            raise InputError(
                f"A part reads '{read.name}' of the rows, which nobody makes: the planner "
                f"{type(recipe.planner).__name__} notes {', '.join(sorted(notes_of(rows))) or 'nothing'}."
            )
    return models, rows


def notes_of(rows: Trajectories) -> frozenset[str]:
    """The names of what a planner noted of rows."""
    return frozenset() if rows.info is None else frozenset(rows.info.keys())


# languages: a table of symbols, whose groups are ragged

SIZES = (5, 2, 4, 3)
"""The samples of each prompt, for planners that can be resized."""

LENGTH = 40
"""The longest row: longer than a segment of a method's trees and vines."""

DEMONSTRATIONS = ((1, 2, 0), (3, 0), (2, 2, 1, 0), (1, 3, 3, 2, 0))


def earned(completions: Sequence[tuple[int, ...]]) -> list[float]:
    """A reward of no particular form, of either sign, and for one prompt so low that no sample succeeds."""
    return [
        sum(math.sin(3.0 * place + 5.0 * symbol) for place, symbol in enumerate(text, 1)) - 0.7 for text in completions
    ]


def _language_bench(recipe: Recipe) -> tuple[Models, Trajectories]:
    """A tabular model with ragged groups, real rewards that are all different, and a policy that moved on since."""
    process, teacher = _table(7).with_value_head(), _table(12)
    process.module.get_parameter("value").data.copy_(Rng(8).normal(len(SIZES), process.contexts, dtype=torch.float64))
    models = Models(process, process.frozen(), teacher)
    prompts = [
        Prompt(place, place, {"demonstration": text, "hinted": (place + 1) % len(SIZES)})
        for place, text in enumerate(DEMONSTRATIONS)
    ]
    parts = [
        collect(process, planner, _stream(asked), Rewards(earned), Rng(9).split(place), 0).drawn.trajectories
        for place, (planner, asked) in enumerate(_ragged(recipe.planner, prompts))
    ]
    rows = concatenate(parts, renumber=True)
    (count, steps), rng = rows.mask.shape, Rng(10)
    noise = rng.normal(count, steps, dtype=torch.float64) * rows.mask
    rows = rows.replace(
        reward=Rng(19).normal(count, dtype=torch.float64),
        rewards=Rng(13).normal(count, 3, dtype=torch.float64).round(decimals=1),
        segment=(torch.arange(steps) // 2).expand(count, steps).contiguous(),
    )
    rows = recipe.whole.draw(rows, models, rng.split("points"))
    rows = fill(models, rows, {OLD_LOG_PROB, *recipe.whole.reads}, tokens=None)
    rows = rows.replace(log_prob=rows.log_prob + 0.05 * noise)  # the sampler is not quite the old policy
    moved = process.logits + 0.3 * rng.normal(*process.logits.shape, dtype=torch.float64)
    process.logits.data.copy_(moved)  # and the present policy is far enough for clips to bite
    return models, rows


def _table(seed: int) -> TabularLanguage:
    """A table whose texts end seldom enough that some are long."""
    process = markov(symbols=4, length=LENGTH, prompts=len(SIZES), seed=seed)
    process.logits.data[..., END] -= 1.5
    return process


def _ragged(planner: Planner, prompts: list[Prompt]) -> Iterator[tuple[Planner, list[Prompt]]]:
    """The planner for each prompt by itself, with another number of samples where it can be resized; else as it is."""
    if planner.prompts is None:
        yield copy.deepcopy(planner), prompts
        return
    for prompt, size in zip(prompts, SIZES, strict=True):
        try:
            yield planner.resized(1, size), [prompt]
        except InputError:  # a tree has as many leaves as it parts into
            yield planner.resized(1), [prompt]


def _stream(prompts: list[Prompt]) -> PromptStream:
    return PromptStream(prompts, Rng(9).split("prompts"), shuffle=False)


# flows: a velocity in two dimensions


class _Velocity(nn.Module):
    """A velocity of two numbers, their time and a prompt's number, with weights from an Rng."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.inner, self.outer = nn.Linear(4, width, dtype=torch.float64), nn.Linear(width, 2, dtype=torch.float64)
        for place, parameter in enumerate(self.parameters()):
            parameter.data.copy_(0.4 * Rng(7).split(place).normal(*parameter.shape, dtype=torch.float64))

    def forward(self, x: Tensor, time: Tensor, label: Tensor) -> Tensor:
        inputs = torch.cat([x, time[:, None], label[:, None].to(x)], 1)
        return x * time[:, None] + self.outer(torch.tanh(self.inner(inputs)))


FLOW_REWARDS = Rewards(near(1.0, -0.5))
FLOW_PROMPTS = [Prompt(number, number) for number in range(3)]


def _flow_bench(recipe: Recipe) -> tuple[Models, Trajectories]:
    """A small velocity under the method's sampler, drawn from in whole groups and moved on twice."""
    process = flow(_Velocity(), (2,), encode="label").with_sampler(**recipe.sampler)
    models = Models(process, process.frozen())
    _move(process, 0.1)
    planner = recipe.planner if recipe.planner.prompts is None else recipe.planner.resized(len(FLOW_PROMPTS))
    drawn = collect(process, planner, _stream(FLOW_PROMPTS), FLOW_REWARDS, Rng(9), 0, guide=recipe.guide).drawn
    rows = recipe.whole.draw(drawn.trajectories, models, Rng(9).split("points"))
    rows = fill(models, rows, {OLD_LOG_PROB, *recipe.whole.reads}, tokens=None)
    noise = Rng(10).normal(*rows.mask.shape, dtype=torch.float64) * rows.mask
    _move(process, 0.05)
    return models, rows.replace(log_prob=rows.log_prob + 0.05 * noise)


def _move(process: Any, width: float) -> None:
    """Every trained parameter by normal noise."""
    for place, parameter in enumerate(p for p in process.module.parameters() if p.requires_grad):
        noise = Rng(11).split(place).normal(*parameter.shape, dtype=torch.float64)
        parameter.data.add_(width * noise)


BENCHES: dict[str, Callable[[Recipe], tuple[Models, Trajectories]]] = {
    "language": _language_bench,
    "flow": _flow_bench,
}
"""The bench of each kind of process."""
