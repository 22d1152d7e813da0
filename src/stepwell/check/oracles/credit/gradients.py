"""Oracles of methods that differ in their credit: enumerated expectations, and definitions written out over lists."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence

import torch
from torch import Tensor

from stepwell.batch import Batch, Read
from stepwell.check.oracles.expected import even, expected_gradient, uneven
from stepwell.check.oracles.provable import Provable, deviation, policy_of, variants
from stepwell.check.oracles.registry import register
from stepwell.credit.baseline import LengthBaseline, TokenBaseline
from stepwell.objective.policy import Policy
from stepwell.objective.reduction import Reduction
from stepwell.objective.surrogate import Score
from stepwell.objective.term import Objective
from stepwell.parts import Part
from stepwell.process.exact.table import TabularLanguage, markov
from stepwell.process.models import Models
from stepwell.rng import Rng
from stepwell.training.scoring import fill
from stepwell.trajectories import count


def plain(credit: Part) -> Policy:
    """The score function with a credit, summed over steps and averaged over rows."""
    return Policy(credit, surrogate=Score(), reduction=Reduction("row-sum"))


def gradient_of(process: TabularLanguage, value: Tensor) -> Tensor:
    """The gradient of a number in the logits."""
    return torch.autograd.grad(value, process.logits, retain_graph=True)[0]


def written_out() -> tuple[TabularLanguage, Batch]:
    """A batch of five prompts with two to four rows of one to three steps: what definitions are written out on.

    One prompt's rewards are all equal; rewards have three columns, the last of which names one of three answers.
    """
    process = markov(symbols=3, length=3, order=None, seed=1)
    sizes, rng = (3, 2, 4, 3, 2), Rng(21)
    ids = rng.permutation(len(process.strings()))[: sum(sizes)]
    rows = process.trajectories()[ids]
    prompt = torch.tensor([number for number, size in enumerate(sizes) for _ in range(size)])
    reward = rng.normal(len(ids), dtype=torch.float64)
    reward[prompt == 1] = 0.5
    answers = rng.permutation(len(ids)) % 3
    columns = torch.stack([reward, rng.normal(len(ids), dtype=torch.float64), answers.double()], 1)
    node = torch.arange(rows.mask.numel()).reshape(rows.mask.shape).masked_fill(~rows.mask, -1)
    rows = rows.replace(prompt=prompt, reward=reward, rewards=columns, node=node)
    rows = fill(Models(process), rows, {Read("policy", "log_prob"), Read("policy", "sum_of_squares")}, tokens=None)
    return process, Batch(rows, count(rows, process.horizon), process.score(rows, {"entropy"}).detach())


def members(batch: Batch) -> list[list[int]]:
    """The rows of each prompt."""
    prompts = batch.rows.prompt.tolist()
    return [[row for row, other in enumerate(prompts) if other == prompt] for prompt in dict.fromkeys(prompts)]


def standardised(values: Sequence[float], epsilon: float) -> list[float]:
    """(x - mean) / (sample deviation + epsilon); 0 for one alone."""
    if len(values) == 1:
        return [0.0]
    mean, spread = statistics.fmean(values), statistics.stdev(values)
    return [(value - mean) / (spread + epsilon) for value in values]


@register
def unbiased_gradient(card: Provable) -> float:
    """The expected gradient is the policy gradient, for groups of two and three."""
    process, reward = uneven()
    exact = gradient_of(process, (process.string_probabilities() * reward).sum())
    return max(deviation(expected_gradient(process, policy_of(card), size, reward), exact) for size in (2, 3))


@register
def length_baseline_by_hand(card: Provable) -> float:
    """Each row's baseline is the mean of the rewards, by length, of its group, or of the others where that mends."""
    _, batch = written_out()
    reward, length = batch.reward.tolist(), batch.rows.length.tolist()
    worst = 0.0
    for options in variants(card):
        found = policy_of(card, **options).credit_of(batch)
        for group in members(batch):
            for row in group:
                others = [r for r in group if r != row or options["variant"] == "published"]
                mean = sum(length[r] * reward[r] for r in others) / sum(length[r] for r in others)
                worst = max(worst, abs(float(found[row]) - (reward[row] - mean)))
        assert isinstance(policy_of(card, **options).credit_of, LengthBaseline)
    return worst


@register
def least_variance_by_token(card: Provable) -> float:
    """B_t minimises sum_j |d log pi(first t steps of j)|^2 (G_jt - B)^2, the gradient taken by autograd."""
    process, batch = written_out()
    rows, reward = batch.rows, batch.reward.tolist()
    log_prob = process.score(rows).log_prob
    norms = torch.zeros_like(log_prob).detach()
    for row, step in rows.mask.nonzero().tolist():
        norms[row, step] = gradient_of(process, log_prob[row, : step + 1].sum()).square().sum()
    worst = 0.0
    for options in variants(card):
        credit = policy_of(card, **options).credit_of
        assert isinstance(credit, TokenBaseline)
        found = credit(batch)
        for group in members(batch):
            for row, step in itertools.product(group, range(rows.mask.shape[1])):
                alive = [r for r in group if rows.mask[r, step] and (r != row or options["variant"] == "published")]
                mass = sum(float(norms[r, step]) for r in alive)
                mean = sum(float(norms[r, step]) * reward[r] for r in alive) / (mass + 1e-8)
                wanted = reward[row] - mean if rows.mask[row, step] else 0.0
                worst = max(worst, abs(float(found[row, step]) - wanted))
    return worst


