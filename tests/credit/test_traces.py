"""Credit along a trajectory: generalised advantages, reward-to-go and whitening against slow, plain recursions."""

from __future__ import annotations

import dataclasses
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stepwell.batch import Batch
from stepwell.check.oracles.expected import expected_gradient, policy_gradient
from stepwell.check.oracles.provable import deviation
from stepwell.credit import traces
from stepwell.credit.group import GroupCredit
from stepwell.credit.traces import (
    GeneralisedAdvantage,
    RewardToGo,
    Whitened,
    generalised_advantages,
    reward_to_go,
    step_rewards,
    whiten,
)
from stepwell.objective.policy import Policy
from stepwell.objective.reduction import Reduction
from stepwell.objective.surrogate import Score
from stepwell.process.exact.table import markov
from stepwell.rng import Rng
from stepwell.trajectories import count, make, pad_steps

SHAPE = (4, 6)
ROUNDING = 1e-12  # sums of some tens of products of order one
gammas = st.sampled_from([0.0, 0.9, 1.0])
lambdas = st.sampled_from([0.0, 0.5, 0.95, 1.0])
seeds = st.integers(0, 999)


def numbers(seed, *shape):
    return Rng(seed).normal(*shape, dtype=torch.float64)


def drawn(seed, **fields):
    """Rows with holes and padding, maybe an empty one, with rewards, step rewards and values."""
    mask = Rng(seed).uniform(*SHAPE) < 0.6
    fields = {
        "reward": numbers(seed + 1, SHAPE[0]),
        "step_reward": numbers(seed + 2, *SHAPE),
        "value": numbers(seed + 3, *SHAPE),
        "reference_log_prob": numbers(seed + 4, *SHAPE),
        **fields,
    }
    rows = make(torch.zeros(SHAPE, dtype=torch.long), numbers(seed + 5, *SHAPE), mask, **fields)
    return Batch(rows, count(rows))


def slowly(rewards, values, gamma, lam):
    """A_t = sum_l (gamma lam)^l (r_{t+l} + gamma V_{t+l+1} - V_{t+l}) of one row without holes or padding."""
    values = [*values, 0.0]
    deltas = [r + gamma * values[t + 1] - values[t] for t, r in enumerate(rewards)]
    return [sum((gamma * lam) ** (s - t) * deltas[s] for s in range(t, len(deltas))) for t in range(len(deltas))]


def row_by_row(mask, found, expected_of):
    """Compare (N, T) credit with a function of the row number that gives a list over the row's trained steps."""
    for row, trained in enumerate(mask):
        assert found[row][trained].tolist() == pytest.approx(expected_of(row, trained), abs=ROUNDING)
    assert not bool((found * ~mask).any())


@given(seeds, gammas, lambdas)
@settings(deadline=None, max_examples=40)
def test_generalised_advantages_are_their_definition(seed, gamma, lam):
    """On rows whose holes are taken out."""
    batch = drawn(seed)
    rewards, values, mask = batch.rows.step_reward, batch.rows.value, batch.rows.mask
    found = generalised_advantages(rewards, values, batch.mask, gamma, lam)
    row_by_row(mask, found, lambda i, t: slowly(rewards[i][t].tolist(), values[i][t].tolist(), gamma, lam))


@given(seeds, gammas, lambdas)
@settings(deadline=None, max_examples=20)
def test_what_stands_in_holes_and_padding_never_matters(seed, gamma, lam):
    batch, credit = drawn(seed), GeneralisedAdvantage(gamma, lam, kl=0.2)
    rows, noise = batch.rows, 9 * numbers(seed + 7, *SHAPE) * ~batch.rows.mask
    changed = rows.replace(
        step_reward=rows.step_reward + noise,
        value=rows.value - noise,
        reference_log_prob=rows.reference_log_prob + noise,
    )
    found = credit(batch)
    assert torch.equal(credit(Batch(changed, batch.counts)), found)
    padded = credit(Batch(pad_steps(rows, SHAPE[1] + 2), batch.counts))
    assert torch.equal(padded[:, : SHAPE[1]], found)
    assert not bool(padded[:, SHAPE[1] :].any())


@given(seeds, gammas)
@settings(deadline=None, max_examples=20)
def test_a_lambda_of_one_is_reward_to_go_less_the_value(seed, gamma):
    batch = drawn(seed)
    rewards, values, mask = batch.rows.step_reward, batch.rows.value, batch.mask
    found = generalised_advantages(rewards, values, mask, gamma, 1.0)
    assert torch.allclose(found, reward_to_go(rewards, mask, gamma) - values * mask, rtol=0, atol=ROUNDING)


@given(seeds, gammas)
@settings(deadline=None, max_examples=20)
def test_reward_to_go_is_the_discounted_sum_of_what_comes(seed, gamma):
    batch = drawn(seed)
    found, rewards = RewardToGo(gamma)(batch), step_rewards(batch, batch.reward)
    row_by_row(
        batch.rows.mask,
        found,
        lambda i, t: [sum(gamma**l * r for l, r in enumerate(rewards[i][t].tolist()[s:])) for s in range(int(t.sum()))],  # noqa: E741
    )


def test_the_outcome_is_on_the_last_trained_step():
    mask = torch.tensor([[True, True, False, True, False], [False] * 5, [False, True, False, False, False]])
    rows = make(torch.zeros(3, 5).long(), torch.zeros(3, 5).double(), mask)
    outcome = torch.tensor([3.0, 5.0, 7.0], dtype=torch.float64)
    found = step_rewards(Batch(rows, count(rows)), outcome)
    assert found.tolist() == [[0, 0, 0, 3, 0], [0] * 5, [0, 7, 0, 0, 0]]
    given_ones = rows.replace(step_reward=torch.ones(3, 5))
    found = step_rewards(Batch(given_ones, count(rows)), outcome)
    assert found.tolist() == [[1, 1, 0, 4, 0], [0] * 5, [0, 8, 0, 0, 0]]
    assert bool((given_ones.step_reward == 1).all())  # nothing was written into the rows


