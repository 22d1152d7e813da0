"""Searches: each against the exhaustive answer where there is one, and its score against a known distribution."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import ClassVar

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.optimize import brentq, minimize
from scipy.stats import norm
from torch import Tensor

from stepwell.errors import InputError, UnknownName
from stepwell.rng import Rng
from stepwell.solver import grid
from stepwell.solver.integrate import sample
from stepwell.solver.path import PATHS, Linear, VarianceExploding, path
from stepwell.solver.schedule import Schedule
from stepwell.solver.search import optimal_steps as steps_module
from stepwell.solver.search.align import (
    PUBLISHED,
    align,
    align_on,
    estimate_costs,
    gaussian_cost,
    published,
)
from stepwell.solver.search.evolution import Space, exhaust
from stepwell.solver.search.optimal_steps import optimal_steps
from stepwell.solver.search.scores import (
    endpoint_error,
    gaussian_data,
    gaussian_distance,
    quantile_distance,
    sample_moments,
)
from stepwell.solver.table import table

ON = Linear()


# Scores


def test_the_law_of_samples_is_what_sampling_finds():
    """Within 4 standard errors, for a stochastic multistep solver with few steps, far from the data's distribution."""
    model, schedule = gaussian_data(ON, (0.7, -1.0), (0.3, 2.0)), Schedule.of(grid.uniform(5, ON), table("sa-solver-2"))
    mean, variance = sample_moments(schedule, model, ON, 2, output="data")
    drawn = schedule.sample(model, Rng(0).normal(40_000, 2, dtype=torch.float64), ON, Rng(1), output="data").final
    assert bool(((drawn.mean(0) - mean).abs() < 4 * (variance / 40_000).sqrt()).all())
    assert bool(((drawn.var(0) - variance).abs() < 4 * variance * math.sqrt(2 / 40_000)).all())
    assert bool(((variance - torch.tensor([0.3, 2.0])).abs() > 8 * variance * math.sqrt(2 / 40_000)).any())  # planted


def test_gaussian_distances_are_the_closed_forms_of_one_euler_step():
    """From pure noise one step goes to the mean: W2 is the data's deviation. In two steps V' = V (1-t)^2 / ..."""
    one = Schedule.of((1.0, 0.0), table("euler"))
    assert gaussian_distance(ON, (0.7,), (0.3,))(one) == pytest.approx(math.sqrt(0.3), rel=1e-12)
    two = Schedule.of((1.0, 0.5, 0.0), table("euler"))  # to x / 2 + m / 2, then D = m + s (x - m / 2)
    slope = 0.5 * 0.3 / (0.25 * 0.3 + 0.25)
    variance = (0.5 * slope) ** 2
    kl = 0.5 * (variance / 0.3 - 1 - math.log(variance / 0.3))
    assert gaussian_distance(ON, (0.7,), (0.3,), "kl")(two) == pytest.approx(kl, rel=1e-12)
    wide = gaussian_distance(ON, (0.7, 0.0), (0.3, 0.3), "kl")(two)
    assert wide == pytest.approx(2 * kl, rel=1e-12)
    with pytest.raises(UnknownName):
        gaussian_distance(ON, (0.7,), (0.3,), "fid")


def test_quantile_distance_agrees_with_the_gaussian_one_and_integrates_a_mixture():
    schedule, model = Schedule.of(grid.uniform(6, ON), table("euler")), gaussian_data(ON, (0.7,), (0.3,))

    def quantiles(levels: Tensor) -> Tensor:
        return 0.7 + math.sqrt(0.3) * torch.special.ndtri(levels)

    found = quantile_distance(model, ON, quantiles, 20_000, output="data")(schedule)
    # the midpoint rule loses the tails beyond 1 / 40000, which hold 1.2e-4 of a Gaussian's second moment
    assert found == pytest.approx(gaussian_distance(ON, (0.7,), (0.3,))(schedule), rel=2e-4)

    weights, means, spread = (0.3, 0.7), (-1.0, 0.5), 0.3

    def mixture(x: Tensor, t: float) -> Tensor:
        alpha, variance = 1 - t, (1 - t) ** 2 * spread**2 + t**2
        logs = torch.cat(
            [math.log(w) - (x - alpha * m) ** 2 / (2 * variance) for w, m in zip(weights, means, strict=True)], 1
        )
        parts = torch.cat([m + alpha * spread**2 / variance * (x - alpha * m) for m in means], 1)
        return (logs.softmax(1) * parts).sum(1, keepdim=True)

    def inverse(levels: Tensor) -> Tensor:
        def gap(value: float, level: float) -> float:
            return sum(w * norm.cdf(value, m, spread) for w, m in zip(weights, means, strict=True)) - level

        return torch.tensor([brentq(gap, -9, 9, args=(level,)) for level in levels.tolist()], dtype=torch.float64)

    score = quantile_distance(mixture, ON, inverse, 64, output="data")
    few, many = (score(Schedule.of(grid.uniform(steps, ON), table("euler"))) for steps in (100, 200))
    assert math.log2(few / many) == pytest.approx(1.0, abs=0.1)  # Euler's order: the limit is the distribution itself


