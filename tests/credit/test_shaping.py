"""Additions to the outcome: the penalties for divergence and for length, against their plain formulas."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stepwell.batch import Batch, Read
from stepwell.credit.group import GroupCredit
from stepwell.credit.shaping import DivergencePenalty, Outcome, Overlong
from stepwell.errors import InputError
from stepwell.rng import Rng
from stepwell.trajectories import count, make


def drawn(seed=0, horizon=None, **fields):
    mask = Rng(seed).uniform(5, 4) < 0.7
    behaviour, reference, old = (Rng(seed + i).normal(5, 4, dtype=torch.float64) for i in (1, 2, 3))
    fields = {"reference_log_prob": reference, "old_log_prob": old, "reward": torch.arange(5.0), **fields}
    rows = make(torch.zeros(5, 4, dtype=torch.long), behaviour, mask, **fields)
    return Batch(rows, count(rows, horizon))


def test_the_outcome_is_the_reward_in_the_type_of_the_log_probabilities():
    assert Outcome()(drawn()).tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert Outcome()(drawn()).dtype == torch.float64
    with pytest.raises(InputError, match="reads 'reward'"):
        Outcome()(drawn(reward=None))


@given(st.integers(0, 99), st.floats(0.01, 2))
@settings(deadline=None, max_examples=20)
def test_the_divergence_penalty_is_the_log_ratio_to_the_reference(seed, beta):
    """That of the old policy."""
    batch = drawn(seed)
    found = DivergencePenalty(beta)(batch)
    for row in range(5):
        steps = [t for t in range(4) if batch.rows.mask[row, t]]
        gap = sum(float(batch.rows.old_log_prob[row, t] - batch.rows.reference_log_prob[row, t]) for t in steps)
        assert float(found[row]) == pytest.approx(-beta * gap, abs=1e-12)


def test_the_penalty_takes_the_sampler_for_the_old_policy():
    """Where that was not scored anew."""
    batch = drawn(old_log_prob=None)
    gap = ((batch.rows.log_prob - batch.rows.reference_log_prob) * batch.mask).sum(1)
    assert torch.allclose(DivergencePenalty(0.5)(batch), -0.5 * gap, rtol=0, atol=1e-14)


def test_a_penalty_of_zero_reads_nothing():
    assert DivergencePenalty(0.0).reads == frozenset()
    assert not bool(DivergencePenalty(0.0)(drawn(reference_log_prob=None)).any())
    assert DivergencePenalty(0.1).reads == {Read("reference", "log_prob")}
    with pytest.raises(InputError, match="reads 'reference_log_prob'"):
        DivergencePenalty(0.1)(drawn(reference_log_prob=None))


def test_a_penalty_enters_the_statistics_of_the_group():
    batch = drawn(prompt=torch.zeros(5).long())
    shaped = batch.reward + DivergencePenalty(0.3)(batch)
    found = GroupCredit("mean", reward=Outcome() + DivergencePenalty(0.3))(batch)
    assert torch.allclose(found, shaped - shaped.mean(), rtol=0, atol=1e-14)


def punished(length, maximum, buffer):
    """Equation 13 of DAPO, case by case."""
    if length <= maximum - buffer:
        return 0.0
    return (maximum - buffer - length) / buffer if length <= maximum else -1.0


@pytest.mark.parametrize(("maximum", "share"), [(10, 0.4), (10, 1.0), (20, 0.2), (20480, 0.2)])
def test_the_overlong_penalty_is_equation_13_at_the_steps_that_were_drawn(maximum, share):
    length = torch.tensor([1, maximum // 2, maximum - 2, maximum, maximum + 1])
    expected = [punished(int(n), maximum, share * maximum) for n in length]
    assert Overlong(maximum, share)(said(length)).tolist() == pytest.approx(expected, abs=1e-12)


def said(length, horizon=20):
    """Rows of `length` (N,) drawn steps between two steps each that an environment gave."""
    steps = torch.arange(int(length.max()) + 4)
    mask = (steps >= 2) & (steps < 2 + length[:, None])
    rows = make(mask.long(), torch.zeros(mask.shape).double(), mask, length=length + 4)
    return Batch(rows.replace(reward=torch.zeros(len(rows)).double()), count(rows, horizon))


def test_the_maximum_defaults_to_the_horizon_of_the_run():
    """What an environment says does not count, as it does not for the horizon."""
    batch = said(torch.tensor([12, 14, 16, 18, 20]))
    assert Overlong()(batch).tolist() == pytest.approx([0.0, 0.0, 0.0, -0.5, -1.0])


def test_a_buffer_that_does_not_fit_is_refused():
    with pytest.raises(InputError, match="buffer"):
        Overlong(10, 1.5)(drawn())


@dataclass(frozen=True)
class Reward(DivergencePenalty):
    """The mistake of a sign: divergence is rewarded."""

    def __call__(self, batch):
        return -super().__call__(batch)


@dataclass(frozen=True)
class WholeLength(Overlong):
    """The mistake of counting all steps: long tool outputs are punished."""

    def __call__(self, batch):
        inside = torch.arange(batch.mask.shape[1]) < batch.rows.length[:, None]
        return super().__call__(Batch(batch.rows.replace(mask=inside), batch.counts))


def test_planted_penalties_are_caught():
    batch = drawn(length=torch.tensor([12, 14, 16, 18, 20]), horizon=20)
    assert not torch.allclose(Reward(0.3)(batch), DivergencePenalty(0.3)(batch))
    batch = said(torch.tensor([12, 14, 16, 18, 20]))
    assert not torch.allclose(WholeLength()(batch), Overlong()(batch))
