"""Oracles of credit that goes by how sure the policy was: its definition over lists, its limits, and why it is so."""

from __future__ import annotations

import dataclasses
import math
import statistics
from typing import Any

import torch
from torch import Tensor

from stepwell.batch import Batch, Read
from stepwell.check.oracles.credit.gradients import gradient_of, members, standardised
from stepwell.check.oracles.expected import expected_gradient, uneven
from stepwell.check.oracles.provable import Provable, deviation, policy_of
from stepwell.check.oracles.registry import register
from stepwell.credit.group import GroupCredit
from stepwell.objective.policy import Policy
from stepwell.objective.reduction import Reduction
from stepwell.objective.term import Objective
from stepwell.parts import Constant, Part
from stepwell.process.base import Scores
from stepwell.process.exact.table import markov
from stepwell.process.models import Models
from stepwell.rng import Rng
from stepwell.training.scoring import fill
from stepwell.trajectories import count, make

GRPO = Policy(GroupCredit("mean", "std"), reduction=Reduction("row"))
"""The method whose credit is modulated."""


def conversations() -> Batch:
    """Rows of three prompts with turns of uneven numbers, at the old policy.

    Tokens in between are not trained, and have entropies that nobody may read; one turn has no other tokens, and the
    last row has no other turns.
    """
    process, rng = markov(symbols=4, length=7, order=2, end=False, seed=11), Rng(12)
    prompt = torch.tensor([0, 1, 0, 2, 1, 0, 2, 1])
    action = (4 * rng.uniform(len(prompt), 7)).long()
    mask = rng.uniform(len(prompt), 7) < 0.8
    numbers = torch.tensor([[0, 0, 2, 2, 2, 5, 5], [1, 1, 1, 1, 4, 4, 9], [0, 3, 3, 3, 6, 6, 6]])
    segment = numbers[torch.arange(len(prompt)) % 3]
    mask[0] = mask[0] & (segment[0] != 2)
    mask[-1] = False
    rows = make(action, torch.zeros(mask.shape, dtype=torch.float64), mask, prompt=prompt, segment=segment)
    rows = rows.replace(
        condition=process.condition([0] * len(prompt)), reward=rng.normal(len(prompt), dtype=torch.float64)
    )
    rows = fill(Models(process), rows, {Read("policy", "entropy"), Read("policy", "log_prob")}, tokens=None)
    old, entropy = rows.old_log_prob, rows.entropy
    assert old is not None
    assert entropy is not None
    return Batch(rows.replace(log_prob=old, entropy=torch.where(mask, entropy, 9.0)), count(rows), Scores(old))


def ascent_on(policy: Policy, batch: Batch) -> Tensor:
    """(N, T) -dL/d log pi."""
    objective, leaf = Objective((policy,)), batch.log_prob.clone().requires_grad_()
    loss = objective.loss(dataclasses.replace(batch, scores=Scores(leaf)), objective.plan(batch)).value
    return -torch.autograd.grad(loss, leaf)[0]


def turns_of(batch: Batch) -> list[tuple[int, list[int]]]:
    """The row and the trained steps of every turn that has some, in order."""
    segment, mask = batch.field("segment").tolist(), batch.rows.mask.tolist()
    found = []
    for row in range(len(mask)):
        trained = [step for step, here in enumerate(mask[row]) if here]
        for number in sorted({segment[row][step] for step in trained}):
            found.append((row, [step for step in trained if segment[row][step] == number]))
    return found


def uncertainty(batch: Batch) -> list[float]:
    """The mean entropy of every turn's steps."""
    entropy = batch.field("entropy").tolist()
    return [statistics.fmean(entropy[row][step] for step in steps) for row, steps in turns_of(batch)]


def of_ones(card: Provable, **options: float) -> Part:
    """The method's modulation, without a bonus, of a credit of 1 for all rows."""
    part: Any = policy_of(card, zeta=0.0, **options).credit_of
    return dataclasses.replace(part, credit=Constant())


