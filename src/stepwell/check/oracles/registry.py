"""Exact answers that methods are held against, by name: a card's `proof` lists the ones that prove it.

Each oracle takes a card and returns the largest deviation from a closed form or an enumeration. Expectations are over
every group of samples of a tabular model, each weighted by its probability: there is no sampling error. Those of flow
methods are in `flow_oracles`, `flow_moments`, `flow_rewards` and `flow_losses`, those of ratios in `ratio_oracles`,
those of credit in the files named `credit_*`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from stepwell.check.oracles.credit import columns as credit_columns
from stepwell.check.oracles.credit import entropy as credit_entropy
from stepwell.check.oracles.credit import gradients as credit_oracles
from stepwell.check.oracles.credit import risk as credit_risk
from stepwell.check.oracles.credit import rollouts as credit_rollouts
from stepwell.check.oracles.expected import all_groups, expected_gradient, policy_gradient
from stepwell.check.oracles.flow import gradients as flow_oracles
from stepwell.check.oracles.flow import losses as flow_losses
from stepwell.check.oracles.flow import moments as flow_moments
from stepwell.check.oracles.flow import rewards as flow_rewards
from stepwell.check.oracles.flow.guide import guided_step
from stepwell.check.oracles.preference import gradients as preference_oracles
from stepwell.check.oracles.preference import steps as preference_steps
from stepwell.check.oracles.provable import Provable, deviation
from stepwell.check.oracles.ratio import gradients as ratio_oracles
from stepwell.credit.group import GroupCredit
from stepwell.errors import UnknownName
from stepwell.objective.policy import Policy
from stepwell.objective.preference.pairs import Pairs
from stepwell.objective.reduction import Reduction
from stepwell.objective.surrogate import Score
from stepwell.objective.term import Objective
from stepwell.parts import Batch
from stepwell.process.base import Scores
from stepwell.process.exact.table import TabularLanguage, markov
from stepwell.rng import Rng
from stepwell.trajectories import Trajectories, count


def standard_deviation_factor(rate: float, size: int, epsilon: float = 0.0) -> float:
    """c(p, G): what standardising binary rewards within groups multiplies the gradient of the success rate by.

    c = sum_K P(K) K (G-K) / (G^2 p (1-p) (s_K + epsilon)), s_K the sample deviation of K successes; for epsilon = 0
    it is the formula of cards_objectives.md section 1.1.
    """
    total = 0.0
    for successes in range(1, size):
        weight = math.comb(size, successes) * rate**successes * (1 - rate) ** (size - successes)
        spread = successes * (size - successes)
        total += weight * spread / (math.sqrt(spread / (size * (size - 1))) + epsilon)
    return total / (size**2 * rate * (1 - rate))


def _uneven() -> tuple[TabularLanguage, Tensor]:
    """Strings of one to three symbols with real rewards."""
    process = markov(symbols=3, length=3, order=None, seed=1)
    return process, Rng(2).normal(len(process.strings()), dtype=torch.float64)


def _even() -> tuple[TabularLanguage, Tensor, float]:
    """Strings of equal length with binary rewards, and the success rate."""
    process = markov(symbols=3, length=2, order=None, end=False, seed=3)
    reward = (Rng(4).uniform(len(process.strings())) < 0.4).double()
    return process, reward, float((process.string_probabilities().detach() * reward).sum())


def _policy(card: Provable, **options: Any) -> Policy:
    term = card.recipe(**options).whole.terms[0]
    assert isinstance(term, Policy)
    return term


def exact_gradient(card: Provable) -> float:
    """The expected gradient is the policy gradient, for groups of two and three (and of one, without a baseline)."""
    process, reward = _uneven()
    exact, policy = policy_gradient(process, reward), _policy(card)
    alone = (1,) if policy.credit_of == GroupCredit("none") else ()
    return max(deviation(expected_gradient(process, policy, size, reward), exact) for size in (*alone, 2, 3))


def standardised_gradient(card: Provable) -> float:
    """With binary rewards and equal lengths the expected gradient is c(p, G) / T times that of the success rate."""
    process, reward, rate = _even()
    epsilon = next(p.epsilon for p in (_policy(card).credit_of,) if isinstance(p, GroupCredit))
    exact = policy_gradient(process, reward) / process.length
    return max(
        deviation(
            expected_gradient(process, _policy(card), size, reward),
            exact * standard_deviation_factor(rate, size, epsilon),
        )
        for size in (2, 3)
    )


def length_weighted_gradient(card: Provable) -> float:
    """With leave-one-out credit the expected gradient is sum_y p(y) (R - J) / |y| d log p(y): short rows count more."""
    process, reward = _uneven()
    policy = card.recipe().replace(credit_of=GroupCredit("leave-one-out")).whole
    log_probability = process.string_log_probabilities()
    probability, length = log_probability.detach().exp(), process.trajectories().length.double()
    centred = reward - (probability * reward).sum()
    exact = torch.autograd.grad((probability * centred / length * log_probability).sum(), process.logits)[0]
    return deviation(expected_gradient(process, policy, 2, reward), exact)


def mean_centred_gradient(card: Provable) -> float:
    """Centring by a mean that includes the row itself multiplies the policy gradient by 1 - 1/G; here also by 1/L."""
    process, reward = _uneven()
    exact = policy_gradient(process, reward) / process.length
    return max(
        deviation(expected_gradient(process, _policy(card), size, reward), exact * (1 - 1 / size)) for size in (2, 3)
    )


def refilled_gradient(card: Provable) -> float:
    """Given that the planner keeps a group, the leave-one-out gradient is 1 / (1 - p^G - (1-p)^G) times the exact."""
    process, reward, rate = _even()
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
    """A stream that a planner may ask for prompts, and whose answer is not a finished step."""

    def take(self, count: int, weights: Tensor | None = None) -> list[Any]:
        from stepwell.sampling.request import Prompt

        return [Prompt(0, 0)] * count


def overlong_schedule(card: Provable) -> float:
    """The length penalty is equation 13 of DAPO at every length."""
    process = markov(symbols=2, length=10, order=1, end=False)
    length = torch.arange(1, 13)
    rows = process.trajectories()[: len(length)].replace(length=length, reward=torch.zeros(len(length)).double())
    credit = _policy(card, buffer=0.4).credit_of
    assert isinstance(credit, GroupCredit)
    found = credit.reward(Batch(rows, count(rows, 10)))
    expected = torch.tensor([0.0] * 6 + [-0.25, -0.5, -0.75, -1.0, -1.0, -1.0], dtype=torch.float64)
    return float((found - expected).abs().max())


def first_update_of_grpo(card: Provable) -> float:
    """While the policy is the old one, the expected gradient is that of grpo's parts."""
    process, reward = _uneven()
    grpo = Policy(GroupCredit("mean", "std"), reduction=Reduction("row"))
    found, expected = (expected_gradient(process, policy, 2, reward) for policy in (_policy(card), grpo))
    return deviation(found, expected)


