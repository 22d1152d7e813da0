"""Stochastic solvers on Gaussian data: every step is affine, so the samples' moments are exact, without Monte Carlo."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from stepwell.rng import Rng
from stepwell.solver import grid, integrate
from stepwell.solver.exponential import Coefficients, coefficients
from stepwell.solver.integrate import sample
from stepwell.solver.path import PATHS, Linear, Path, path
from stepwell.solver.table import Table, table

MEAN, VARIANCE = 0.7, 0.3  # of the data


class Gauss:
    """Data N(0.7, 0.3) on a path; the prediction is affine: E[x_0 | x_t = x] = slope x + offset."""

    def __init__(self, on: Path):
        self.path = on

    def slope(self, t: float) -> float:
        alpha, sigma = self.path.alpha(t), self.path.sigma(t)
        return alpha * VARIANCE / (alpha**2 * VARIANCE + sigma**2)

    def data(self, x: Tensor, t: float) -> Tensor:
        return MEAN + self.slope(t) * (x - self.path.alpha(t) * MEAN)


class Columns(Rng):
    """Noise that is 1 in row k at the k-th draw and 0 elsewhere, so that rows are the effects of single draws."""

    drawn = 0

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        self.drawn += 1
        noise = torch.zeros(shape, dtype=torch.float64)
        noise[self.drawn + 1] = 1.0
        return noise


def moments(solver: Table, times: tuple[float, ...], on: Path) -> tuple[float, float]:
    """The exact mean and variance of the samples. Row 0 has no noise, row 1 the initial noise, row k + 1 draw k."""
    x = torch.zeros(len(times) + 2, 1, dtype=torch.float64)
    x[1] = on.sigma(times[0])
    final = sample(Gauss(on).data, x, on, times, solver, Columns(0), output="data").final[:, 0]
    return float(final[0]), float(((final - final[0]) ** 2).sum())


def order(solver: Table, on: Path, few: int, many: int) -> float:
    """The order at which the variance converges to that of the data."""
    first, second = (abs(moments(solver, grid.uniform(steps, on), on)[1] - VARIANCE) for steps in (few, many))
    return math.log(first / second) / math.log(many / few)


@pytest.mark.parametrize("name", ["ddim-eta", "ddpm", "sde-flow", "sde-dance", "sde-dpmpp-2m"])
def test_stochastic_solvers_keep_the_marginal_in_the_limit(name: str):
    few, many = (moments(table(name), grid.uniform(steps, Linear()), Linear()) for steps in (200, 800))
    for found, exact in zip(few, (MEAN, VARIANCE), strict=True):
        assert found == pytest.approx(exact, abs=0.02)
    for coarse, fine, exact in zip(few, many, (MEAN, VARIANCE), strict=True):
        assert abs(fine - exact) <= max(0.4 * abs(coarse - exact), 1e-12)  # 0.25 at order one


@pytest.mark.parametrize("name", sorted(set(PATHS) - {"ve"}))
def test_the_ancestral_step_converges_at_order_one_on_every_path(name: str):
    assert order(table("ddpm"), path(name), 300, 600) == pytest.approx(1.0, abs=0.25)


def test_the_samples_of_ode_solvers_have_the_law_of_the_data_too():
    found = moments(table("dpmpp-2m"), grid.uniform(400, Linear()), Linear())
    assert found == pytest.approx((MEAN, VARIANCE), abs=1e-3)


def test_the_planted_extra_noise_is_seen(monkeypatch):
    honest = integrate.coefficients

    def planted(*arguments):
        row = honest(*arguments)
        return Coefficients(row.state, row.weights, 1.2 * row.noise, row.predicts)

    monkeypatch.setattr(integrate, "coefficients", planted)
    assert moments(table("ddpm"), grid.uniform(200, Linear()), Linear())[1] - VARIANCE > 0.05


def step_by_step(solver: Table, steps: int) -> float:
    """The final variance of a solver of order one, by V' = c^2 V + q^2."""
    model, variance = Gauss(Linear()), 1.0
    for time, target in itertools.pairwise(grid.uniform(steps, Linear())):
        row = coefficients(Linear(), solver, (time,), target)
        slope = row.state + row.weights[0] * model.slope(time)
        variance = slope**2 * variance + row.noise**2
    return variance


def test_cps_does_not_converge_to_the_data_its_limit_is_the_published_bias():
    """The variance at level eta tends to (1 + cos(eta pi / 2)) / 2 times the data's: 0.7270 at 0.7."""
    limit = (1 + math.cos(0.35 * math.pi)) / 2
    assert limit == pytest.approx(0.7270, abs=1e-4)
    few, many = (step_by_step(table("cps"), steps) / VARIANCE for steps in (10_000, 20_000))
    assert many == pytest.approx(limit, abs=1e-3)
    assert abs(many - limit) < 0.7 * abs(few - limit)  # they still fall, by 0.62