@register
def entropy_by_hand(card: Provable) -> float:
    """-dL/d log pi = (A g(H_k) + zeta f(H_k+1) - their mean over turns) / the row's steps / rows, over lists."""
    batch, worst = conversations(), 0.0
    turns, hidden = turns_of(batch), uncertainty(batch)
    low, high = min(hidden), max(hidden)
    share = [(value - low) / (high - low + 1e-8) for value in hidden]
    credit: dict[int, float] = {}
    for group in members(batch):
        rewards = [float(batch.reward[row]) for row in group]
        credit |= dict(zip(group, standardised(rewards, 1e-4), strict=True))
    for options in ({}, {"k": 0.7, "k_future": 2.0, "zeta": 0.4}):
        settings = {**card.options, **options}
        gain = [math.exp(-settings["k"] * value) for value in share]
        values = []
        for place, (row, _) in enumerate(turns):
            bonus = place + 1 < len(turns) and turns[place + 1][0] == row
            future = math.exp(-settings["k_future"] * share[place + 1]) if bonus else 0.0
            values.append(credit[row] * gain[place] / statistics.fmean(gain) + settings["zeta"] * future)
        wanted = torch.zeros_like(batch.mask)
        for (row, steps), value in zip(turns, values, strict=True):
            own = sum(len(other) for number, other in turns if number == row)
            wanted[row, steps] = (value - statistics.fmean(values)) / (own * len(batch))
        worst = max(worst, deviation(ascent_on(policy_of(card, **options), batch), wanted))
    return worst


@register
def gains_average_to_one(card: Provable) -> float:
    """A credit of 1 for all, without a bonus, becomes g - 1: the surest turn has exp(k h) times the least sure's g.

    Were the mean of g another than 1, the ratio of the two would be another; h is the range over itself plus 1e-8.
    """
    batch, worst = conversations(), 0.0
    hidden = uncertainty(batch)
    span = max(hidden) - min(hidden)
    for k in (0.5, 1.0, 3.0):
        gain = 1 + of_ones(card, k=k)(batch)[batch.rows.mask]
        worst = max(worst, abs(float(gain.max() / gain.min()) / math.exp(k * span / (span + 1e-8)) - 1))
    return worst


@register
def unmodulated_is_grpo(card: Provable) -> float:
    """At k = zeta = 0 the credit is grpo's less its mean over turns; with one turn a row it is grpo's."""
    batch, policy = conversations(), policy_of(card, k=0.0, zeta=0.0)
    plain = GRPO.credit_of(batch).tolist()
    mean = statistics.fmean(plain[row] for row, _ in turns_of(batch))
    share = batch.mask / (batch.steps * len(batch))
    found = deviation(ascent_on(policy, batch), ascent_on(GRPO, batch) - mean * share)
    process, reward = uneven()
    one = torch.zeros(len(reward), process.length, dtype=torch.long)
    pair = [expected_gradient(process, each, 2, reward, fields={"segment": one}) for each in (policy, GRPO)]
    return max(found, deviation(*pair))


@register
def larger_scores_are_damped(card: Provable) -> float:
    """E |d log pi / d logits|^2 = 1 - sum_v pi_v^2 in every state; the larger it is, the smaller is the gain.

    With two symbols the sum of squares rises as the entropy falls, and every step is a turn by itself.
    """
    process = markov(symbols=2, length=3, order=None, end=False, seed=4)
    rows = process.trajectories()
    steps = torch.arange(process.length).expand_as(rows.mask).contiguous()
    rows = fill(Models(process), rows.replace(segment=steps), {Read("policy", "entropy")}, tokens=None)
    scores, contexts = process.score(rows, {"sum_of_squares"}), process._contexts(rows.action)
    sizes: dict[int, dict[int, float]] = {}
    for row, step in rows.mask.nonzero().tolist():
        log_prob = scores.log_prob[row, step]
        size = float(log_prob.detach().exp() * gradient_of(process, log_prob).square().sum())
        sizes.setdefault(int(contexts[row, step]), {})[int(rows.action[row, step])] = size
    expected = torch.tensor([[sum(sizes[int(c)].values()) for c in line] for line in contexts], dtype=torch.float64)
    gap = float((expected - (1 - scores["sum_of_squares"].detach())).abs().max())
    gain = of_ones(card)(Batch(rows, count(rows)))
    order = expected.flatten().argsort()
    rising = gain.flatten()[order].diff().clamp(min=0).max()  # states that several rows share are equal to rounding
    return max(gap, float(rising))
