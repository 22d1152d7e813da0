"""Rows whose request carries a reward: no reward function is asked of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from stepwell.process.exact.table import markov
from stepwell.reward.mixing import Rewards
from stepwell.rng import Rng
from stepwell.sampling.request import Completion, Prompt, Request
from stepwell.sampling.rollout import rollout
from stepwell.training.collect import with_rewards

PROCESS = markov(symbols=3, length=3, prompts=4, end=False, seed=1)


def requests(rewards=(None, 0.25, None, -2.0), **changes):
    """Two rows for each prompt, the last of them a stored answer."""
    made = [replace(Request(Prompt(i, i), 2, reward=given), **changes) for i, given in enumerate(rewards)]
    return [*made[:-1], replace(made[-1], start=Completion((1, 2, 0)))]


def rewarded(asked, weights=(1.0, 0.5)):
    """The rows, and what each reward function was called with."""
    calls = []

    def first(completions):
        calls.append(list(completions))
        return [float(text[0]) for text in completions]

    def second(completions):
        return [10.0 + text[1] for text in completions]

    drawn = rollout(PROCESS, asked, Rng(2))
    meter = PROCESS.metered(type(PROCESS.meter)()).meter
    made, names = with_rewards(drawn, asked, Rewards([first, second], weights), meter)
    assert names == ("first", "second")
    return made, calls, meter


def test_a_given_reward_is_taken_as_it_is_and_nobody_is_asked():
    """In all columns of `rewards` too, whatever the weights; other rows of the batch are judged as ever."""
    made, calls, meter = rewarded(requests())
    rows, texts = made.trajectories, made.samples.values
    assert rows.reward[2:4].tolist() == [0.25, 0.25]
    assert rows.reward[6:].tolist() == [-2.0, -2.0]
    assert rows.rewards[[2, 3, 6, 7]].tolist() == [[0.25, 0.25]] * 2 + [[-2.0, -2.0]] * 2
    own = [0, 1, 4, 5]
    assert calls == [[texts[row] for row in own]]
    assert meter.spent.reward_calls == 8  # four rows, two functions
    for row in own:
        each = [float(texts[row][0]), 10.0 + texts[row][1]]
        assert rows.rewards[row].tolist() == each
        assert float(rows.reward[row]) == each[0] + 0.5 * each[1]


def test_a_batch_of_given_rewards_calls_no_function():
    made, calls, meter = rewarded(requests((1.0, 0.0, 0.5, -2.0)))
    assert made.trajectories.reward.tolist() == [1.0, 1.0, 0.0, 0.0, 0.5, 0.5, -2.0, -2.0]
    assert made.trajectories.rewards.shape == (8, 2)
    assert calls == []
    assert meter.spent.reward_calls == 0


def test_rows_without_an_outcome_have_no_reward_even_where_one_is_given():
    made, calls, _ = rewarded(requests(judged=False))
    assert not bool(made.trajectories.reward.any())
    assert not bool(made.trajectories.rewards.any())
    assert calls == []


def test_without_given_rewards_every_row_is_judged():
    """A planted mistake: a reward of 0 is a reward, and not the absence of one."""
    made, calls, _ = rewarded(requests((None, 0.0, None, None)))
    assert made.trajectories.reward[2:4].tolist() == [0.0, 0.0]
    assert len(calls[0]) == 6
    with pytest.raises(AssertionError):
        assert all(request.reward for request in requests((None, 0.0, 1.0, None)) if request.reward is not None)


def test_a_given_reward_is_kept_in_the_type_of_the_log_probabilities():
    rows = rewarded(requests())[0].trajectories
    assert rows.reward.dtype == rows.rewards.dtype == rows.log_prob.dtype
    assert torch.equal(rows.reward[2], torch.tensor(0.25, dtype=rows.log_prob.dtype))
