"""Preference pairs: the pairing, the scores and the links, and the policy at which their loss is flat."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from tilted import BETA, FLAT, OWN, models

from stepwell.batch import Batch
from stepwell.errors import UnknownName
from stepwell.objective.preference.pairs import Hinge, Logistic, Pairing, Pairs, SequenceScore, Square, pairs_of
from stepwell.objective.term import Objective
from stepwell.rng import Rng
from stepwell.trajectories import count


def test_dpo_is_flat_at_the_tilted_reference_for_any_pairs():
    process, reference, reward, target = models()
    rows = reference.trajectories().replace(reference_log_prob=reference.trajectories().log_prob)
    share = Rng(8).uniform(len(reward), dtype=torch.float64)
    first, second = (i.reshape(-1) for i in torch.meshgrid(*[torch.arange(len(reward))] * 2, indexing="ij"))
    weight = share[first] * share[second] * torch.sigmoid(reward[first] - reward[second])  # Bradley-Terry labels

    def steepness(policy, beta):
        score = SequenceScore()(Batch(rows, count(rows), policy.score(rows)))
        loss = (weight * Logistic(beta)(score[first], score[second])).sum() / weight.sum()
        return float(torch.autograd.grad(loss, policy.logits)[0].norm())

    assert steepness(target, BETA) < FLAT
    assert steepness(target, 2 * BETA) > 0.01
    assert steepness(process, BETA) > 0.01


@pytest.mark.parametrize("x", [-3.0, -0.2, 0.0, 1.0, 4.0])
def test_links_are_their_formulas(x):
    chosen = torch.tensor([x + 0.5], dtype=torch.float64)
    rejected = torch.tensor([0.5], dtype=torch.float64)
    sigmoid = lambda z: 1 / (1 + math.exp(-z))  # noqa: E731
    smooth = -0.8 * math.log(sigmoid(0.3 * x - 0.4)) - 0.2 * math.log(sigmoid(0.4 - 0.3 * x))
    for link, expected in (
        (Logistic(0.3), -math.log(sigmoid(0.3 * x))),
        (Logistic(0.3, 0.2, 0.4), smooth),
        (Square(0.3), (x - 1 / 0.6) ** 2),
        (Hinge(0.3), max(0.0, 1 - 0.3 * x)),
    ):
        assert float(link(chosen, rejected)) == pytest.approx(expected, rel=1e-12)


def test_scores_are_sums_or_means_against_what_was_named(batch_of):
    mask = torch.tensor([[True, False, True], [True, True, True]])
    present, reference, old = (Rng(i).normal(2, 3, dtype=torch.float64) for i in range(3))
    batch = batch_of(present, behaviour=old, reference_log_prob=reference, mask=mask)
    for against, other in (("reference", reference), ("old", old), ("none", torch.zeros(2, 3).double())):
        for mean in (False, True):
            found = SequenceScore(mean, against)(batch)
            for row in range(2):
                kept = (present - other)[row][mask[row]]
                assert float(found[row]) == pytest.approx(float(kept.mean() if mean else kept.sum()), abs=1e-13)


PROMPT = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2])
REWARD = torch.tensor([1.0, 3.0, 0.0, 3.0, 2.0, 2.0, 5.0, 4.0])


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("extremes", {(1, 2), (6, 7)}),
        ("mean", {(1, 0), (1, 2), (3, 0), (3, 2), (6, 7)}),
        ("all", {(0, 2), (1, 0), (1, 2), (3, 0), (3, 2), (6, 7)}),
    ],
)
def test_pairs_are_those_of_their_kind_and_ties_give_none(batch_of, kind, expected):
    batch = batch_of(torch.zeros(8, 1), prompt=PROMPT, reward=REWARD)
    chosen, rejected = pairs_of(REWARD, PROMPT, Pairing(kind)(batch))
    assert set(zip(chosen.tolist(), rejected.tolist(), strict=True)) == expected
    assert len(chosen) == len(expected)


def test_the_loss_of_pairs_is_the_mean_over_all_pairs(batch_of):
    present = Rng(1).normal(8, 1, dtype=torch.float64)
    batch = batch_of(present, prompt=PROMPT, reward=REWARD.double())
    term = Pairs(Logistic(0.5), OWN, Pairing("all"))
    objective = Objective((term,))
    loss = objective.loss(batch, objective.plan(batch))
    pairs = [(i, j) for i, j in itertools.permutations(range(8), 2) if PROMPT[i] == PROMPT[j] and REWARD[i] > REWARD[j]]
    gaps = [float(present[i, 0] - present[j, 0]) for i, j in pairs]
    assert float(loss.value) == pytest.approx(sum(math.log1p(math.exp(-0.5 * x)) for x in gaps) / len(gaps))
    assert float(loss.metrics["pair_accuracy"]) == pytest.approx(sum(x > 0 for x in gaps) / len(gaps))


def test_a_batch_of_ties_has_no_pair_and_no_gradient(batch_of):
    present = torch.zeros(4, 1, dtype=torch.float64, requires_grad=True)
    batch = batch_of(present, prompt=torch.tensor([0, 0, 1, 1]), reward=torch.tensor([1.0, 1.0, 2.0, 2.0]))
    objective = Objective((Pairs(score=OWN),))
    loss = objective.loss(batch, objective.plan(batch)).value
    assert float(loss.detach()) == 0
    assert not bool(torch.autograd.grad(loss, present)[0].any())


def test_names_that_are_none_are_refused():
    for wrong, said in (
        (lambda: Pairing("extreme"), "extremes"),
        (lambda: SequenceScore(against="references"), "reference"),
    ):
        with pytest.raises(UnknownName, match=f"did you mean '{said}'"):
            wrong()