@register
def penalised_sequence_gradient(card: Provable) -> float:
    """Before whitening the expected gradient is that of E R - kl KL(pi || ref) of whole strings."""
    process, reward = uneven()
    reference = markov(symbols=3, length=3, order=None, seed=9)
    credit = policy_of(card, kl=0.3).credit_of.credit  # type: ignore[attr-defined]
    with torch.no_grad():
        other = reference.score(process.trajectories()).log_prob
    found = expected_gradient(process, plain(credit), 1, reward, fields={"reference_log_prob": other})
    log_probability = process.string_log_probabilities()
    divergence = (log_probability.exp() * (log_probability - other.sum(1))).sum()
    return deviation(found, gradient_of(process, (log_probability.exp() * reward).sum() - 0.3 * divergence))


@register
def whitened_over_tokens(card: Provable) -> float:
    """A is a row's reward, less its group's mean where the method has groups, whitened over all steps of the batch."""
    _, batch = written_out()
    values = batch.reward.tolist()
    if "baseline" in card.id:
        for group in members(batch):
            mean = statistics.fmean(batch.reward[group].tolist())
            for row in group:
                values[row] -= mean
    steps = [values[row] for row, _ in batch.rows.mask.nonzero().tolist()]
    mean, variance = statistics.fmean(steps), statistics.variance(steps)
    found = policy_of(card).credit_of(batch)[batch.rows.mask]
    return max(abs(float(a) - (b - mean) / math.sqrt(variance + 1e-8)) for a, b in zip(found, steps, strict=True))


@register
def informative_gradient(card: Provable) -> float:
    """With equal lengths it is (1 - 1/G) B / M / T of the policy gradient, M of the B rows being in unequal groups."""
    process, reward, _ = even()
    exact = gradient_of(process, (process.string_probabilities() * reward).sum()) / process.length
    worst = 0.0
    for size in (2, 3):
        groups = list(itertools.product(reward.tolist(), repeat=size))
        factor = len(groups) / sum(len(set(group)) > 1 for group in groups) * (1 - 1 / size)
        worst = max(worst, deviation(expected_gradient(process, policy_of(card), size, reward), factor * exact))
    return worst


@register
def truncated_likelihood_gradient(card: Provable) -> float:
    """With binary rewards it is (1 - (1-p)^(G-1)) / p that of p: the gradient of -sum_{k<G} (1-p)^k / k, log p's."""
    process, reward, rate = even()
    exact, policy = (
        gradient_of(process, (process.string_probabilities() * reward).sum()),
        policy_of(card, epsilon=1e-14),
    )
    return max(
        deviation(expected_gradient(process, policy, size, reward), exact * (1 - (1 - rate) ** (size - 1)) / rate)
        for size in (2, 3, 4)
    )


@register
def largest_of_group_gradient(card: Provable) -> float:
    """The expected gradient is that of the expected largest reward of a group."""
    process, reward = uneven()
    probability, worst = process.string_probabilities(), 0.0
    for size in (2, 3):
        ids = torch.tensor(list(itertools.product(range(len(reward)), repeat=size)))
        largest = (probability[ids].prod(1) * reward[ids].amax(1)).sum()
        found = expected_gradient(process, policy_of(card), size, reward)
        worst = max(worst, deviation(found, gradient_of(process, largest)))
    return worst


@register
def self_play_gradient(card: Provable) -> float:
    """The expected gradient is that of P(y beats y'), y' drawn from the policy held fixed."""
    process, reward = uneven()
    probability, worst = process.string_probabilities(), 0.0
    for temperature, size in itertools.product((0.0, 0.7), (2, 3)):
        gap = reward[:, None] - reward
        wins = torch.sigmoid(gap / temperature) if temperature else (gap > 0).double() + 0.5 * (gap == 0)
        exact = gradient_of(process, (probability[:, None] * probability.detach() * wins).sum())
        found = expected_gradient(process, policy_of(card, temperature=temperature), size, reward)
        worst = max(worst, deviation(found, exact))
    return worst


@register
def submodular_gradient(card: Provable) -> float:
    """The expected gradient is that of E[R + gain * the number of different symbols]."""
    process, reward = uneven()
    different = torch.tensor([float(len(set(text))) for text in process.strings()], dtype=torch.float64)
    exact = gradient_of(process, (process.string_probabilities() * (reward + 0.7 * different)).sum())
    return deviation(expected_gradient(process, policy_of(card, gain=0.7), 1, reward), exact)


@register
def equal_groups_change_nothing(card: Provable) -> float:
    """Groups of equal rewards, right or wrong, leave the gradient as it is, on strings of one length."""
    process, _, _ = even()
    ids = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 8, 0])
    rows = process.trajectories()[ids].replace(prompt=torch.arange(5).repeat_interleave(2))
    rows = rows.replace(reward=torch.tensor([1.0, 0, 1, 1, 0, 0, 0, 1, 1, 1], dtype=torch.float64))
    gradients = []
    for chosen in (torch.arange(10), torch.tensor([0, 1, 6, 7])):
        part, objective = rows[chosen], Objective((policy_of(card),))
        counts = count(part, process.horizon)
        loss = objective.loss(Batch(part, counts, process.score(part)), objective.plan(Batch(part, counts)))
        gradients.append(gradient_of(process, loss.value))
    return deviation(*gradients)
