"""Losses of a group: the policies at which they are flat, and their gradients on policy."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch
from tilted import BETA, EXACT, FLAT, loss_on, models, some_rows

from stepwell.check.oracles.expected import expected_gradient
from stepwell.check.oracles.provable import deviation
from stepwell.objective.groups import Consistency, GroupFunction, GroupLoss, PosteriorMatching
from stepwell.rng import Rng


@pytest.mark.parametrize("seed", [3, 4])
@pytest.mark.parametrize("function", [Consistency(BETA), PosteriorMatching(BETA)], ids=["copg", "brain"])
def test_a_group_loss_is_flat_at_the_tilted_reference_for_any_samples(function, seed):
    process, _, _, target = models()
    rows = some_rows(seed=seed)
    assert float(loss_on(target, GroupLoss(function), rows)[1].norm()) < FLAT
    assert float(loss_on(process, GroupLoss(function), rows)[1].norm()) > 0.01


def test_consistency_is_the_mean_over_pairs_of_half_the_square():
    score, reward = (Rng(i).normal(4, dtype=torch.float64) for i in range(2))
    x = (reward - 0.3 * score).tolist()
    pairs = [0.5 * (a - b) ** 2 for a, b in itertools.combinations(x, 2)]
    found = Consistency(0.3)(score, reward, torch.zeros(4))
    assert float(found) == pytest.approx(sum(pairs) / len(pairs), rel=1e-12)
    assert float(Consistency(0.3)(score[:1], reward[:1], torch.zeros(1))) == 0


@pytest.mark.parametrize("size", [2, 3])
def test_consistency_on_policy_has_the_regularised_rewards_gradient(size):
    """Times -2 beta."""
    process, reference, reward, _ = models()
    fields = {"reference_log_prob": reference.trajectories().log_prob}
    found = -expected_gradient(process, GroupLoss(Consistency(BETA)), size, reward, fields=fields)
    log_probability = process.string_log_probabilities()
    gap = log_probability - reference.string_log_probabilities().detach()
    value = (log_probability.exp() * (reward - BETA * gap)).sum()
    assert deviation(found, -2 * BETA * torch.autograd.grad(value, process.logits)[0]) < EXACT


def test_posterior_matching_weighs_rows_by_two_self_normalised_weights():
    process, _, _, _ = models()
    rows = some_rows(number=4, groups=1)
    with torch.no_grad():
        present = process.score(rows).log_prob.sum(1)
    proposal, reference = rows.log_prob.sum(1), rows.reference_log_prob.sum(1)
    weight = (reference + rows.reward / BETA - proposal).softmax(0) - (present - proposal).softmax(0)
    expected = torch.autograd.grad(-(weight * process.score(rows).log_prob.sum(1)).sum(), process.logits)[0]
    found = loss_on(process, GroupLoss(PosteriorMatching(BETA)), rows)[1]
    assert deviation(found, expected) < EXACT


@dataclass(frozen=True)
class WithoutTheReference(GroupFunction):
    """The mistake of a consistency whose scores are not times beta."""

    def __call__(self, score, reward, proposal):
        return (reward - score).var()


def test_a_planted_consistency_is_not_flat_at_the_target():
    _, _, _, target = models()
    assert float(loss_on(target, GroupLoss(WithoutTheReference()), some_rows())[1].norm()) > 0.01
