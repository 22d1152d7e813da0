"""Differentiable rewards: the numbers and gradients are those of the functions, and what carries none is refused."""

from __future__ import annotations

import pytest
import torch

from stepwell.errors import InputError, RewardError
from stepwell.meter import Meter
from stepwell.process.base import Samples
from stepwell.reward.differentiable import Judge
from stepwell.reward.mixing import Rewards
from stepwell.rng import Rng
from stepwell.sampling.record import Drawn
from stepwell.sampling.request import Prompt
from stepwell.trajectories import make

PROMPTS = [Prompt(10, "red", {"target": 1.0}), Prompt(20, "blue", {"target": -2.0})]
SAMPLES = Rng(0).normal(3, 2, dtype=torch.float64)
IDS = torch.tensor([20, 10, 20])


def near(completions, target):
    """One number a row, of a column of the data."""
    return -((torch.stack(list(completions)).sum(1) - completions[0].new_tensor(target)) ** 2)


def size(completions):
    """A list of scalars, one a row."""
    return [sample.square().sum() for sample in completions]


def judged(*functions, weights=None, samples=SAMPLES, ids=IDS, meter=None):
    x = samples.clone().requires_grad_()
    return x, Judge(Rewards(functions, weights), PROMPTS, meter or Meter())(x, ids)


def test_samples_are_judged_with_the_columns_of_their_own_prompts():
    _, found = judged(near)
    target = torch.tensor([-2.0, 1.0, -2.0]).double()
    torch.testing.assert_close(found.detach(), -((SAMPLES.sum(1) - target) ** 2), rtol=0, atol=1e-14)


def test_the_gradient_of_each_row_is_its_own():
    x, found = judged(near)
    target = torch.tensor([-2.0, 1.0, -2.0]).double()
    by_hand = (-2 * (SAMPLES.sum(1) - target))[:, None].expand(3, 2)
    for row in range(3):
        (gradient,) = torch.autograd.grad(found[row], x, retain_graph=True)
        torch.testing.assert_close(gradient[row], by_hand[row], rtol=0, atol=1e-14)
        assert not gradient[[other for other in range(3) if other != row]].any()


def test_several_rewards_are_added_with_their_weights():
    x, found = judged(near, size, weights=[2.0, -0.5])
    parts = [judged(function)[1] for function in (near, size)]
    torch.testing.assert_close(found, 2.0 * parts[0] - 0.5 * parts[1], rtol=0, atol=1e-14)
    (gradient,) = torch.autograd.grad(found.sum(), x)
    target = torch.tensor([-2.0, 1.0, -2.0]).double()
    by_hand = 2.0 * (-2 * (SAMPLES.sum(1) - target))[:, None] - 0.5 * 2 * SAMPLES
    torch.testing.assert_close(gradient, by_hand, rtol=0, atol=1e-13)


def test_a_list_and_a_tensor_say_the_same():
    def as_tensor(completions):
        return torch.stack(list(completions)).square().sum(1)

    torch.testing.assert_close(judged(size)[1], judged(as_tensor)[1], rtol=0, atol=0)


def test_the_differentiable_reward_is_the_one_that_rollouts_are_judged_by():
    rewards = Rewards([near, size], [2.0, -0.5])
    by_id = {prompt.id: prompt for prompt in PROMPTS}
    rows = make(SAMPLES[:, None], torch.zeros(3, 1), torch.ones(3, 1), prompt=IDS)
    drawn = Drawn(rows, Samples(list(SAMPLES)), [by_id[number] for number in IDS.tolist()])
    torch.testing.assert_close(judged(near, size, weights=[2.0, -0.5])[1].detach(), rewards(drawn, Meter()).total)


def test_every_row_of_every_function_is_counted():
    meter = Meter()
    judged(near, size, meter=meter)
    assert meter.spent.reward_calls == 6


def test_the_total_has_the_precision_of_the_samples():
    x, found = judged(size, samples=SAMPLES.float())
    assert found.dtype == x.dtype == torch.float32

    def wide(completions):
        return torch.stack(list(completions)).double().sum(1)

    assert judged(wide, samples=SAMPLES.float())[1].dtype == torch.float32


def test_rewards_that_carry_no_gradient_are_refused_by_name():
    def numbers(completions):
        return [float(sample.sum()) for sample in completions]

    def detached(completions):
        return torch.stack(list(completions)).detach().sum(1)

    def constant(completions):
        return torch.ones(len(completions))

    for function in (numbers, detached, constant):
        with pytest.raises(RewardError, match=f"'{function.__name__}' is not differentiable.*without a gradient"):
            judged(function)
        with pytest.raises(RewardError, match=function.__name__):
            judged(size, function)


def test_rewards_of_another_shape_are_refused():
    def one(completions):
        return torch.stack(list(completions)).sum()

    def columns(completions):
        return torch.stack(list(completions))

    for function, shape in ((one, r"\(\)"), (columns, r"\(3, 2\)")):
        with pytest.raises(RewardError, match=f"shape {shape} for 3 samples"):
            judged(function)


def test_a_column_that_there_is_not_is_refused_before_anything_is_called():
    calls = []

    def asks(completions, answer):
        calls.append(1)
        return size(completions)

    with pytest.raises(InputError, match="answer"):
        judged(asks)
    assert not calls
