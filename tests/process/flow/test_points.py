"""Predictions at points around the ends of rows, and final samples differentiable through their last steps."""

from __future__ import annotations

import math

import pytest
import torch
from small_flow import STEPS, draw, small

from stepwell.columns import Columns
from stepwell.rng import Rng
from stepwell.sampling.request import Prompt, Request


def with_points(rows, **points):
    return rows.replace(points=Columns(points, len(rows)))


def test_forward_predictions_are_the_networks_around_each_rows_own_end():
    process = small(guidance=2.0, unconditional={"label": torch.tensor([2])})
    rows = draw(process, Request(Prompt(0, 0), 2), Request(Prompt(1, 1), 1, horizon=4))
    time = torch.tensor([[0.3, 0.9], [0.5, 0.1], [0.2, 1.0]], dtype=torch.float64)
    noise = Rng(4).normal(3, 2, 2, dtype=torch.float64)
    with torch.no_grad():
        found = process.score(with_points(rows, time=time, noise=noise), ("forward", "denoised"))
        ends = torch.stack([rows.action[0, -1], rows.action[1, -1], rows.action[2, 3]])
        for point in range(2):
            t = time[:, point : point + 1]
            x = (1 - t) * ends + t * noise[:, point]
            velocity = process.module(x, t[:, 0], torch.tensor([0, 0, 1]))  # without guidance
            torch.testing.assert_close(found["forward"][:, point], velocity, rtol=0, atol=1e-13)
            torch.testing.assert_close(found["denoised"][:, point], x - t * velocity, rtol=0, atol=1e-13)


@pytest.mark.parametrize("solver", ["sde-flow", "euler", "sde-dpmpp-2m", "dpmpp-2m", "heun"])
def test_the_final_sample_is_itself_whatever_the_depth(solver):
    process = small(solver)
    rows = draw(process)
    depth = torch.tensor([1, 3, STEPS, 3, 2])
    if solver in ("dpmpp-2m", "sde-dpmpp-2m"):
        depth = torch.full((5,), STEPS)  # a chain begun later has nothing to remember
    sample = process.score(with_points(rows, depth=depth), ("sample",))["sample"]
    torch.testing.assert_close(sample.detach(), rows.action[:, -1], rtol=0, atol=1e-12)


def test_the_samples_gradient_passes_through_its_last_steps_only():
    """Against a chain by hand: noise is kept, the state moves, and what comes before the depth is a constant."""
    process = small("sde-euler")
    rows = draw(process, Request(Prompt(0, 0), 3))
    parameters = list(process.module.parameters())
    weight = Rng(6).normal(3, 2, dtype=torch.float64)
    gradients = []
    for depth in (1, 3, STEPS):
        sample = process.score(with_points(rows, depth=torch.full((3,), depth)), ("sample",))["sample"]
        found = torch.autograd.grad((weight * sample).sum(), parameters)
        x = rows.action[:, STEPS - depth]
        for k in range(STEPS - depth, STEPS):
            t, s = process.sampler.times[k], process.sampler.times[k + 1]
            means = []
            for state in (x, rows.action[:, k]):
                velocity = process.module(state, state.new_full((3,), t), torch.zeros(3).long())
                if t == 1.0:  # DDIM's step with eta = a
                    q = 0.7 * s
                    means.append((1 - s) * (state - velocity) + math.sqrt(s**2 - q**2) * state)
                else:
                    pull = 0.7**2 * t / (1 - t) * (s - t) / (2 * t)
                    means.append(state + (s - t) * velocity + pull * (state + (1 - t) * velocity))
            x = means[0] + (rows.action[:, k + 1] - means[1]).detach()
        by_hand = torch.autograd.grad((weight * x).sum(), parameters)
        for one, other in zip(found, by_hand, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-11)
        gradients.append(torch.cat([g.flatten() for g in found]))
    assert not torch.allclose(gradients[0], gradients[1])
    assert not torch.allclose(gradients[1], gradients[2])


def test_the_kept_noise_is_that_of_the_parameters_that_drew_it():
    process = small()
    rows = draw(process, Request(Prompt(0, 0), 3))
    with torch.no_grad():
        old = process.score(rows, ("mean",))["mean"]
    rows = with_points(rows, depth=torch.full((3,), 2)).replace(info=Columns({"old_mean": old}, 3))
    with torch.no_grad():
        process.module.outer.bias += 0.1
        moved = process.score(rows, ("sample",))["sample"]
        state = rows.action[:, STEPS - 2]
        for k in (STEPS - 2, STEPS - 1):
            there = process.score(
                rows.replace(action=rows.action.clone().index_copy(1, torch.tensor([k]), state[:, None])), ("mean",)
            )
            if k < STEPS - 1:
                state = there["mean"][:, k + 1] + rows.action[:, k + 1] - old[:, k + 1]
        velocity = process.module(state, state.new_full((3,), process.sampler.times[-2]), torch.zeros(3).long())
        last = state - process.sampler.times[-2] * velocity
    torch.testing.assert_close(moved, last, rtol=0, atol=1e-12)
