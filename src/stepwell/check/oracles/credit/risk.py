"""Oracles of methods that look at a whole batch: quantiles and bundles, the subsets that spread most."""

from __future__ import annotations

import dataclasses
import itertools
import math

import torch
from torch import Tensor

from stepwell.batch import Batch
from stepwell.check.oracles.credit.gradients import gradient_of, members, written_out
from stepwell.check.oracles.expected import uneven
from stepwell.check.oracles.provable import Provable, deviation, policy_of
from stepwell.check.oracles.registry import register
from stepwell.credit.group import GroupCredit
from stepwell.credit.risk import MixedRisk
from stepwell.objective.gates.selection import Influence, MostSpread
from stepwell.objective.policy import Policy
from stepwell.objective.term import Objective
from stepwell.parts import Part
from stepwell.process.exact.table import TabularLanguage, markov
from stepwell.rng import Rng
from stepwell.trajectories import count


def mean_between(probability: Tensor, reward: Tensor, low: float, high: float) -> Tensor:
    """The mean reward between two quantiles: the integral of the quantile function over (low, high), divided."""
    order = reward.argsort()
    upper = probability[order].cumsum(0)
    lower = upper - probability[order]
    share = (upper.clamp(max=high) - lower.clamp(min=low)).clamp(min=0)
    return (share * reward[order]).sum() / (high - low)


def _quarters() -> TabularLanguage:
    """Strings of three symbols out of two, whose probabilities are multiples of 1/64."""
    process = markov(symbols=2, length=3, order=None, end=False)
    share = (torch.arange(process.contexts, dtype=torch.float64) % 3 + 1) / 4
    process.logits.data.copy_(torch.stack([share, 1 - share], 1).log())
    return process


@register
def risk_gradient(card: Provable) -> float:
    """On 64 rows with exactly the policy's distribution it is the gradient of (w CVaR_a + RVaR_a^b) / (w + 1), over T.

    The deviation that the authors divide by is left out: it is a number that scales all.
    """
    process, reward = _quarters(), Rng(5).normal(8, dtype=torch.float64)
    probability = process.string_probabilities()
    ids = torch.arange(8).repeat_interleave((probability * 64).round().long())
    rows = process.trajectories()[ids].replace(reward=reward[ids])
    worst = 0.0
    for low, top, weight in ((0.2, 0.2, 1.5), (0.4, 0.1, 0.5)):
        policy = policy_of(card, low=low, top=top, emphasis=weight)
        assert isinstance(policy.credit_of, MixedRisk)
        policy = dataclasses.replace(policy, credit_of=dataclasses.replace(policy.credit_of, epsilon=None))
        objective, counts = Objective((policy,)), count(rows)
        loss = objective.loss(Batch(rows, counts, process.score(rows)), objective.plan(Batch(rows, counts)))
        tail, middle = mean_between(probability, reward, 0.0, low), mean_between(probability, reward, low, 1 - top)
        exact = gradient_of(process, (weight * tail + middle) / (weight + 1)) / process.length
        worst = max(worst, deviation(-gradient_of(process, loss.value), exact))
    return worst


@register
def bundles_by_hand(card: Provable) -> float:
    """With bundles of two, the j-th row of a prompt is credited with the j-th rewards of its bundle, added up."""
    _, batch = written_out()
    reward, groups = batch.reward.tolist(), members(batch)
    earned = [0.0] * len(reward)
    for first in range(0, len(groups), 2):
        for group, place in itertools.product(groups[first : first + 2], range(4)):
            if place < len(group):
                bundle = [other[place] for other in groups[first : first + 2] if place < len(other)]
                earned[group[place]] = sum(reward[row] for row in bundle)
    ordered = sorted(earned)

    def quantile(level: float) -> float:
        place = level * (len(ordered) - 1)
        below = math.floor(place)
        return ordered[below] + (place - below) * (ordered[min(below + 1, len(ordered) - 1)] - ordered[below])

    low, high = quantile(0.2), quantile(0.9)
    wanted = torch.tensor([_mixed(x, low, high) for x in earned], dtype=torch.float64)
    found = policy_of(card, bundle=2, low=0.2).credit_of(batch)
    return float((found - wanted / (wanted.std(correction=0) + 1e-6)).abs().max())


def _mixed(x: float, low: float, high: float) -> float:
    tail = -max(low - x, 0.0) / 0.2
    return (1.5 * tail + (min(max(x, low), high) - high) / 0.7) / 2.5


@register
def most_spread_subset(card: Provable) -> float:
    """The kept rows have the largest variance of credit of all subsets of their number, found by trying each."""
    policy = policy_of(card)
    assert isinstance(policy.credit_of, MostSpread)
    _, batch = written_out()
    worst = 0.0
    for seed, share in itertools.product(range(3), (0.25, 0.5, 0.75)):
        credit = dataclasses.replace(policy.credit_of, credit=_Given(seed), share=share)
        values = _Given(seed)(batch)
        kept = credit(batch) != 0
        number = math.ceil(share * len(values))
        best = max(float(values[list(chosen)].var()) for chosen in itertools.combinations(range(len(values)), number))
        worst = max(worst, abs(float(values[kept].var()) - best), float(abs(int(kept.sum()) - number)))
    return worst


@dataclasses.dataclass(frozen=True)
class _Given(Part):
    """Credits drawn by a seed, cubed, so that their tails are uneven."""

    seed: int

    def __call__(self, batch: Batch) -> Tensor:
        return Rng(self.seed).normal(len(batch), dtype=torch.float64) ** 3


@register
def most_telling_steps(card: Provable) -> float:
    """The steps that train are those whose |A| H is at least the quantile, found by sorting."""
    _, batch = written_out()
    (gate,) = policy_of(card).gates
    assert isinstance(gate, Influence)
    advantage = Rng(8).normal(*batch.mask.shape, dtype=torch.float64)
    size = (advantage.abs() * batch.present("entropy")).tolist()
    inside = batch.rows.mask.nonzero().tolist()
    ordered = sorted((size[row][step] for row, step in inside), reverse=True)
    worst = 0.0
    for top in (0.2, 0.5, 1.0):
        kept = dataclasses.replace(gate, top=top)(batch, None, advantage)
        least = ordered[math.floor(top * (len(ordered) - 1))]
        wanted = torch.zeros_like(kept)
        for row, step in inside:
            wanted[row, step] = float(size[row][step] >= least)
        worst = max(worst, float((kept - wanted).abs().max()))
    return worst


@register
def everything_is_grpo(card: Provable) -> float:
    """With all rows and all steps kept it is grpo's clipped loss with a mean over tokens."""
    process, old = uneven()[0], markov(symbols=3, length=3, order=None, seed=2)
    _, batch = written_out()
    with torch.no_grad():
        before = old.score(batch.rows).log_prob
    rows = batch.rows.replace(old_log_prob=before, log_prob=before)
    gradients = []
    for policy in (policy_of(card, rows=1.0, tokens=1.0), Policy(GroupCredit("mean", "std"))):
        objective, counts = Objective((policy,)), count(rows)
        states = {name: state.initial for name, state in objective.states.items()}
        present = process.score(rows, {"entropy"})
        targets = objective.plan(Batch(rows, counts, present.detach(), states))
        gradients.append(gradient_of(process, objective.loss(Batch(rows, counts, present, states), targets).value))
    return deviation(*gradients)