@pytest.mark.parametrize("level", [0.7, 1.0])
@pytest.mark.parametrize("steps", [10, 1000])
def test_the_first_published_flow_sde_step_has_too_much_variance_and_the_corrected_one_has_not(level: float, steps):
    target = 1.0 - 1.0 / steps
    row = coefficients(Linear(), table("sde-euler-published").replace(level=level), (1.0,), target)
    assert row.state**2 + row.noise**2 == pytest.approx(1 + level**4 / 4, rel=1e-12)
    exact = coefficients(Linear(), table("sde-euler").replace(level=level), (1.0,), target)
    assert exact.state**2 + exact.noise**2 == pytest.approx(target**2, rel=1e-12)
    assert exact.noise == pytest.approx(level * target)


def test_flow_sde_in_stochastic_eulers_steps_misses_order_one_and_solved_exactly_has_it():
    """In step k the noise g^2 |dt| is a^2 / k on a uniform grid, so that Euler's error does not fall with 1 / n."""
    for name in ("sde-euler", "sde-euler-published"):
        few, many = (moments(table(name), grid.uniform(steps, Linear()), Linear())[1] for steps in (200, 800))
        assert abs(many - VARIANCE) > 0.4 * abs(few - VARIANCE)
    assert order(table("sde-flow"), Linear(), 200, 800) == pytest.approx(1.0, abs=0.05)


def test_flow_sde_solved_exactly_is_the_same_sde():
    """Over a short step both have the same coefficients, up to the square of the step."""
    gaps = []
    for step in (1e-3, 1e-4):
        exact = coefficients(Linear(), table("sde-flow"), (0.6,), 0.6 - step)
        euler = coefficients(Linear(), table("sde-euler"), (0.6,), 0.6 - step)  # of v = (x - D) / t
        state, weight = euler.state + euler.weights[0] / 0.6, -euler.weights[0] / 0.6
        gaps.append(abs(exact.state - state) + abs(exact.weights[0] - weight) + abs(exact.noise**2 - euler.noise**2))
    assert gaps[1] == pytest.approx(gaps[0] / 100, rel=0.05)


def test_flow_sde_has_the_means_and_noise_of_the_card():
    x, v, time, target, level = 0.3, -0.8, 0.6, 0.5, 0.7
    sigma = level * math.sqrt(time / (1 - time))
    mean = x * (1 + sigma**2 * (target - time) / (2 * time))
    mean += v * (1 + sigma**2 * (1 - time) / (2 * time)) * (target - time)
    row = coefficients(Linear(), table("sde-euler"), (time,), target)
    assert row.state * x + row.weights[0] * v == pytest.approx(mean, rel=1e-13)
    assert row.noise == pytest.approx(sigma * math.sqrt(time - target), rel=1e-13)


@pytest.mark.parametrize("name", PATHS)
def test_ancestral_is_eta_one_is_tau_one_is_the_posterior_of_the_forward_process(name: str):
    on, time, target = path(name), 0.7, 0.4
    ratio = on.alpha(time) / on.alpha(target)
    forward = on.sigma(time) ** 2 - ratio**2 * on.sigma(target) ** 2  # variance of x_t given x_t'
    ancestral = coefficients(on, table("ddpm"), (time,), target)
    assert ancestral.noise**2 == pytest.approx(on.sigma(target) ** 2 * forward / on.sigma(time) ** 2, rel=1e-10)
    assert ancestral.state == pytest.approx(ratio * on.sigma(target) ** 2 / on.sigma(time) ** 2, rel=1e-10)
    assert ancestral.weights[0] == pytest.approx(on.alpha(target) * forward / on.sigma(time) ** 2, rel=1e-10)
    sde = coefficients(on, table("sde-dpmpp-2m"), (time,), target)
    assert (sde.state, sde.noise) == pytest.approx((ancestral.state, ancestral.noise), rel=1e-10)


def test_cps_has_the_mean_and_noise_of_the_card():
    time, target, level = 0.6, 0.4, 0.7
    row = coefficients(Linear(), table("cps"), (time,), target)
    noise = target * math.sin(level * math.pi / 2)
    for x, data in ((1.0, 0.0), (0.0, 1.0)):
        mean = (1 - target) * data + math.sqrt(target**2 - noise**2) * (x - (1 - time) * data) / time
        assert row.state * x + row.weights[0] * data == pytest.approx(mean, rel=1e-13)
    assert row.noise == pytest.approx(noise, rel=1e-13)
