"""Oracles of policy gradients: expectations over every group of samples of a tabular model, each by its probability.

There is no sampling error in them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from stepwell.batch import Batch
from stepwell.check.oracles.expected import all_groups, even, expected_gradient, policy_gradient, uneven
from stepwell.check.oracles.provable import Provable, deviation, policy_of
from stepwell.check.oracles.registry import register
from stepwell.credit.group import GroupCredit
from stepwell.objective.policy import Policy
from stepwell.objective.preference.pairs import Pairs, sides_of
from stepwell.objective.reduction import Reduction
from stepwell.objective.surrogate import Score
from stepwell.objective.term import Objective
from stepwell.process.base import Scores
from stepwell.process.exact.table import TabularLanguage, markov
from stepwell.rng import Rng
from stepwell.trajectories import Trajectories, count, make


def standard_deviation_factor(rate: float, size: int, epsilon: float = 0.0) -> float:
    """c(p, G): what standardising binary rewards within groups multiplies the gradient of the success rate by.

    c = sum_K P(K) K (G-K) / (G^2 p (1-p) (s_K + epsilon)), s_K^2 = K (G-K) / (G (G-1)) being the sample variance of K
    successes.
    """
    total = 0.0
    for successes in range(1, size):
        weight = math.comb(size, successes) * rate**successes * (1 - rate) ** (size - successes)
        spread = successes * (size - successes)
        total += weight * spread / (math.sqrt(spread / (size * (size - 1))) + epsilon)
    return total / (size**2 * rate * (1 - rate))


@register
def exact_gradient(card: Provable) -> float:
    """The expected gradient is the policy gradient, for groups of two and three (and of one, without a baseline)."""
    process, reward = uneven()
    exact, policy = policy_gradient(process, reward), policy_of(card)
    alone = (1,) if policy.credit_of == GroupCredit("none") else ()
    return max(deviation(expected_gradient(process, policy, size, reward), exact) for size in (*alone, 2, 3))


@register
def standardised_gradient(card: Provable) -> float:
    """With binary rewards and equal lengths the expected gradient is c(p, G) / T times that of the success rate."""
    process, reward, rate = even()
    epsilon = next(p.epsilon for p in (policy_of(card).credit_of,) if isinstance(p, GroupCredit))
    exact = policy_gradient(process, reward) / process.length
    return max(
        deviation(
            expected_gradient(process, policy_of(card), size, reward),
            exact * standard_deviation_factor(rate, size, epsilon),
        )
        for size in (2, 3)
    )


@register
def length_weighted_gradient(card: Provable) -> float:
    """With leave-one-out credit the expected gradient is sum_y p(y) (R - J) / |y| d log p(y): short rows count more."""
    process, reward = uneven()
    policy = card.recipe().replace(credit_of=GroupCredit("leave-one-out")).whole
    log_probability = process.string_log_probabilities()
    probability, length = log_probability.detach().exp(), process.trajectories().length.double()
    centred = reward - (probability * reward).sum()
    exact = torch.autograd.grad((probability * centred / length * log_probability).sum(), process.logits)[0]
    return deviation(expected_gradient(process, policy, 2, reward), exact)


@register
def mean_centred_gradient(card: Provable) -> float:
    """Centring by a mean that includes the row itself multiplies the policy gradient by 1 - 1/G; here also by 1/L."""
    process, reward = uneven()
    exact = policy_gradient(process, reward) / process.length
    return max(
        deviation(expected_gradient(process, policy_of(card), size, reward), exact * (1 - 1 / size)) for size in (2, 3)
    )


@register
def refilled_gradient(card: Provable) -> float:
    """Given that the planner keeps a group, the leave-one-out gradient is 1 / (1 - p^G - (1-p)^G) times the exact."""
    process, reward, rate = even()
    size, planner = 3, card.recipe().planner
    planner.prompts, planner.size = 1, size  # type: ignore[attr-defined]
    rows, probability = all_groups(process, size, reward)
    kept = torch.zeros(len(rows), dtype=torch.float64)
    for group in rows.prompt.unique():
        members = rows.prompt == group
        done = planner.plan(0, rows[members], _Nothing()) == []  # type: ignore[arg-type]
        kept[members] = float(done and len(planner.keep(rows[members])) == size)
    share = float((probability * kept).sum()) / size
    leave_one_out = Policy(GroupCredit("leave-one-out"), surrogate=Score(), reduction=Reduction("row-sum"))
    found = expected_gradient(process, leave_one_out, size, reward) / share
    return deviation(found, policy_gradient(process, reward) / (1 - rate**size - (1 - rate) ** size))


class _Nothing:
    """A stream that gives a planner the same prompt again and again."""

    def take(self, count: int, weights: Tensor | None = None) -> list[Any]:
        from stepwell.sampling.request import Prompt

        return [Prompt(0, 0)] * count


@register
def overlong_schedule(card: Provable) -> float:
    """The length penalty is equation 13 of DAPO at every length."""
    length = torch.arange(1, 13)
    mask = torch.arange(12) < length[:, None]
    rows = make(mask.long(), torch.zeros(mask.shape).double(), mask, reward=torch.zeros(len(length)).double())
    credit = policy_of(card, buffer=0.4).credit_of
    assert isinstance(credit, GroupCredit)
    found = credit.reward(Batch(rows, count(rows, 10)))
    expected = torch.tensor([0.0] * 6 + [-0.25, -0.5, -0.75, -1.0, -1.0, -1.0], dtype=torch.float64)
    return float((found - expected).abs().max())


@register
def first_update_of_grpo(card: Provable) -> float:
    """While the policy is the old one, the expected gradient is that of grpo's parts."""
    process, reward = uneven()
    grpo = Policy(GroupCredit("mean", "std"), reduction=Reduction("row"))
    found, expected = (expected_gradient(process, policy, 2, reward) for policy in (policy_of(card), grpo))
    return deviation(found, expected)


