"""Pairs whose steps count by what they are worth: a pair by hand, what is a constant, and groups that teach nothing."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch

from stepwell.objective.preference.pairs import Logistic, Pairing, Pairs
from stepwell.objective.preference.step_pairs import StepPairs
from stepwell.objective.term import Objective
from stepwell.parts import Part
from stepwell.process.base import Scores
from stepwell.rng import Rng

EXACT = 1e-14


@dataclass(frozen=True)
class Given(Part):
    """Worths of steps that are noted on the rows."""

    def __call__(self, batch):
        return batch.field("worth")


def slope_of(term, batch):
    """(loss, dL/d log pi)."""
    leaf, objective = batch.log_prob.detach().clone().requires_grad_(), Objective((term,))
    loss = objective.loss(replace(batch, scores=Scores(leaf)), objective.plan(replace(batch, scores=Scores(leaf))))
    return loss, torch.autograd.grad(loss.value, leaf)[0]


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def pair(batch_of, **changes):
    """A row of two steps that is better than a row of one, in a prompt of their own."""
    fields = {
        "mask": torch.tensor([[True, True], [True, False]]),
        "reward": torch.tensor([1.0, 0.0], dtype=torch.float64),
        "prompt": torch.zeros(2).long(),
        "reference_log_prob": torch.tensor([[-1.0, -2.0], [-0.5, 0.0]], dtype=torch.float64),
        "info": {"worth": torch.tensor([[0.2, 0.9], [0.4, 0.0]], dtype=torch.float64)},
    } | changes
    return batch_of(torch.tensor([[-0.7, -2.4], [-1.5, 0.0]], dtype=torch.float64), **fields)


def test_a_pair_by_hand(batch_of):
    term = StepPairs(Given(), beta=0.3, temperature=2.0, rate=1.5)
    loss, found = slope_of(term, pair(batch_of))
    gaps = [[-0.7 + 1.0, -2.4 + 2.0], [-1.5 + 0.5]]
    margin = 0.3 * (sum(gaps[0]) - sum(gaps[1]))
    mass = [math.exp(2.0 * s) for s in (0.2, 0.9)]
    rises = [sigmoid(-1.5 * gap) * m / sum(mass) for gap, m in zip(gaps[0], mass, strict=True)]
    expected = [
        -sigmoid(-margin) * rises[0],
        -sigmoid(-margin) * rises[1],
        sigmoid(-margin) * sigmoid(1.5 * gaps[1][0]),
    ]
    assert found.flatten().tolist() == pytest.approx([*expected, 0.0], abs=EXACT)
    assert float(loss.metrics["pair_loss"]) == pytest.approx(-math.log(sigmoid(margin)), abs=EXACT)
    assert float(loss.metrics["pair_score"]) == pytest.approx((sum(gaps[0]) + sum(gaps[1])) / 2, abs=EXACT)
    assert float(loss.metrics["pair_accuracy"]) == 1.0


def test_a_warm_row_puts_all_on_its_best_step(batch_of):
    """At a high temperature the softmax is the best step.

    A reference far above the policy counts twice an even one: sigmoid is 1/2 at the reference and 1 far below it.
    """
    warm = StepPairs(Given(), beta=0.3, temperature=1e4, rate=0.0)
    _, found = slope_of(warm, pair(batch_of))
    assert float(found[0, 0]) == 0.0
    assert float(found[0, 1]) == pytest.approx(-float(found[1, 0]), abs=EXACT)
    even, far = (StepPairs(Given(), beta=1e-30, temperature=0.0, rate=rate) for rate in (0.0, 1e4))
    reference = torch.tensor([[5.0, 5.0], [-5.0, 0.0]], dtype=torch.float64)
    (_, half), (_, whole) = (slope_of(term, pair(batch_of, reference_log_prob=reference)) for term in (even, far))
    assert torch.allclose(2 * half, whole, rtol=0, atol=EXACT)


def test_rewards_name_pairs_and_their_size_is_not_read(batch_of):
    big = pair(batch_of, reward=torch.tensor([100.0, -7.0], dtype=torch.float64))
    for one, two in zip(slope_of(StepPairs(Given()), big), slope_of(StepPairs(Given()), pair(batch_of)), strict=True):
        assert torch.equal(getattr(one, "value", one), getattr(two, "value", two))


@pytest.mark.parametrize("changes", [{"reward": torch.ones(2).double()}, {"prompt": torch.tensor([0, 1])}])
def test_equal_rewards_and_rows_alone_teach_nothing(batch_of, changes):
    loss, found = slope_of(StepPairs(Given()), pair(batch_of, **changes))
    assert not bool(found.any())
    assert float(loss.value.detach()) == 0.0


@pytest.mark.parametrize("steps", [0, 2])
def test_rows_without_a_trained_step_are_no_obstacle(batch_of, steps):
    nothing = torch.zeros(2, steps).double()
    batch = batch_of(
        nothing,
        mask=torch.zeros(2, steps).bool(),
        reward=torch.tensor([1.0, 0.0], dtype=torch.float64),
        prompt=torch.zeros(2).long(),
        reference_log_prob=nothing,
        info={"worth": nothing},
    )
    loss, found = slope_of(StepPairs(Given()), batch)
    assert float(loss.value.detach()) == 0.0
    assert bool(found.isfinite().all())


def test_even_weights_are_dpo_over_twice_beta_and_the_steps_of_each_row(batch_of):
    rng = Rng(3)
    mask = torch.tensor([[True] * 4, [True, False, True, False], [True, True, True, False], [False] * 3 + [True]])
    present, reference, worth = (rng.normal(4, 4, dtype=torch.float64) for _ in range(3))
    fields = {"prompt": torch.zeros(4).long(), "reference_log_prob": reference, "info": {"worth": worth}}
    batch = batch_of(present, mask=mask, reward=torch.tensor([2.0, 1.0, 2.0, 0.0], dtype=torch.float64), **fields)
    _, found = slope_of(StepPairs(Given(), beta=0.4, temperature=0.0, rate=0.0), batch)
    _, whole = slope_of(Pairs(Logistic(0.4), pairing=Pairing("all")), batch)
    assert torch.allclose(found, whole / (2 * 0.4 * mask.double().sum(1, keepdim=True)), rtol=0, atol=EXACT)


def test_a_coefficient_scales_the_slope(batch_of):
    _, one = slope_of(StepPairs(Given()), pair(batch_of))
    _, three = slope_of(3.0 * StepPairs(Given()), pair(batch_of))
    assert torch.allclose(three, 3 * one, rtol=0, atol=EXACT)
