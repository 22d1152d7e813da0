"""Lambda-DDIM: DDIM at rate 0, an exact integral of a constant noise's part, and order one at every rate."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from scipy.integrate import quad

from stepwell.errors import InputError
from stepwell.rng import Rng
from stepwell.solver import grid
from stepwell.solver.exponential import coefficients, conjugated
from stepwell.solver.integrate import sample
from stepwell.solver.path import PATHS, Linear, Path, path
from stepwell.solver.table import Table, table

STEPS = [(0.95, 0.8), (0.8, 0.5), (0.5, 0.1), (0.1, 0.0)]


def lambda_ddim(rate: float) -> Table:
    return table("ddim").replace(name="lambda-ddim", predicts="noise", conjugate=rate)


@pytest.mark.parametrize("name", PATHS)
def test_at_rate_zero_it_is_ddim_to_float_precision(name: str):
    on, x, noise = path(name), 0.7, -1.2
    for time, target in STEPS:
        row = conjugated(on, 0.0, time, target)
        data = (x - on.sigma(time) * noise) / on.alpha(time)
        ddim = coefficients(on, table("ddim"), (time,), target)
        scale = on.alpha(target) / on.alpha(time) * (1.0 + on.sigma(time))
        assert row.state * x + row.weights[0] * noise == pytest.approx(
            ddim.state * x + ddim.weights[0] * data, abs=1e-13 * max(1.0, scale)
        )


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("rate", [-2.0, 0.5, 3.0])
def test_the_weight_is_the_integral_over_time_and_the_state_is_eulers(name: str, rate: float):
    """Integrated in t here, A (sigma' - sigma alpha' / alpha), and in sigma / alpha there."""
    on = path(name)

    def integrand(t: float) -> float:
        turning = on.sigma_rate(t) - on.sigma(t) * on.alpha_rate(t) / on.alpha(t)
        return math.exp(rate * t) / on.alpha(t) * turning

    for time, target in [(0.999, 0.8), (0.95, 0.8), (0.8, 0.5), (0.5, 0.1)]:
        row = conjugated(on, rate, time, target)
        grown, shrunk = math.exp(rate * time) / on.alpha(time), math.exp(rate * target) / on.alpha(target)
        integral = quad(integrand, time, target, epsabs=1e-13, epsrel=1e-12)[0]
        assert row.weights[0] == pytest.approx(integral / shrunk, rel=1e-8)
        assert row.state == pytest.approx((1.0 + rate * (target - time)) * grown / shrunk, rel=1e-12)


def between(on: Path, steps: int) -> list[float]:
    first, last = on.log_snr(0.9), on.log_snr(0.1)
    return [on.time(first + (last - first) * step / steps) for step in range(steps + 1)]


@pytest.mark.parametrize("name", ["linear", "vp-linear"])
def test_every_rate_converges_at_order_one_to_the_same_solution(mixture: Callable, name: str):
    on = path(name)
    model, x = mixture(on), on.sigma(0.9) * Rng(0).normal(16, 2, dtype=torch.float64)
    exact = model.solve(x, 0.9, 0.1)
    for rate in (-1.0, 0.5, 2.0):
        errors = []
        for steps in (80, 160):
            settings = {"output": "data", "partial": True}
            final = sample(model.data, x, on, between(on, steps), lambda_ddim(rate), Rng(0), **settings).final
            errors.append(float((final - exact).abs().mean()))
        assert math.log2(errors[0] / errors[1]) == pytest.approx(1, abs=0.2)


def test_the_planted_rate_that_is_in_the_map_but_not_in_the_step_does_not_converge(mixture: Callable):
    model, x = mixture(Linear()), Rng(0).normal(16, 2, dtype=torch.float64)
    exact, errors = model.solve(x, 0.9, 0.1), []
    for steps in (160, 320):
        state = x
        for time, target in itertools.pairwise(between(Linear(), steps)):
            row = conjugated(Linear(), 2.0, time, target)
            noise = Linear().convert(model.data(state, time), state, time, "data", "noise")
            state = row.state / (1.0 + 2.0 * (target - time)) * state + row.weights[0] * noise
        errors.append(float((state - exact).abs().mean()))
    assert errors[1] > 0.9 * errors[0]


def test_it_runs_from_pure_noise_where_no_noise_prediction_says_anything(mixture: Callable):
    times, x = grid.uniform(8, Linear()), Rng(1).normal(4, 2, dtype=torch.float64)
    drawn = sample(mixture(Linear()).data, x, Linear(), times, lambda_ddim(0.5), Rng(0), output="data")
    assert bool(torch.isfinite(drawn.final).all())
    first = coefficients(Linear(), table("ddim"), (1.0,), times[1]).mean(x, (mixture(Linear()).data(x, 1.0),))
    assert torch.equal(drawn.states[1], first)


def test_a_rate_without_noise_predictions_is_refused():
    with pytest.raises(InputError, match="predicting noise"):
        table("ddim").replace(conjugate=1.0)
    with pytest.raises(InputError, match="order 1"):
        table("deis-2").replace(conjugate=1.0)
