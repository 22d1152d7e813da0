"""Oracles of methods whose planner draws more than samples: expectations over every outcome of their rollouts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from stepwell.batch import Batch, Read
from stepwell.check.oracles.credit.gradients import gradient_of, plain, written_out
from stepwell.check.oracles.provable import Provable, deviation, policy_of
from stepwell.check.oracles.registry import register
from stepwell.check.replay import expectation
from stepwell.credit.group import GroupCredit
from stepwell.credit.traces import whiten
from stepwell.data.stream import PromptStream
from stepwell.objective.policy import Policy
from stepwell.objective.reduction import Reduction
from stepwell.objective.surrogate import Plain
from stepwell.objective.term import Objective
from stepwell.parts import column
from stepwell.planning.base import Planner
from stepwell.process.exact.table import TabularLanguage, markov
from stepwell.process.models import Models
from stepwell.reward.mixing import Rewards
from stepwell.rng import Rng
from stepwell.sampling.request import Prompt
from stepwell.training.collect import collect
from stepwell.training.scoring import fill
from stepwell.trajectories import Trajectories, count

Judge = Callable[..., list[float]]


def small(**settings: Any) -> TabularLanguage:
    """Strings of one or two symbols out of two, each context with a distribution of its own."""
    return markov(**{"symbols": 2, "length": 2, "order": None, "seed": 4} | settings)


def earned(text: tuple[int, ...]) -> float:
    """A reward of no particular form."""
    return {1: 0.3, 2: -0.8, 3: 0.6}.get(len(text), 0.1) + 1.1 * text[-1] + 0.4 * text[0]


def judged(completions: list[tuple[int, ...]]) -> list[float]:
    return [earned(text) for text in completions]


def drawn(process: TabularLanguage, planner: Planner, rng: Rng, judge: Judge = judged, hint: int | None = None) -> Any:
    """The rows of one prompt that a training step gives credit on."""
    columns = {} if hint is None else {"hinted": hint}
    stream = PromptStream([Prompt(0, 0, columns)], Rng(0), shuffle=False)
    return collect(process, planner, stream, Rewards(judge), rng, 0).drawn.trajectories


def ascent(process: TabularLanguage, policy: Policy, rows: Trajectories) -> Tensor:
    """-dL/d logits on these rows, at the old policy."""
    objective = Objective((policy,))
    rows = fill(Models(process), rows, {Read("policy", "log_prob"), *objective.reads}, tokens=None)
    counts = count(rows, process.horizon)
    targets = objective.plan(Batch(rows, counts, process.score(rows).detach()))
    return -gradient_of(process, objective.loss(Batch(rows, counts, process.score(rows)), targets).value)


def expected_ascent(process: TabularLanguage, policy: Policy, planner: Planner, **settings: Any) -> Tensor:
    """Its expectation over every outcome of a rollout."""
    return expectation(lambda rng: ascent(process, policy, drawn(process, planner, rng, **settings)))


def exact(process: TabularLanguage, reward: Callable[[tuple[int, ...]], float] = earned) -> Tensor:
    """The policy gradient of a reward of the string."""
    return gradient_of(process, process.expectation(reward))


@register
def greedy_baseline_gradient(card: Provable) -> float:
    """Each sample's credit is its reward less that of the likeliest string, step by step; the gradient is exact."""
    process, recipe = small(), card.recipe()
    planner = dataclasses.replace(recipe.planner, prompts=1, size=2)  # type: ignore[type-var]
    policy = policy_of(card)
    rows = drawn(process, planner, Rng(1))
    text: list[int] = []
    while len(text) < 2 and (not text or text[-1] != 0):
        prefix = torch.tensor([[*text, 0]])
        text.append(int(process.logits[0, process._contexts(prefix)[0, len(text)]].argmax()))
    wanted = rows.reward - earned(tuple(text))
    gap = float((policy.credit_of(Batch(rows, count(rows))) - wanted).abs().max()) + float(len(rows) != 2)
    return max(gap, deviation(expected_ascent(process, policy, planner), exact(process)))


@register
def tree_gradient(card: Provable) -> float:
    """It is the policy gradient, in trees of one depth and of two, with segments of one step and of two.

    Published, before whitening, it is 1/4 and 5/8 of it by segment, for two. Strings that end early are among them.
    """
    worst = 0.0
    for segment, depth, length, variant in ((1, 2, 2, "corrected"), (2, 2, 3, "corrected"), (1, 1, 2, "corrected")):
        worst = max(worst, _tree(card, segment, depth, length, variant, (1.0, 1.0)))
    return max(worst, _tree(card, 1, 2, 2, "published", (0.25, 0.625)))


def _tree(card: Provable, segment: int, depth: int, length: int, variant: str, shares: tuple[float, float]) -> float:
    process = small(length=length)
    options = {"segment": segment, "branching": 2, "depth": depth, "variant": variant}
    planner = dataclasses.replace(card.recipe(**options).planner, prompts=1)  # type: ignore[type-var]
    policy = policy_of(card, **options)
    policy = policy if variant == "corrected" else plain(policy.credit_of.credit)  # type: ignore[attr-defined]
    share = torch.full_like(process.logits, shares[1]).detach()
    share[:, process._contexts(process.trajectories().action)[0, 0]] = shares[0]
    return deviation(expected_ascent(process, policy, planner), share * exact(process))


@register
def tree_without_branches(card: Provable) -> float:
    """Published, on rows that share no step, the credit is a reward less its prompt's mean, whitened over tokens."""
    _, batch = written_out()
    centred = column(GroupCredit("mean")(batch)).expand_as(batch.mask)
    found = policy_of(card, variant="published").credit_of(batch)
    return float((found - whiten(centred, batch.mask)).abs().max())


@register
def vine_gradient(card: Provable) -> float:
    """The expected gradient is the policy gradient over the length, for segments of one step and of two."""
    process, worst = small(), 0.0
    for segment, vines in ((1, 1), (2, 2)):
        recipe = card.recipe(segment=segment, vines=vines)
        planner = dataclasses.replace(recipe.planner, prompts=1, size=1)  # type: ignore[type-var]
        found = expected_ascent(process, policy_of(card, segment=segment, vines=vines), planner)
        worst = max(worst, deviation(found, exact(process) / process.length))
    return worst


@register
def hinted_gradient(card: Provable) -> float:
    """Without clip and baseline, with the product of ratios, it is 1 + (1 - p)^G / 2 times the policy gradient.

    Rows after a hint come when all G samples failed, and are half of the group then.
    """
    process = small(prompts=2, end=False)
    right = lambda text: float(text == (1, 0))  # noqa: E731
    rate, worst = float(process.expectation(right).detach()), 0.0
    policy = policy_of(card)
    ratio = dataclasses.replace(policy.ratio, level="sequence", mean="product")
    policy = dataclasses.replace(
        plain(GroupCredit("none")), ratio=ratio, surrogate=Plain(), reduction=Reduction("row")
    )  # a row's steps share one ratio, which counts once in their mean
    for size in (1, 2):
        planner = dataclasses.replace(card.recipe().planner, prompts=1, size=size)  # type: ignore[type-var]
        found = expected_ascent(
            process, policy, planner, judge=lambda completions: [right(text) for text in completions], hint=1
        )
        worst = max(worst, deviation(found, exact(process, right) * (1 + (1 - rate) ** size / 2)))
    return worst