def test_scores_refuse_what_cannot_be_paired(mixture: Callable):
    x, fine = torch.ones(2, 2), Schedule.of(grid.uniform(9, ON), table("heun"))
    score = endpoint_error(mixture(ON).data, ON, x, fine, output="data")
    assert score(fine) == 0.0
    with pytest.raises(InputError, match="draws noise"):
        score(Schedule.of(grid.uniform(3, ON), table("ddpm")))
    with pytest.raises(InputError, match=r"first time, 1, to start from the same noise, got 0\.9"):
        score(Schedule.of((0.9, 0.0), table("heun")))


# Optimal steps


def gauss(x: Tensor, t: float) -> Tensor:
    return gaussian_data(ON, (0.0,), (0.3,))(x, t)


def exact_path(times, x: Tensor) -> list[Tensor]:
    """The exact solution for N(0, 0.3) on the linear path: x sqrt((1 - t)^2 V + t^2)."""
    return [x * math.sqrt((1 - t) ** 2 * 0.3 + t**2) for t in times]


@pytest.mark.parametrize("steps", [2, 3, 4, 6])
@pytest.mark.parametrize("fine", [True, False])
def test_optimal_steps_are_the_best_of_all_on_one_dimensional_gaussian_data(steps: int, fine: bool):
    """Euler stays below the solution, which is convex, so that nearest now is nearest later."""
    times, x = grid.shifted(10, ON), torch.tensor([[1.0], [-0.3], [2.0]], dtype=torch.float64)
    teacher = None if fine else exact_path(times, x)
    found = optimal_steps(gauss, x, ON, times, steps, teacher=teacher, output="data")
    goal = sample(gauss, x, ON, times, table("euler"), Rng(0), output="data").final if fine else teacher[-1]
    score = endpoint_error(gauss, ON, x, goal, output="data")
    best = exhaust(Space(times, steps, (table("euler"),)), score)
    assert found.score == pytest.approx(best.score, rel=1e-10)
    assert found.score == pytest.approx(score(found.schedule), rel=1e-10)
    assert best.spent == math.comb(9, steps - 1)
    assert found.spent <= 1 + (steps - 1) * 9


def test_optimal_steps_with_states_of_another_step_count_are_not_optimal(monkeypatch):
    """Planted: a step that goes from the teacher's state, not from the student's own."""
    times, x = grid.shifted(10, ON), torch.ones(1, 1, dtype=torch.float64)
    teacher, honest = exact_path(times, x), steps_module.propose

    def planted(predict, state, step, pair, on, row, **settings):
        state = teacher[times.index(pair[0])]
        return honest(lambda at, time: gauss(state, time), state, step, pair, on, row, **settings)

    monkeypatch.setattr(steps_module, "propose", planted)
    found = optimal_steps(gauss, x, ON, times, 4, teacher=teacher, output="data")
    best = exhaust(Space(times, 4, (table("euler"),)), endpoint_error(gauss, ON, x, teacher[-1], output="data"))
    assert found.score != pytest.approx(best.score, rel=1e-3)


def test_optimal_steps_are_not_always_the_best_on_a_mixture_but_nearly(mixture: Callable):
    """The gap is real: keeping the nearest state only, the search misses the best grid in some of these ten cases."""
    model, times, ratios = mixture(ON).data, grid.uniform(9, ON), []
    for seed in range(10):
        x = Rng(seed).normal(4, 2, dtype=torch.float64)
        found = optimal_steps(model, x, ON, times, 4, output="data")
        goal = sample(model, x, ON, times, table("euler"), Rng(0), output="data").final
        score = endpoint_error(model, ON, x, goal, output="data")
        assert found.score == pytest.approx(score(found.schedule), rel=1e-10)
        ratios.append(found.score / exhaust(Space(times, 4, (table("euler"),)), score).score)
    assert min(ratios) > 1 - 1e-9
    assert max(ratios) > 1.01
    assert sorted(ratios)[5] < 1.1