@given(seeds)
@settings(deadline=None, max_examples=20)
def test_a_penalty_in_the_step_rewards_is_k1_of_each_step(seed):
    batch, beta = drawn(seed), 0.3
    gap = (batch.behaviour - batch.rows.reference_log_prob) * batch.mask
    rewards = step_rewards(batch, batch.reward) - beta * gap
    expected = generalised_advantages(rewards, batch.rows.value, batch.mask, 1.0, 0.9)
    assert torch.equal(GeneralisedAdvantage(1.0, 0.9, beta)(batch), expected)


@given(seeds)
@settings(deadline=None, max_examples=20)
def test_whitened_credit_has_mean_zero_and_variance_one_over_trained_steps(seed):
    batch = drawn(seed)
    values = 5 + 3 * numbers(seed, *SHAPE)
    found = whiten(values, batch.mask)
    inside = found[batch.rows.mask].tolist()
    assert statistics.fmean(inside) == pytest.approx(0, abs=1e-12)
    assert statistics.variance(inside) == pytest.approx(1, rel=1e-6)  # epsilon 1e-8 over a variance of a few
    assert not bool((found * ~batch.rows.mask).any())
    moved = torch.where(batch.rows.mask, values, 1e6)
    assert torch.equal(whiten(moved, batch.mask), found)


@pytest.mark.parametrize("steps", [0, 3])
def test_rows_without_a_trained_step_have_credit_zero(steps):
    """Even where no row has one."""
    mask = torch.zeros(2, steps, dtype=torch.bool)
    rows = make(torch.zeros(2, steps).long(), torch.zeros(2, steps).double(), mask, reward=torch.tensor([0.0, 4.0]))
    batch = Batch(rows.replace(value=torch.ones(2, steps).double()), count(rows))
    for credit in (RewardToGo(), GeneralisedAdvantage(), Whitened(GeneralisedAdvantage())):
        assert torch.equal(credit(batch), torch.zeros(2, steps).double())


def test_whitening_a_credit_of_rows_weighs_each_row_by_its_steps():
    mask = torch.tensor([[True, True, True], [True, False, False]])
    rows = make(torch.zeros(2, 3).long(), torch.zeros(2, 3).double(), mask, reward=torch.tensor([0.0, 4.0]))
    found = Whitened(GroupCredit("none"))(Batch(rows, count(rows)))
    spread = statistics.stdev([0.0, 0.0, 0.0, 4.0])
    assert found[mask].tolist() == pytest.approx([-1 / spread] * 3 + [3 / spread], rel=1e-8)


def model():
    """A tabular policy, rewards of its strings, and the true value before each of their steps."""
    process = markov(symbols=3, length=3, order=None, seed=1)
    reward = numbers(2, len(process.strings()))
    probability, strings = process.string_probabilities().detach(), process.strings()
    value = torch.zeros(len(strings), process.length, dtype=torch.float64)
    for row, text in enumerate(strings):
        for step in range(len(text)):
            same = torch.tensor([other[:step] == text[:step] and len(other) > step for other in strings])
            value[row, step] = (probability * reward)[same].sum() / probability[same].sum()
    return process, reward, value


def off(lam, value_error=0.0):
    process, reward, value = model()
    policy = Policy(GeneralisedAdvantage(1.0, lam), surrogate=Score(), reduction=Reduction("row-sum"))
    error = value_error * numbers(9, process.contexts)[process._contexts(process.trajectories().action)]
    found = expected_gradient(process, policy, 1, reward, fields={"value": value + error})
    return deviation(found, policy_gradient(process, reward))


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_the_true_value_gives_the_exact_gradient_for_every_lambda(lam):
    assert off(lam) < 1e-10


def test_a_wrong_value_biases_every_lambda_but_one():
    """At lambda 1 the value is a baseline of the state: any value is free."""
    assert off(1.0, value_error=0.5) < 1e-10
    assert off(0.5, value_error=0.5) > 0.05
    assert off(0.0, value_error=0.5) > 0.05


def leaking(rewards, value, mask, gamma, lam, final=None):
    """The mistake of stepping through holes: the value of a tool's token enters the policy's advantage."""
    advantage, carried, following = torch.zeros_like(rewards), torch.zeros(len(rewards)), torch.zeros(len(rewards))
    for step in reversed(range(rewards.shape[1])):
        carried = rewards[:, step] + gamma * following - value[:, step] + gamma * lam * carried
        following, advantage[:, step] = value[:, step], carried
    return advantage * mask


def test_a_planted_leak_through_holes_is_caught(monkeypatch):
    monkeypatch.setattr(traces, "generalised_advantages", leaking)
    with pytest.raises(AssertionError):
        test_what_stands_in_holes_and_padding_never_matters.hypothesis.inner_test(3, 1.0, 0.95)
    batch = drawn(3)
    whole = dataclasses.replace(batch, rows=batch.rows.replace(mask=torch.ones_like(batch.rows.mask)))
    row_by_row(  # without holes it is right, so that only the holes can have caught it
        whole.rows.mask,
        leaking(batch.rows.step_reward, batch.rows.value, whole.mask, 1.0, 0.95),
        lambda i, t: slowly(batch.rows.step_reward[i].tolist(), batch.rows.value[i].tolist(), 1.0, 0.95),
    )
