"""On Gaussian data the draws of a flow have the moments of a recursion by hand."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from stepwell.check import expectation
from stepwell.process.flow.build import flow
from stepwell.rng import Rng
from stepwell.sampling.request import Prompt, Request
from stepwell.sampling.rollout import rollout

MEAN, DEVIATION = 0.7, 0.6


def affine(t: float) -> tuple[float, float]:
    """slope and shift of E[x_0 | x_t = x] for data N(MEAN, DEVIATION^2) on the linear path."""
    alpha, variance = 1 - t, (1 - t) ** 2 * DEVIATION**2 + t**2
    slope = alpha * DEVIATION**2 / variance
    return slope, MEAN - slope * alpha * MEAN


def gaussian(x: Tensor, t: Tensor) -> Tensor:
    """The exact velocity e - x_0 of those data, computed a row at a time."""
    slope, shift = (x.new_tensor(column) for column in zip(*map(affine, t.flatten().tolist()), strict=True))
    data = slope.reshape(t.shape) * x + shift.reshape(t.shape)
    return (x - data) / t


def ddim_eta(eta):
    def step(t, s, data):
        q = eta * s * math.sqrt(1 - (s * (1 - t) / (t * (1 - s))) ** 2)
        kept = math.sqrt(s**2 - q**2)
        return (
            (1 - s) * data[0] + kept * (1 - (1 - t) * data[0]) / t,
            (1 - s) * data[1] - kept * (1 - t) * data[1] / t,
            q,
        )

    return step


def stochastic_euler(diffusion):
    """x' = x + v dt + g^2 / (2 t) (x + (1 - t) v) dt + g sqrt(-dt) z."""

    def step(t, s, data):
        dt, squared = s - t, diffusion(t)
        velocity = ((1 - data[0]) / t, -data[1] / t)
        pull = squared * dt / (2 * t)
        slope = 1 + dt * velocity[0] + pull * (1 + (1 - t) * velocity[0])
        return slope, dt * velocity[1] + pull * (1 - t) * velocity[1], math.sqrt(-squared * dt)

    return step


def heun(t, s, data):
    """Two Euler steps averaged; the last step, to t = 0, is Euler's."""
    dt, first = s - t, ((1 - data[0]) / t, -data[1] / t)
    if s == 0:
        return 1 + dt * first[0], dt * first[1], 0.0
    there, (slope, shift) = (1 + dt * first[0], dt * first[1]), affine(s)
    second = ((1 - slope) / s * there[0], (1 - slope) / s * there[1] - shift / s)
    return 1 + dt / 2 * (first[0] + second[0]), dt / 2 * (first[1] + second[1]), 0.0


def tau(level):
    """The reverse SDE with tau^2 times its noise, exactly: e keeps [s (1 - t) / (t (1 - s))]^(tau^2)."""

    def step(t, s, data):
        kept = s * (s * (1 - t) / (t * (1 - s))) ** (level**2)
        q = math.sqrt(s**2 - kept**2)
        return (
            (1 - s) * data[0] + kept * (1 - (1 - t) * data[0]) / t,
            (1 - s) * data[1] - kept * (1 - t) * data[1] / t,
            q,
        )

    return step


def cps(level):
    def step(t, s, data):
        kept, q = s * math.cos(level * math.pi / 2), s * math.sin(level * math.pi / 2)
        return (
            (1 - s) * data[0] + kept * (1 - (1 - t) * data[0]) / t,
            (1 - s) * data[1] - kept * (1 - t) * data[1] / t,
            q,
        )

    return step


BY_HAND = {
    "euler": stochastic_euler(lambda t: 0.0),
    "heun": heun,
    "ddim": ddim_eta(0.0),
    "ddim-eta": ddim_eta(0.5),
    "ddpm": ddim_eta(1.0),
    "sde-flow": tau(0.7 * math.sqrt(0.5)),
    "sde-dance": stochastic_euler(lambda t: 0.3**2),
    "cps": cps(0.7),
}


def recursion(step, times):
    """Mean and variance of the last state from N(0, 1) at times[0]."""
    mean, variance = 0.0, 1.0
    for t, s in itertools.pairwise(times):
        slope, shift, q = step(t, s, affine(t))
        mean, variance = slope * mean + shift, slope**2 * variance + q**2
    return mean, variance


def drawn_moments(process, **request):
    """Exact mean and variance of the last state of a row, by two Gauss-Hermite nodes a draw."""

    def program(rng):
        x = rollout(process, [Request(Prompt(0, None), 1, **request)], rng).trajectories.action[0, -1, 0]
        return x, x**2

    mean, square = expectation(program, normal_nodes=2)
    return float(mean), float(square) - float(mean) ** 2


@pytest.mark.parametrize("solver", BY_HAND)
def test_draws_of_gaussian_data_have_the_moments_of_the_recursion(solver):
    process = flow(gaussian, (1,), solver=solver, steps=4, dtype=torch.float64)
    assert drawn_moments(process) == pytest.approx(recursion(BY_HAND[solver], process.sampler.times), abs=1e-12)


def test_moments_follow_the_grid_that_was_asked_for():
    times = (1.0, 0.8, 0.3, 0.1, 0.0)
    process = flow(gaussian, (1,), solver="ddpm", times=times, dtype=torch.float64)
    assert drawn_moments(process) == pytest.approx(recursion(BY_HAND["ddpm"], times), abs=1e-12)
    shifted = process.with_sampler(steps=3, shift=3.0)
    assert shifted.sampler.times == pytest.approx((1.0, 6 / 7, 3 / 5, 0.0))
    assert drawn_moments(shifted) == pytest.approx(recursion(BY_HAND["ddpm"], shifted.sampler.times), abs=1e-12)


def test_a_planted_sampler_with_the_published_first_step_has_other_moments():
    """Stochastic Euler's published first step leaves a variance of 1 + a^4 / 4 where the marginal's is 1."""
    process = flow(lambda x, t: x, (1,), solver="sde-euler-published", steps=4, dtype=torch.float64)
    state = process.start([None], Rng(0))
    distribution = process.propose(process.advance(state, torch.ones(1, 1, dtype=torch.float64), Rng(0)))
    assert float(distribution.standard_deviation) ** 2 == pytest.approx(
        0.7**2 * (1 / 0.75) * 0.75 * 0.25 / 0.25, abs=1e-12
    )
    exact = drawn_moments(flow(gaussian, (1,), solver="sde-euler", steps=4, dtype=torch.float64))
    assert drawn_moments(flow(gaussian, (1,), solver="sde-euler-published", steps=4, dtype=torch.float64)) != (
        pytest.approx(exact, abs=1e-3)
    )


def test_a_window_has_the_moments_of_its_mixture_of_steps():
    process = flow(gaussian, (1,), solver="ddpm", steps=4, dtype=torch.float64)
    steps = iter([BY_HAND["ddim"], BY_HAND["ddim"], BY_HAND["ddpm"], BY_HAND["ddim"]])
    by_hand = recursion(lambda t, s, data: next(steps)(t, s, data), process.sampler.times)
    assert drawn_moments(process, window=(3, 4)) == pytest.approx(by_hand, abs=1e-12)
    assert by_hand != pytest.approx(recursion(BY_HAND["ddpm"], process.sampler.times), abs=1e-3)