def one_token_is_ppo(card: Provable) -> float:
    """On strings of one symbol the sequence ratio is the token ratio, also far from the old policy."""
    process, old = (markov(symbols=4, length=1, seed=seed) for seed in (1, 2))
    reward = Rng(3).normal(4, dtype=torch.float64)
    grpo = Policy(GroupCredit("mean", "std"), reduction=Reduction("row"))
    rows, _ = all_groups(process, 2, reward, old)
    gradients = [_gradient_of(process, policy, rows) for policy in (_policy(card, low=0.2, high=0.2), grpo)]
    return deviation(*gradients)


def _gradient_of(process: TabularLanguage, policy: Policy, rows: Trajectories) -> Tensor:
    """d loss / d logits where the old policy is the behaviour."""
    rows = rows.replace(old_log_prob=rows.log_prob)
    counts, objective = count(rows, process.horizon), Objective((policy,))
    loss = objective.loss(Batch(rows, counts, process.score(rows)), objective.plan(Batch(rows, counts)))
    return torch.autograd.grad(loss.value, process.logits)[0]


def gradient_multiplier(card: Provable) -> float:
    """d loss / d log pi = -min(r, maximum) A for both signs of A: no step loses its gradient."""
    ratio = torch.tensor([0.2, 0.7, 1.0, 1.4, 3.0, 6.0], dtype=torch.float64)
    process = markov(symbols=2, length=1)
    rows = process.trajectories()[torch.zeros(len(ratio), dtype=torch.long)]
    worst = 0.0
    for sign in (1.0, -1.0):
        log_prob = (rows.log_prob + ratio.log()[:, None]).requires_grad_()
        batch = Batch(rows, count(rows), Scores(log_prob))
        policy = _policy(card)
        loss = policy.surrogate(policy.ratio(batch), torch.full_like(log_prob, sign), batch)
        found = -torch.autograd.grad(loss.sum(), log_prob)[0][:, 0] / sign
        worst = max(worst, float((found - ratio.clamp(max=5.0)).abs().max()))
    return worst