def test_optimal_steps_take_any_solver_that_goes_from_a_state_alone(mixture: Callable):
    model, times, x = mixture(ON).data, grid.uniform(8, ON), Rng(0).normal(4, 2, dtype=torch.float64)
    for name in ("heun", "ddim", "dpmpp-2s"):
        found = optimal_steps(model, x, ON, times, 3, table(name), output="data")
        goal = sample(model, x, ON, times, table(name), Rng(0), output="data").final
        assert found.score == pytest.approx(endpoint_error(model, ON, x, goal, output="data")(found.schedule))
    for name in ("ddpm", "dpmpp-2m", "unipc-2"):
        with pytest.raises(InputError, match="depends on the state alone"):
            optimal_steps(model, x, ON, times, 3, table(name), output="data")
    with pytest.raises(InputError, match="must be 1 to 8, between 9 times, got 9"):
        optimal_steps(model, x, ON, times, 9, output="data")
    assert optimal_steps(model, x, ON, times, 8, output="data").schedule.times == times


# Align your steps


def test_the_gaussian_cost_is_the_integral():
    for start, end, variance in ((20.0, 3.0, 0.25), (0.5, 0.02, 1.7)):

        def integrand(u: float, start: float = start, variance: float = variance) -> float:
            return variance**2 * (1 / (variance + u**2) - 1 / (variance + start**2)) / u**3

        assert gaussian_cost([variance])(start, end) == pytest.approx(quad(integrand, end, start)[0], rel=1e-9)
        planted = quad(lambda u: u * integrand(u), end, start)[0]
        assert gaussian_cost([variance])(start, end) != pytest.approx(planted, rel=0.05)
    assert gaussian_cost([0.3, 2.0])(2.0, 1.0) == pytest.approx(
        gaussian_cost([0.3])(2.0, 1.0) + gaussian_cost([2.0])(2.0, 1.0)
    )


def total(cost, ratios) -> float:
    return math.fsum(cost(above, below) for above, below in itertools.pairwise(ratios))


@pytest.mark.parametrize("steps", [3, 8])
def test_aligned_steps_are_what_a_general_minimiser_finds(steps: int):
    cost, width = gaussian_cost([0.25, 4.0]), math.log(0.02 / 20.0)

    def objective(shares: np.ndarray) -> float:
        gaps = np.exp(np.append(shares, 0.0))
        places = np.concatenate([[0.0], np.cumsum(gaps / gaps.sum())])
        return total(cost, [20.0 * math.exp(width * place) for place in places])

    best = min(
        minimize(objective, start, method="BFGS").fun for start in np.random.default_rng(0).normal(size=(3, steps - 1))
    )
    found = align(cost, steps, 20.0, 0.02)
    assert found.bound == pytest.approx(best, rel=1e-6)
    assert found.bound == pytest.approx(total(cost, found.ratios), rel=1e-12)


def test_aligned_steps_beat_the_usual_ones_by_the_known_margins():
    """For N(0, 0.5^2), 8 steps from 20 to 0.02, in nats."""
    cost = gaussian_cost([0.25])
    uniform = [20.0 * (0.001) ** (place / 8) for place in range(9)]
    karras = [(20 ** (1 / 7) + place / 8 * (0.02 ** (1 / 7) - 20 ** (1 / 7))) ** 7 for place in range(9)]
    assert total(cost, uniform) == pytest.approx(4.25, abs=0.01)
    assert total(cost, karras) == pytest.approx(8.30, abs=0.01)
    assert align(cost, 8, 20.0, 0.02).bound == pytest.approx(1.726, abs=0.001)


def test_the_bound_bounds_the_divergence_of_what_the_sampler_draws():
    """KL(true || sampled) of the solver that freezes D, exactly, from the true distribution at the largest ratio."""
    variance, on = 0.25, VarianceExploding(20.0)
    cost, model = gaussian_cost([variance]), gaussian_data(on, (0.0,), (variance,))
    for ratios in ([20.0, 1.0, 0.1], align(cost, 8, 20.0, 0.02).ratios):
        rows = torch.zeros(len(ratios) + 1, 1, dtype=torch.float64)
        rows[1] = math.sqrt(variance + 400.0)

        class Draws(Rng):
            count: ClassVar[int] = 0

            def normal(self, *shape, dtype=None):
                type(self).count += 1
                noise = torch.zeros(shape, dtype=dtype)
                noise[self.count + 1] = 1.0
                return noise

        times = [ratio / 20.0 for ratio in ratios]
        solver = table("sde-dpmpp-2m").replace(order=1)
        final = sample(model, rows, on, times, solver, Draws(0), output="data", partial=True).final
        drawn, true = float(final[1:].square().sum()), variance + ratios[-1] ** 2
        assert 0.0 < 0.5 * (true / drawn - 1 - math.log(true / drawn)) < total(cost, ratios)


