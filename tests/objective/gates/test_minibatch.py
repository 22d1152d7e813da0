"""Gates over a minibatch: each equals its definition by enumeration, and no order, padding or tie matters."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stepwell.objective.gates.minibatch import DropCovariance, EntropyChange, SecondMoment, TopCovariance, covariance
from stepwell.objective.policy import Policy
from stepwell.objective.regularise import Divergence, Regulariser
from stepwell.objective.term import Objective
from stepwell.parts import Constant
from stepwell.rng import Rng

SHAPE = (4, 5)


def example(batch_of, seed=0, **fields):
    mask = Rng(seed).uniform(*SHAPE) < 0.7
    mask[0, 0] = True
    present, old = (Rng(seed + 1 + i).normal(*SHAPE, dtype=torch.float64) for i in range(2))
    return batch_of(present, behaviour=old, mask=mask, **fields)


def advantages(seed=0):
    return Rng(seed + 9).normal(SHAPE[0], dtype=torch.float64)[:, None].expand(SHAPE)


def places(batch):
    return [tuple(place) for place in batch.rows.mask.nonzero().tolist()]


def by_hand(batch, advantage):
    here = places(batch)
    a = {p: float(advantage[p]) for p in here}
    x = {p: float(batch.log_prob[p]) for p in here}
    means = [math.fsum(values.values()) / len(here) for values in (a, x)]
    return {p: (a[p] - means[0]) * (x[p] - means[1]) for p in here}


@given(seed=st.integers(0, 99), fraction=st.sampled_from([1e-4, 0.1, 0.35, 1.0]))
@settings(deadline=None, max_examples=25)
def test_the_top_covariances_are_those_of_the_definition(batch_of, seed, fraction):
    batch, advantage = example(batch_of, seed), advantages(seed)
    expected = by_hand(batch, advantage)
    found = covariance(batch, advantage)
    assert all(float(found[p]) == pytest.approx(c, rel=1e-9, abs=1e-13) for p, c in expected.items())
    number = max(1, int(fraction * len(expected)))
    top = sorted(expected, key=expected.get)[-number:]
    kept = TopCovariance(fraction)(batch, None, advantage)
    assert {tuple(p) for p in kept.nonzero().tolist()} == set(top)


@given(seed=st.integers(0, 99), fraction=st.sampled_from([1e-4, 0.2, 1.0]))
@settings(deadline=None, max_examples=25)
def test_covariances_in_the_window_are_dropped(batch_of, seed, fraction):
    """No more than the share, and never clipped ones."""
    batch, advantage = example(batch_of, seed), advantages(seed)
    log_ratio = 0.5 * (batch.log_prob - batch.old) * batch.mask
    candidates = {
        p
        for p, c in by_hand(batch, advantage).items()
        if 0.1 < c < 1.5
        and not (
            (advantage[p] > 0 and log_ratio[p] > math.log(1.2)) or (advantage[p] < 0 and log_ratio[p] < math.log(0.8))
        )
    }
    gate = DropCovariance(fraction, 0.1, 1.5)
    dropped = {tuple(p) for p in (gate(batch, log_ratio, advantage) == 0).nonzero().tolist()}
    assert dropped <= candidates
    assert len(dropped) == min(len(candidates), max(1, int(fraction * len(places(batch)))))


def test_of_equal_covariances_the_first_drawn_are_taken_whatever_the_order(batch_of):
    batch = example(batch_of, 3)
    nothing = torch.zeros(SHAPE, dtype=torch.float64)
    kept = TopCovariance(0.3)(batch, None, nothing)
    assert int(kept.sum()) == int(0.3 * len(places(batch)))
    order = Rng(1).permutation(SHAPE[0])
    other = batch_of(batch.log_prob[order], mask=batch.rows.mask[order], node=batch.rows.node[order])
    assert torch.equal(TopCovariance(0.3)(other, None, nothing), kept[order])


def test_the_covariance_that_is_dropped_is_a_fair_lot(batch_of):
    """It is the same however the batch is laid out."""
    batch, advantage = example(batch_of, 3), advantages(3)
    log_ratio = torch.zeros(SHAPE, dtype=torch.float64)
    seen = Counter()
    draws = 400
    for seed in range(draws):
        gate = DropCovariance(1e-4, -9.0, 9.0, seed=seed)
        kept = gate(batch, log_ratio, advantage)
        seen[tuple((kept == 0).nonzero()[0].tolist())] += 1
        assert int((kept == 0).sum()) == 1
        if seed < 5:
            order = Rng(seed).permutation(SHAPE[0])
            other = batch_of(batch.log_prob[order], mask=batch.rows.mask[order], node=batch.rows.node[order])
            assert torch.equal(gate(other, log_ratio[order], advantage[order]), kept[order])
    number = len(places(batch))
    expected = draws / number
    spread = 4 * math.sqrt(draws * (1 / number) * (1 - 1 / number))  # four standard errors
    assert set(seen) == set(places(batch))
    assert all(abs(count - expected) < spread for count in seen.values())


def test_the_lot_is_drawn_anew_for_every_rollout(batch_of):
    log_ratio, advantage = torch.zeros(SHAPE, dtype=torch.float64), advantages(3)
    gate, found = DropCovariance(1e-4, -9.0, 9.0), set()
    for version in range(6):
        batch = example(batch_of, 3, version=torch.full((SHAPE[0],), version))
        found.add(tuple((gate(batch, log_ratio, advantage) == 0).nonzero()[0].tolist()))
    assert len(found) > 1


def test_with_nothing_in_the_window_nothing_is_dropped(batch_of):
    batch = example(batch_of)
    assert bool((DropCovariance(1.0, 90.0, 91.0)(batch, batch.mask, advantages()) == 1).all())


@given(seed=st.integers(0, 99), threshold=st.sampled_from([0.0, 0.04, 0.5, 2.0]))
@settings(deadline=None, max_examples=25)
def test_the_second_moment_drops_the_fewest_of_the_largest(batch_of, seed, threshold):
    batch, advantage = example(batch_of, seed), advantages(seed)
    log_ratio = (batch.log_prob - batch.old) * batch.mask
    moved = [p for p in places(batch) if advantage[p] * log_ratio[p] > 0]
    kept = sorted(moved, key=lambda p: abs(float(log_ratio[p])))
    while kept and sum(float(log_ratio[p]) ** 2 for p in kept) / len(kept) > threshold:
        kept.pop()
    gate = SecondMoment(threshold)(batch, log_ratio, advantage)
    assert {tuple(p) for p in (gate == 0).nonzero().tolist()} == set(moved) - set(kept)


def test_of_equal_moments_at_the_border_none_trains(batch_of):
    log_ratio = torch.tensor([[0.1, 0.5, 0.5, -0.5]], dtype=torch.float64)
    gate = SecondMoment(0.14)  # one of the two would do: (0.01 + 0.25) / 2 = 0.13
    found = gate(batch_of(log_ratio), log_ratio, torch.ones_like(log_ratio))
    assert found.tolist() == [[1.0, 0.0, 0.0, 1.0]]


def test_an_entropy_change_weighs_the_largest_least_and_small_ones_hardly(batch_of):
    entropy = torch.full((1, 3), 0.9, dtype=torch.float64)
    present = torch.tensor([[-0.2, -1.0, -2.5]], dtype=torch.float64)
    batch = batch_of(present, extra={"entropy": entropy})
    weight = EntropyChange(0.8)(batch, None, torch.ones_like(present))
    change = [abs((1 - math.exp(x)) * (x + 0.9)) for x in (-0.2, -1.0, -2.5)]
    expected = [0.8 ** (c / max(change)) for c in change]
    assert weight[0].tolist() == pytest.approx(expected, rel=1e-12)
    small = EntropyChange(0.8)(batch, None, 1e-3 * torch.ones_like(present))
    assert small[0].tolist() == pytest.approx([0.8 ** (1e-3 * c / 0.02) for c in change], rel=1e-12)


def test_a_regularisers_gate_reads_the_credit_it_is_given(batch_of):
    batch = example(batch_of, reward=torch.arange(4.0), prompt=torch.zeros(4).long())
    parts = [Regulariser(Divergence("abs", "old"), 1.0, gates=(TopCovariance(0.2),), credit_of=c) for c in CREDITS]
    weights = [Objective((part,)).plan(batch)["0"]["weight"] for part in parts]
    assert not torch.equal(*weights)
    assert int((weights[0] > 0).sum()) == max(1, int(0.2 * len(places(batch))))
    assert Objective((Policy(), parts[0])).plans_on_scores


CREDITS = (Policy().credit_of, Policy().credit_of * -1.0)


def test_a_constant_is_the_same_for_every_row(batch_of):
    assert Constant(0.3)(example(batch_of)).tolist() == [0.3] * 4
