"""Restart on Gaussian data: every step and jump is affine, so marginals and error contraction are exact."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from stepwell.distributions import Gaussian
from stepwell.errors import InputError
from stepwell.rng import Rng
from stepwell.solver import grid, integrate, restart
from stepwell.solver.path import PATHS, Linear, Path, path
from stepwell.solver.restart import Restart, Segment, plan, renoised
from stepwell.solver.table import table

MEAN, VARIANCE = 0.7, 0.3


def marginal(on: Path, t: float) -> float:
    """The standard deviation of x_t."""
    return math.sqrt(on.alpha(t) ** 2 * VARIANCE + on.sigma(t) ** 2)


def exact(on: Path) -> Callable[[Tensor, float], Tensor]:
    def data(x: Tensor, t: float) -> Tensor:
        alpha = on.alpha(t)
        return MEAN + alpha * VARIANCE / marginal(on, t) ** 2 * (x - alpha * MEAN)

    return data


class Columns(Rng):
    """Noise that is 1 in row k at the k-th draw and 0 elsewhere, so that rows are the effects of single draws."""

    drawn = 0

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        self.drawn += 1
        noise = torch.zeros(shape, dtype=torch.float64)
        noise[self.drawn + 1] = 1.0
        return noise


def moments(on: Path, segments: tuple[Segment, ...], solver: str = "heun", model=None) -> tuple[float, float]:
    """The exact mean and variance of the samples."""
    x = torch.zeros(2 + len(segments), 1, dtype=torch.float64)
    x[1] = on.sigma(segments[0].times[0])
    drawn = restart.sample(model or exact(on), x, on, segments, table(solver), Columns(0), output="data")
    final = drawn.final[:, 0]
    return float(final[0]), float(((final - final[0]) ** 2).sum())


def refined(steps: int, repeats: int) -> tuple[Segment, ...]:
    """The uniform grid with two intervals of restarts whose steps grow along."""
    times = grid.uniform(20 * steps, Linear())
    lower = [min(times, key=lambda time: abs(time - wanted)) for wanted in (0.5, 0.1)]
    restarts = [Restart(lower[0], 0.8, repeats, 5 * steps), Restart(lower[1], 0.3, repeats, 5 * steps)]
    return plan(times, restarts, Linear())


@pytest.mark.parametrize("name", ["heun", "dpmpp-2m", "unipc-3", "pseudo-corrector", "ddpm"])
def test_without_repeats_it_is_the_solver_bit_for_bit(mixture: Callable, name: str):
    times, x = grid.shifted(9, Linear()), Rng(0).normal(6, 2, dtype=torch.float64)
    segments = plan(times, [Restart(times[5], 0.9, 0, 3)], Linear())
    assert segments == (Segment(times),)
    model = mixture(Linear()).data
    ours = restart.sample(model, x, Linear(), segments, table(name), Rng(1), output="data")
    plain = integrate.sample(model, x, Linear(), times, table(name), Rng(1), output="data")
    assert all(torch.equal(a, b) for a, b in zip(ours.states, plain.states, strict=True))
    assert torch.equal(ours.log_prob, plain.log_prob)
    assert ours.evaluations == plain.evaluations


@pytest.mark.parametrize("name", PATHS)
def test_a_jump_is_the_forward_process_on_every_path(name: str):
    """It takes the marginal of any data to the marginal, and two jumps make one."""
    on = path(name)
    for low, middle, high in [(0.1, 0.4, 0.9), (0.3, 0.5, 0.6)]:
        one = torch.ones(1, 1, dtype=torch.float64)
        jump = renoised(on, one, low, high)
        spread = float(jump.standard_deviation)
        assert float(jump.mean) * on.alpha(low) == pytest.approx(on.alpha(high), rel=1e-12)
        variance = float(jump.mean) ** 2 * marginal(on, low) ** 2 + spread**2
        assert variance == pytest.approx(marginal(on, high) ** 2, rel=1e-12)
        first, second = renoised(on, one, low, middle), renoised(on, one, middle, high)
        both = (float(second.mean) * float(first.standard_deviation)) ** 2 + float(second.standard_deviation) ** 2
        assert both == pytest.approx(spread**2, rel=1e-12)


@pytest.mark.parametrize("repeats", [1, 4])
def test_restarts_keep_the_marginal_at_the_solvers_order(repeats: int):
    errors = [moments(Linear(), refined(steps, repeats))[1] - VARIANCE for steps in (4, 8, 16)]
    assert abs(errors[-1]) < 2e-4
    for coarse, fine in itertools.pairwise(errors):
        assert math.log2(abs(coarse / fine)) == pytest.approx(2, abs=0.4)
    assert moments(Linear(), refined(4, repeats))[0] == pytest.approx(MEAN, abs=1e-12)


def test_the_planted_jump_of_the_variance_exploding_path_is_seen(monkeypatch):
    """x + sqrt(t_max^2 - t_min^2) z is right where alpha is 1 and wrong elsewhere."""

    def planted(on: Path, x: Tensor, time: float, target: float) -> Gaussian:
        return Gaussian(x, x.new_tensor(math.sqrt(on.sigma(target) ** 2 - on.sigma(time) ** 2)), trained=False)

    jump, spread = planted(path("ve"), torch.ones(1, 1), 0.1, 0.3), renoised(path("ve"), torch.ones(1, 1), 0.1, 0.3)
    assert torch.equal(jump.mean, spread.mean)
    assert torch.equal(jump.standard_deviation, spread.standard_deviation)
    monkeypatch.setattr(restart, "renoised", planted)
    assert abs(moments(Linear(), refined(8, 2))[1] - VARIANCE) > 0.02


def test_an_error_made_before_the_interval_shrinks_by_the_known_factor_at_each_restart():
    """Up multiplies it by alpha(u) / alpha(l), down by the ratio of the marginals: together less than 1."""
    lower, upper, errors = 0.25, 0.75, []

    def wrong(x: Tensor, t: float) -> Tensor:
        data = exact(Linear())(x, t)
        return data + 1.0 if t > upper else data

    for repeats in range(4):
        segments = plan(grid.uniform(400, Linear()), [Restart(lower, upper, repeats, 200)], Linear())
        errors.append(moments(Linear(), segments, model=wrong)[0] - MEAN)
    factor = Linear().alpha(upper) / Linear().alpha(lower)
    factor *= marginal(Linear(), lower) / marginal(Linear(), upper)
    assert factor < 0.3
    assert abs(errors[0]) > 0.1
    for before, after in itertools.pairwise(errors):
        assert after / before == pytest.approx(factor, rel=0.01)


def test_evaluations_states_and_draws_are_counted(mixture: Callable):
    times, calls = (1.0, 0.6, 0.3, 0.0), []

    def model(x: Tensor, t: float) -> Tensor:
        calls.append(t)
        return mixture(Linear()).data(x, t)

    segments = plan(times, [Restart(0.3, 0.5, 2, 2)], Linear())
    drawn = restart.sample(model, torch.zeros(3, 2), Linear(), segments, table("ddim"), Rng(0), output="data")
    assert drawn.evaluations == len(calls) == 2 + 2 + 2 + 1
    assert len(drawn.states) == 1 + 7 + 2
    assert drawn.random.tolist() == [False, False, True, False, False, True, False, False, False]
    assert bool(((drawn.log_prob == 0.0).all(0) == ~drawn.random).all())
    assert calls[2] == calls[4] == 0.5
    assert calls[-1] == 0.3


@pytest.mark.parametrize("name", ["dpmpp-2m", "unipc-3", "sa-solver-3"])
def test_up_to_the_first_jump_it_is_the_plain_solver_bit_for_bit(mixture: Callable, name: str):
    """`lower_final` is for the end at the data: steps before a jump use as many predictions as they have."""
    times, model, x = grid.shifted(8, Linear()), mixture(Linear()).data, Rng(0).normal(6, 2, dtype=torch.float64)
    segments = plan(times, [Restart(times[5], 0.9, 2, 3)], Linear())
    ours = restart.sample(model, x, Linear(), segments, table(name), Rng(1), output="data")
    plain = integrate.sample(model, x, Linear(), times, table(name), Rng(1), output="data")
    assert all(torch.equal(a, b) for a, b in zip(ours.states[:6], plain.states[:6], strict=True))


def test_what_makes_no_plan_is_refused():
    times = grid.uniform(4, Linear())
    with pytest.raises(InputError, match=r"0\.25 is nearest"):
        plan(times, [Restart(0.3, 0.5, 1, 1)], Linear())
    with pytest.raises(InputError, match="0 < lower < upper <= 1, got"):
        Restart(0.5, 0.3, 1, 1)
    with pytest.raises(InputError, match="steps at least 1"):
        Restart(0.3, 0.5, 1, 0)
    with pytest.raises(InputError, match="forget all"):
        plan(times, [Restart(0.25, 1.0, 1, 1)], Linear())
