"""Oracles of methods that read single reward functions: strata, answers that agree, and constraints with a price."""

from __future__ import annotations

import dataclasses
import math
import statistics

import torch

from stepwell.check.oracles.credit.gradients import members, standardised, written_out
from stepwell.check.oracles.expected import expected_gradient, uneven
from stepwell.check.oracles.provable import Provable, policy_of
from stepwell.check.oracles.registry import register
from stepwell.objective.state import Multiplier
from stepwell.process.base import Scores
from stepwell.rng import Rng


@register
def stratified_by_hand(card: Provable) -> float:
    """alpha times a row's standing in its stratum plus 1 - alpha times that in its group."""
    _, batch = written_out()
    reward, worst = batch.reward.tolist(), 0.0
    lengths = [int(math.log2(length)) for length in batch.rows.length.tolist()]
    for column, strata in ((0, lengths), (2, batch.field("rewards")[:, 2].tolist())):
        found = policy_of(card, alpha=0.3, column=column).credit_of(batch)
        for group in members(batch):
            whole = dict(zip(group, standardised([reward[row] for row in group], 1e-6), strict=True))
            for stratum in {strata[row] for row in group}:
                alike = [row for row in group if strata[row] == stratum]
                for row, own in zip(alike, standardised([reward[r] for r in alike], 1e-6), strict=True):
                    worst = max(worst, abs(float(found[row]) - 0.3 * own - 0.7 * whole[row]))
    return worst


@register
def strata_hide_choices(card: Provable) -> float:
    """At alpha = 1 a reward that only the stratum decides has no gradient; any other alpha has some."""
    process, _ = uneven()
    reward = torch.tensor([float(len(text) > 1) for text in process.strings()], dtype=torch.float64)
    apart, blend = (expected_gradient(process, policy_of(card, alpha=a), 3, reward) for a in (1.0, 0.5))
    return float(apart.norm() / blend.norm())


@register
def agreement_by_hand(card: Provable) -> float:
    """-dL/d log pi = (w A_local + (1 - w) A_prompts) / tokens, w by the entropy of the answers in bits."""
    _, batch = written_out()
    reward, answer = batch.reward.tolist(), batch.field("rewards")[:, 2].tolist()
    groups = members(batch)
    means = standardised([statistics.fmean([reward[row] for row in group]) for group in groups], 1e-6)
    objective = card.recipe(column=2, slope=2.0, centre=0.8).whole
    leaf = Scores(batch.log_prob.clone().requires_grad_())
    loss = objective.loss(dataclasses.replace(batch, scores=leaf), objective.plan(batch)).value
    found, worst = -torch.autograd.grad(loss, leaf.log_prob)[0], 0.0
    for group, across in zip(groups, means, strict=True):
        kinds = [answer[row] for row in group]
        shares = [kinds.count(kind) / len(kinds) for kind in set(kinds)]
        weight = 1 / (1 + math.exp(-2.0 * (-sum(s * math.log2(s) for s in shares) - 0.8)))
        own = standardised([reward[row] for row in group], 1e-4)
        weight = weight if len({reward[row] for row in group}) > 1 else 0.0
        for row, local in zip(group, own, strict=True):
            wanted = (weight * local + (1 - weight) * across) / batch.counts.steps
            gaps = (found[row][batch.rows.mask[row]] - wanted).abs()
            worst = max(worst, float(gaps.max()))
    return worst


@register
def priced_credit(card: Provable) -> float:
    """A is a row's standing in its group by the first reward, plus the price times that by the second."""
    _, batch = written_out()
    found = policy_of(card).credit_of(dataclasses.replace(batch, states={"price": 0.7}))
    columns, worst = batch.field("rewards").tolist(), 0.0
    for group in members(batch):
        each = [standardised([columns[row][number] for row in group], 1e-4) for number in (0, 1)]
        for place, row in enumerate(group):
            worst = max(worst, abs(float(found[row]) - each[0][place] - 0.7 * each[1][place]))
    return worst


@register
def price_finds_the_optimum(card: Provable) -> float:
    """On policies ref exp((R_0 + mu R_1) / tau) the price goes to the constrained optimum's multiplier, or to 0.

    That multiplier is found by bisection: J_1 is increasing in it.
    """
    rng = Rng(6)
    first, second, reference = (rng.normal(5, dtype=torch.float64) for _ in range(3))

    def achieved(price: float) -> float:
        return float(((reference + (first + price * second) / 0.5).softmax(0) * second).sum())

    worst = 0.0
    for threshold in (achieved(0.0) + 0.3, achieved(0.0) - 0.1):
        state = card.recipe(threshold=threshold, rate=0.5).whole.states["price"]
        assert isinstance(state, Multiplier)
        price, low, high = 1.0, 0.0, 10.0
        for _ in range(400):
            price = state.update(price, {"constraint": achieved(price)})
            middle = (low + high) / 2
            low, high = (middle, high) if achieved(middle) < threshold else (low, middle)
        worst = max(worst, abs(price - low))
    return worst