@register
def one_token_is_ppo(card: Provable) -> float:
    """On strings of one symbol the sequence ratio is the token ratio, also far from the old policy."""
    process, old = (markov(symbols=4, length=1, seed=seed) for seed in (1, 2))
    reward = Rng(3).normal(4, dtype=torch.float64)
    grpo = Policy(GroupCredit("mean", "std"), reduction=Reduction("row"))
    rows, _ = all_groups(process, 2, reward, old)
    gradients = [_gradient_of(process, policy, rows) for policy in (policy_of(card, low=0.2, high=0.2), grpo)]
    return deviation(*gradients)


def _gradient_of(process: TabularLanguage, policy: Policy, rows: Trajectories) -> Tensor:
    """d loss / d logits where the old policy is the behaviour."""
    rows = rows.replace(old_log_prob=rows.log_prob)
    counts, objective = count(rows, process.horizon), Objective((policy,))
    loss = objective.loss(Batch(rows, counts, process.score(rows)), objective.plan(Batch(rows, counts)))
    return torch.autograd.grad(loss.value, process.logits)[0]


@register
def gradient_multiplier(card: Provable) -> float:
    """d loss / d log pi = -min(r, maximum) A for both signs of A: no step loses its gradient."""
    ratio = torch.tensor([0.2, 0.7, 1.0, 1.4, 3.0, 6.0], dtype=torch.float64)
    process = markov(symbols=2, length=1)
    rows = process.trajectories()[torch.zeros(len(ratio), dtype=torch.long)]
    worst = 0.0
    for sign in (1.0, -1.0):
        log_prob = (rows.log_prob + ratio.log()[:, None]).requires_grad_()
        batch = Batch(rows, count(rows), Scores(log_prob))
        policy = policy_of(card)
        loss = policy.surrogate(policy.ratio(batch), torch.full_like(log_prob, sign), batch)
        found = -torch.autograd.grad(loss.sum(), log_prob)[0][:, 0] / sign
        worst = max(worst, float((found - ratio.clamp(max=5.0)).abs().max()))
    return worst


@register
def exact_critic_gradient(card: Provable) -> float:
    """With the true value function, generalised advantages give the policy gradient for every lambda."""
    process, reward = uneven()
    rows, probability = process.trajectories(), process.string_probabilities().detach()
    contexts = process._contexts(rows.action)
    weight, mass = (torch.zeros(process.contexts, dtype=torch.float64) for _ in range(2))
    for step in range(process.length):
        here = rows.mask[:, step]
        weight.index_add_(0, contexts[here, step], (probability * reward)[here])
        mass.index_add_(0, contexts[here, step], probability[here])
    value = (weight / mass.clamp(min=1e-300))[contexts] * rows.mask
    exact = policy_gradient(process, reward)
    worst = 0.0
    for lam in (0.0, 0.5, 1.0):
        policy = policy_of(card, lam=lam)
        plain = Policy(policy.credit_of.credit, policy.ratio, policy.surrogate, reduction=Reduction("row-sum"))  # type: ignore[attr-defined]
        found = expected_gradient(process, plain, 1, reward, fields={"value": value})
        worst = max(worst, deviation(found, exact))
    return worst


@register
def best_of_group_gradient(card: Provable) -> float:
    """The expected gradient is that of the log-likelihood under the distribution of the best of G."""
    process, reward = uneven()
    log_probability = process.string_log_probabilities()
    probability, worst = log_probability.detach().exp(), 0.0
    at_most = (probability * (reward <= reward[:, None])).sum(1)
    below = at_most - probability
    for size in (2, 3):
        best = at_most**size - below**size
        exact = torch.autograd.grad((best * log_probability).sum(), process.logits, retain_graph=True)[0]
        found = expected_gradient(process, policy_of(card, skip_equal=False), size, reward)
        worst = max(worst, deviation(found, exact))
    return worst


@register
def preference_fixed_point(card: Provable) -> float:
    """With Bradley-Terry labels the loss is flat at reference exp(R / beta) / Z, for any distribution of the pairs."""
    reference, reward = uneven()
    term = card.recipe(beta=0.7).whole.terms[0]
    assert isinstance(term, Pairs)
    by_string = dict(zip(reference.strings(), reward.tolist(), strict=True))
    policy = reference.tilted(lambda text: by_string[text] / 0.7)
    rows = reference.trajectories().replace(reference_log_prob=reference.trajectories().log_prob)
    batch = Batch(rows, count(rows), policy.score(rows))
    share = Rng(5).uniform(len(reward), dtype=torch.float64)
    chosen, rejected = (index.reshape(-1) for index in torch.meshgrid(*[torch.arange(len(reward))] * 2, indexing="ij"))
    weight = share[chosen] * share[rejected] * torch.sigmoid(reward[chosen] - reward[rejected])
    loss = (weight * term.link(*sides_of(term.score, batch, chosen, rejected))).sum() / weight.sum()
    return float(torch.autograd.grad(loss, policy.logits)[0].norm())