def test_dynamic_programming_finds_the_best_of_all_choices_of_ratios(monkeypatch):
    ratios = [20.0 * 0.001 ** (place / 9) for place in range(10)]
    cost = gaussian_cost([0.25])
    costs = torch.full((10, 10), math.inf, dtype=torch.float64)
    for i, j in itertools.combinations(range(10), 2):
        costs[i, j] = cost(ratios[i], ratios[j])
    for steps in (1, 3, 5, 9):
        choices = itertools.combinations(ratios[1:-1], steps - 1)
        best = min((total(cost, (ratios[0], *chosen, ratios[-1])), chosen) for chosen in choices)
        found = align_on(costs, ratios, steps)
        assert found.bound == pytest.approx(best[0], rel=1e-12)
        assert found.ratios == (ratios[0], *best[1], ratios[-1])
    greedy = align_on(costs**2, ratios, 5)  # planted: another cost has another answer
    assert total(cost, greedy.ratios) > best[0]
    with pytest.raises(InputError, match="costs must be"):
        align_on(costs, ratios, 10)


@pytest.mark.parametrize("name", ["linear", "vp-linear", "ve"])
def test_estimated_costs_are_the_closed_form_on_gaussian_data(name: str):
    """Within 4 standard errors over batches, on any path; the trapezoidal rule adds less than 0.2% on this grid."""
    on, ratios, data = path(name), [5.0 * 0.02 ** (place / 60) for place in range(61)], (0.25, 1.0)
    model, batches = gaussian_data(on, (0.0, 0.0), data), []
    for seed in range(12):
        clean = Rng(seed).normal(256, 2, dtype=torch.float64) * torch.tensor(data, dtype=torch.float64).sqrt()
        batches.append(estimate_costs(model, clean, on, ratios, Rng(100 + seed), output="data"))
    stacked, cost = torch.stack(batches), gaussian_cost(data)

    def agrees(cost) -> bool:
        return all(
            abs(float(stacked[:, i, j].mean()) - cost(ratios[i], ratios[j]))
            < 4 * float(stacked[:, i, j].std()) / math.sqrt(12) + 2e-3 * cost(ratios[i], ratios[j])
            for i, j in ((0, 20), (10, 40), (30, 60))
        )

    assert agrees(cost)
    assert not agrees(gaussian_cost((0.3, 1.0)))  # planted: other data
    assert bool((stacked.mean(0).isinf() == torch.ones(61, 61).tril().bool()).all())
    coarse = align_on(stacked.mean(0), ratios, 6)
    assert total(cost, coarse.ratios) < 1.05 * align(cost, 6, 5.0, ratios[-1]).bound


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_schedules_are_those_of_the_libraries(name: str):
    from diffusers.schedulers.scheduling_utils import AysSchedules

    key = {"stable-diffusion-1.5": "", "stable-diffusion-xl": "XL", "stable-video-diffusion": "Video"}[name]
    listed = AysSchedules[f"StableDiffusion{key}Sigmas"]
    on = VarianceExploding(listed[0])
    assert [on.sigma(time) for time in published(name, 10, on)] == pytest.approx(listed, rel=1e-12)
    twenty = [on.sigma(time) for time in published(name, 20, on)]
    assert twenty[:-1:2] == pytest.approx(listed[:-1], rel=1e-12)
    assert twenty[1] == pytest.approx(math.sqrt(listed[0] * listed[1]))  # the middle, in log
    assert twenty[-1] == 0.0
    linear = published("stable-diffusion-1.5", 7, Linear())
    assert len(linear) == 8
    with pytest.raises(UnknownName):
        published("flux", 10, on)


def test_aligned_steps_make_a_grid_on_every_path():
    found = align(gaussian_cost([0.25]), 5, 80.0, 0.02)
    for name in PATHS:
        times = found.grid(path(name))
        assert len(times) == 6
        assert times[-1] == 0.0
        assert math.exp(-path(name).log_snr(times[2])) == pytest.approx(found.ratios[2])
    with pytest.raises(InputError, match="0 < smallest < largest"):
        align(gaussian_cost([0.25]), 5, 0.02, 80.0)
    with pytest.raises(InputError, match="did not align"):
        align(gaussian_cost([0.25]), 8, 80.0, 0.02, sweeps=1)
