"""Parallel steps: the trajectory of one-by-one sampling, in fewer rounds, and within a bound that tolerance sets."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from stepwell.errors import InputError
from stepwell.rng import Rng
from stepwell.solver import grid, parallel
from stepwell.solver.exponential import coefficients
from stepwell.solver.integrate import sample
from stepwell.solver.parallel import sample_parallel
from stepwell.solver.path import Linear
from stepwell.solver.table import TABLES, table

ON, VARIANCE = Linear(), 0.3
SINGLE = [name for name, row in TABLES.items() if row.evaluations == 1]


def gauss(x: Tensor, t) -> Tensor:
    """The data prediction for N(0, 0.3), at float times and at tensors of them."""
    alpha, sigma = ON.alpha(t), ON.sigma(t)
    return alpha * VARIANCE / (alpha**2 * VARIANCE + sigma**2) * x


@pytest.mark.parametrize("name", SINGLE)
def test_at_tolerance_zero_the_result_is_the_sequential_one(name: str):
    times, x = grid.shifted(12, ON), Rng(0).normal(4, 3, dtype=torch.float64)
    one = sample(gauss, x, ON, times, table(name), Rng(1), output="data")
    for window in (1, 4, 12, 50):
        settings = {"window": window, "tolerance": 0.0, "output": "data"}
        found = sample_parallel(gauss, x, ON, times, table(name), Rng(1), **settings)
        for state, exact in zip(found.sampled.states, one.states, strict=True):
            assert torch.allclose(state, exact, rtol=1e-11, atol=1e-12)
        assert torch.allclose(found.sampled.log_prob, one.log_prob, atol=1e-8)
        assert found.sampled.random.tolist() == one.random.tolist()
        assert found.rounds <= 12 <= found.sampled.evaluations
        if window == 1:
            assert found.rounds == found.sampled.evaluations == 12


@pytest.mark.parametrize("name", ["euler", "sde-dance", "ddpm", "dpmpp-3m"])
def test_a_model_that_does_not_see_its_batch_gives_the_sequential_result_bit_for_bit(name: str):
    times, x = grid.uniform(9, ON), Rng(0).normal(4, 3)
    one = sample(lambda x, t: 0.3 * x, x, ON, times, table(name), Rng(1))
    found = sample_parallel(lambda x, t: 0.3 * x, x, ON, times, table(name), Rng(1), window=5, tolerance=0.0)
    assert torch.equal(found.final, one.final)
    assert torch.equal(found.sampled.log_prob, one.log_prob)


def test_a_prediction_at_the_wrong_time_shows(monkeypatch):
    honest = parallel._ask
    monkeypatch.setattr(parallel, "_ask", lambda predict, states, times: honest(predict, states, [*times][::-1]))
    times, x = grid.uniform(8, ON), Rng(0).normal(4, 3, dtype=torch.float64)
    found = sample_parallel(gauss, x, ON, times, table("euler"), Rng(0), window=4, tolerance=0.0, output="data")
    assert not torch.allclose(found.final, sample(gauss, x, ON, times, table("euler"), Rng(0), output="data").final)


@pytest.mark.parametrize("name", ["euler", "ddim", "ddpm"])
def test_the_error_is_within_the_bound_that_the_tolerance_sets(name: str):
    """An accepted guess has moved by at most tolerance times the ancestral noise s_j; a step of slope p_j then errs by
    |1 - p_j| tolerance s_j, and later steps multiply that by their slopes."""
    steps = 100
    times, row = grid.uniform(steps, ON), table(name)
    x = Rng(0).normal(8, 16, dtype=torch.float64)
    slopes, scales = [], [0.0]
    for time, target in itertools.pairwise(times):
        numbers = coefficients(ON, row, (time,), target)
        one = torch.ones(1, dtype=torch.float64)
        said = ON.convert(gauss(one, time), one, time, "data", numbers.predicts)
        slopes.append(numbers.state + numbers.weights[0] * float(said))
        scales.append(coefficients(ON, table("ddpm"), (time,), target).noise)
    exact = sample(gauss, x, ON, times, row, Rng(1), output="data").final
    later = [math.prod(abs(slope) for slope in slopes[step + 1 :]) for step in range(steps)]
    bound = sum(later[step] * abs(1 - slopes[step]) * scales[step] for step in range(steps))
    rounds, errors = [], []
    for tolerance in (0.3, 0.1, 0.01):
        settings = {"window": steps, "tolerance": tolerance, "output": "data"}
        found = sample_parallel(gauss, x, ON, times, row, Rng(1), **settings)
        errors.append(float((found.final - exact).square().mean(1).sqrt().max()))
        rounds.append(found.rounds)
        assert 0.0 < errors[-1] <= tolerance * bound
    assert rounds == sorted(rounds)
    assert rounds[-1] < steps / 2
    assert errors[0] > 0.01 * bound  # planted: a tolerance 30 times too large shows


def test_a_mixture_is_sampled_in_far_fewer_rounds_than_steps(mixture: Callable):
    model = mixture(ON)

    def predict(x: Tensor, t) -> Tensor:
        if isinstance(t, float):
            return model.data(x, t)
        rows = [model.data(x[row : row + 1], float(time)) for row, time in enumerate(t.flatten())]
        return torch.cat(rows)

    times, x = grid.uniform(60, ON), Rng(0).normal(2, 2, dtype=torch.float64)
    for name in ("euler", "ddpm"):
        one = sample(model.data, x, ON, times, table(name), Rng(1), output="data").final
        errors, rounds = [], []
        for tolerance in (0.1, 1e-4, 0.0):
            settings = {"window": 60, "tolerance": tolerance, "output": "data"}
            found = sample_parallel(predict, x, ON, times, table(name), Rng(1), **settings)
            errors.append(float((found.final - one).abs().max()))
            rounds.append(found.rounds)
        assert rounds == sorted(rounds)
        assert rounds[1] < 60 / 2
        assert errors[0] > errors[1] > errors[2]
        assert errors[2] < 1e-12


def test_bad_input_is_refused():
    x, times = torch.ones(2, 2), grid.uniform(4, ON)
    with pytest.raises(InputError, match="one evaluation a step, got 'heun', of 2"):
        sample_parallel(gauss, x, ON, times, table("heun"), Rng(0), window=2, tolerance=0.0)
    with pytest.raises(InputError, match="window must be at least 1"):
        sample_parallel(gauss, x, ON, times, table("euler"), Rng(0), window=0, tolerance=0.0)
    with pytest.raises(InputError, match="must end at 0"):
        sample_parallel(gauss, x, ON, times[:-1], table("euler"), Rng(0), window=2, tolerance=0.0)
    with pytest.raises(InputError, match=r"got \(4,\)"):
        sample_parallel(lambda x, t: x[:, 0], x, ON, times, table("euler"), Rng(0), window=2, tolerance=0.0)