def exact_critic_gradient(card: Provable) -> float:
    """With the true value function, generalised advantages give the policy gradient for every lambda."""
    process, reward = _uneven()
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
        policy = _policy(card, lam=lam)
        plain = Policy(policy.credit_of.credit, policy.ratio, policy.surrogate, reduction=Reduction("row-sum"))  # type: ignore[attr-defined]
        found = expected_gradient(process, plain, 1, reward, fields={"value": value})
        worst = max(worst, deviation(found, exact))
    return worst


def best_of_group_gradient(card: Provable) -> float:
    """The expected gradient is that of the log-likelihood under the law of the best of G."""
    process, reward = _uneven()
    log_probability = process.string_log_probabilities()
    probability, worst = log_probability.detach().exp(), 0.0
    at_most = (probability * (reward <= reward[:, None])).sum(1)
    below = at_most - probability
    for size in (2, 3):
        best = at_most**size - below**size
        exact = torch.autograd.grad((best * log_probability).sum(), process.logits, retain_graph=True)[0]
        found = expected_gradient(process, _policy(card, skip_equal=False), size, reward)
        worst = max(worst, deviation(found, exact))
    return worst


def preference_fixed_point(card: Provable) -> float:
    """With Bradley-Terry labels the loss is flat at reference exp(R / beta) / Z, for any law of the pairs."""
    reference, reward = _uneven()
    term = card.recipe(beta=0.7).whole.terms[0]
    assert isinstance(term, Pairs)
    by_string = dict(zip(reference.strings(), reward.tolist(), strict=True))
    policy = reference.tilted(lambda text: by_string[text] / 0.7)
    rows = reference.trajectories().replace(reference_log_prob=reference.trajectories().log_prob)
    score = term.score(Batch(rows, count(rows), policy.score(rows)))
    law = Rng(5).uniform(len(reward), dtype=torch.float64)
    chosen, rejected = (index.reshape(-1) for index in torch.meshgrid(*[torch.arange(len(reward))] * 2, indexing="ij"))
    weight = law[chosen] * law[rejected] * torch.sigmoid(reward[chosen] - reward[rejected])
    loss = (weight * term.link(score[chosen], score[rejected])).sum() / weight.sum()
    return float(torch.autograd.grad(loss, policy.logits)[0].norm())


ORACLES: dict[str, Callable[[Provable], float]] = {
    function.__name__: function
    for function in (
        exact_gradient,
        standardised_gradient,
        length_weighted_gradient,
        mean_centred_gradient,
        refilled_gradient,
        overlong_schedule,
        first_update_of_grpo,
        one_token_is_ppo,
        gradient_multiplier,
        exact_critic_gradient,
        best_of_group_gradient,
        preference_fixed_point,
        guided_step,
        flow_oracles.gaussian_gradient,
        flow_oracles.mean_ratio,
        flow_oracles.regulated_ratio,
        flow_oracles.divergence_bound,
        flow_oracles.step_divergence,
        flow_oracles.window_schedule,
        flow_moments.policy_moment_gradient,
        flow_moments.branch_gradient,
        flow_moments.path_divergence,
        flow_rewards.truncated_sum,
        flow_rewards.adjoint_gradient,
        flow_rewards.renoised_gradient,
        flow_losses.step_preference,
        flow_losses.denoising_preference,
        flow_losses.negative_aware_minimum,
        flow_losses.weighted_matching,
        *preference_oracles.ORACLES,
        *preference_steps.ORACLES,
        *ratio_oracles.ORACLES,
        *credit_oracles.ORACLES,
        *credit_columns.ORACLES,
        *credit_risk.ORACLES,
        *credit_rollouts.ORACLES,
        *credit_entropy.ORACLES,
    )
}


def oracle(name: str) -> Callable[[Provable], float]:
    """An oracle by name; an unknown one is an error that names the nearest."""
    if name not in ORACLES:
        raise UnknownName("oracle", name, ORACLES)
    return ORACLES[name]
