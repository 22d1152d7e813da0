"""Oracles of preference, balance and distillation methods: losses by hand, and the points they come to rest at."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stepwell.batch import Batch
from stepwell.check.oracles.expected import all_groups, expected_gradient
from stepwell.check.oracles.preference import by_hand as hand
from stepwell.check.oracles.preference.claims import models, only
from stepwell.check.oracles.preference.losses import LOSSES, WAYS
from stepwell.check.oracles.provable import Provable, deviation, known
from stepwell.check.oracles.registry import register
from stepwell.objective.term import Objective, Term
from stepwell.process.base import Scores
from stepwell.process.exact.table import TabularLanguage, markov
from stepwell.rng import Rng
from stepwell.trajectories import Trajectories, count


@register
def loss_by_hand(card: Provable) -> float:
    """The loss and its slope in every log-probability are those of the formula in plain numbers."""
    return max(_by_hand(card, options) for options in ({}, *WAYS.get(card.id, [])))


def _by_hand(card: Provable, options: hand.Options) -> float:
    objective, (rows, scores) = card.recipe(**options).whole, hand.some_rows()
    rows = objective.draw(rows, None, Rng(3))  # type: ignore[arg-type]
    leaf = scores["log_prob"].clone().requires_grad_()
    present, counts = Scores(leaf, scores), count(rows)
    targets = objective.plan(Batch(rows, counts, present.detach()))
    loss = objective.loss(Batch(rows, counts, present), targets).value
    found = torch.autograd.grad(loss, leaf)[0] * rows.mask
    view, settings = hand.numbers(rows, scores), {**card.options, **options}
    value, slope = hand.slopes(lambda v: LOSSES[card.id](v, settings), view)
    # a surrogate of a score function has a value that is no objective, and is compared all the same
    return max(deviation(found, torch.as_tensor(slope)), abs(float(loss.detach()) - value) / max(abs(value), 1.0))


# distributions that a method comes to rest at, on processes that are enumerated


def tilted(process: TabularLanguage, potential: Tensor) -> TabularLanguage:
    """The distribution p(y) exp(potential(y)) / Z."""
    by_string = dict(zip(process.strings(), potential.tolist(), strict=True))
    return process.tilted(lambda text: by_string[text])


def arbitrary(seed: int = 3, number: int = 24, groups: int = 6) -> Trajectories:
    """Arbitrary strings in arbitrary groups, with made-up log-probabilities of the sampler."""
    _, reference, reward = models()
    chosen = (Rng(seed).uniform(number) * len(reward)).long()
    rows = reference.trajectories()[chosen]
    drawn = Rng(seed + 1).normal(*rows.mask.shape, dtype=torch.float64) * rows.mask
    return rows.replace(
        prompt=torch.arange(number) % groups,
        reward=reward[chosen],
        reference_log_prob=rows.log_prob,
        log_prob=drawn,
        old_log_prob=drawn,
    )


def slope_on(process: TabularLanguage, term: Term | Objective, rows: Trajectories, **states: float) -> Tensor:
    """The gradient of an objective on these rows in all parameters that it depends on."""
    objective = term if isinstance(term, Objective) else Objective((term,))
    counts, parameters = count(rows, process.horizon), [p for p in process.module.parameters() if p.requires_grad]
    with torch.no_grad():
        scored = process.score(rows, objective.needs)
    targets = objective.plan(Batch(rows, counts, scored, states))
    loss = objective.loss(Batch(rows, counts, process.score(rows, objective.needs), states), targets).value
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return torch.cat([g.reshape(-1) for g in found if g is not None])


def relative_slope(term: Term, target: TabularLanguage, other: TabularLanguage, **states: float) -> float:
    """|slope| at the target over |slope| at another model, on two sets of arbitrary samples."""
    worst = 0.0
    for seed in (3, 4):
        rows = arbitrary(seed)
        worst = max(worst, float(slope_on(target, term, rows, **states).norm() / slope_on(other, term, rows).norm()))
    return worst


@register
def tilted_minimum(card: Provable) -> float:
    """The loss is flat at ref exp(R / beta) / Z for any samples; a learned log Z is its normaliser."""
    process, reference, reward = models()
    log_partition = float((reference.string_log_probabilities().detach() + reward / 0.7).logsumexp(0))
    states = {"log_partition": log_partition}
    return relative_slope(only(card, beta=0.7), tilted(reference, reward / 0.7), process, **states)


@register
def win_rate_minimum(card: Provable) -> float:
    """On a group of all strings the loss is flat at ref exp(r / beta) / Z, r the rates of winning within the group."""
    process, reference, reward = models()
    term = only(card, beta=0.7)
    rows = reference.trajectories()
    rows = rows.replace(reward=reward, prompt=torch.zeros(len(rows)).long(), reference_log_prob=rows.log_prob)
    by_pairs = [
        sum(1 / (1 + math.exp(float(b - a))) for k, b in enumerate(reward) if k != i) / (len(reward) - 1)
        for i, a in enumerate(reward)
    ]
    target = tilted(reference, torch.tensor(by_pairs, dtype=torch.float64) / 0.7)
    return float(slope_on(target, term, rows).norm() / slope_on(process, term, rows).norm())


@register
def regularised_gradient(card: Provable) -> float:
    """On policy the expected gradient is -2 beta times that of E R - beta KL(pi || ref), for groups of 2 and 3."""
    process, reference, reward = models()
    log_probability = process.string_log_probabilities()
    gap = log_probability - reference.string_log_probabilities().detach()
    value = (log_probability.exp() * (reward - 0.7 * gap)).sum()
    exact = -2 * 0.7 * torch.autograd.grad(value, process.logits)[0]
    fields = {"reference_log_prob": reference.trajectories().log_prob}
    return max(
        deviation(-expected_gradient(process, only(card, beta=0.7), size, reward, fields=fields), exact)
        for size in (2, 3)
    )


@register
def posterior_gradient(card: Provable) -> float:
    """The gradient is -sum_i (a_i - b_i) d log pi(y_i), with both distributions normalised over the group by hand."""
    process, _, _ = models()
    term, rows = only(card, beta=0.7), arbitrary()
    present = process.score(rows).log_prob.sum(1)
    assert rows.reward is not None
    assert rows.reference_log_prob is not None
    proposal, goal = rows.log_prob.sum(1), rows.reference_log_prob.sum(1) + rows.reward / 0.7
    total = torch.zeros((), dtype=torch.float64)
    for group in (rows.prompt == key for key in rows.prompt.unique()):
        a, b = ((x - proposal)[group].exp() for x in (goal, present.detach()))
        total = total - ((a / a.sum() - b / b.sum()) * present[group]).sum() / len(rows.prompt.unique())
    return deviation(slope_on(process, term, rows), torch.autograd.grad(total, process.logits)[0].reshape(-1))


@register
def flow_minimum(card: Provable) -> float:
    """The loss is flat at ref exp(R / beta) / Z with its exact flows, for any samples."""
    process, reference, reward = models()
    log_reward, target = reward / 0.7, tilted(reference, reward / 0.7)
    rows, probability = target.trajectories(), reference.string_probabilities().detach()
    contexts, flow = target._contexts(rows.action), torch.zeros(target.contexts, dtype=torch.float64)
    mass = torch.zeros_like(flow)
    for step in range(target.length):  # F(s) = the mean of exp(R / beta) over what the reference makes of s
        here = rows.mask[:, step]
        flow.index_add_(0, contexts[here, step], (probability * log_reward.exp())[here])
        mass.index_add_(0, contexts[here, step], probability[here])
    table = (flow / mass.clamp(min=1e-300)).clamp(min=1e-300).log()[None]
    for model in (target, process):
        model.module.get_parameter("value").data.copy_(table)
    target, process = target.with_value_head(), process.with_value_head()
    return relative_slope(only(card, beta=0.7), target, process)


@register
def mirror_minimum(card: Provable) -> float:
    """On one choice the expected loss of a batch of the old policy is flat at old exp(step R) / Z, and nowhere near."""
    old = markov(symbols=5, length=1, seed=4)
    reward = Rng(5).normal(5, dtype=torch.float64)

    def steepness(policy: TabularLanguage) -> float:
        rows, probability = all_groups(policy, 2, reward, old)
        rows = rows.replace(old_log_prob=rows.log_prob)
        objective, counts = card.recipe(**known(card, {"step": 1.3})).whole, count(rows, 1)
        leaf = policy.score(rows).log_prob.detach().requires_grad_()
        targets = objective.plan(Batch(rows, counts, Scores(leaf.detach())))
        slope = torch.autograd.grad(objective.loss(Batch(rows, counts, Scores(leaf)), targets).value, leaf)[0]
        total = (slope * probability[:, None] * policy.score(rows).log_prob).sum()
        return float(torch.autograd.grad(total, policy.logits)[0].norm())

    by_string = dict(zip(old.strings(), (1.3 * reward).tolist(), strict=True))
    return steepness(old.tilted(lambda text: by_string[text])) / steepness(old)
