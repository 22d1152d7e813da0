"""FlowTurbo's pseudo corrector and DPM-Solver-2: second order, counted in evaluations of the model."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from stepwell.check.tolerance import rounding
from stepwell.rng import Rng
from stepwell.solver import grid
from stepwell.solver.integrate import History, Sampled, propose, sample
from stepwell.solver.path import Linear, path
from stepwell.solver.table import Table, table


def between(steps: int, start: float = 0.9, end: float = 0.1) -> list[float]:
    return [start + (end - start) * step / steps for step in range(steps + 1)]


def solved(mixture: Callable, solver: Table, steps: int) -> tuple[Sampled, float]:
    """What a solver returns between 0.9 and 0.1 on the linear path, and its mean error."""
    model, x = mixture(Linear()), 0.9 * Rng(0).normal(16, 2, dtype=torch.float64)
    drawn = sample(model.data, x, Linear(), between(steps), solver, Rng(0), output="data", partial=True)
    return drawn, float((drawn.final - model.solve(x, 0.9, 0.1)).abs().mean())


def test_it_is_heun_with_the_predictor_points_velocity_used_again(mixture: Callable):
    """States are the predictor points; what the next step starts from is the corrected state of FlowTurbo."""

    def velocity(x: Tensor, t: float) -> Tensor:
        return Linear().convert(mixture(Linear()).data(x, t), x, t, "data", "velocity")

    x = start = Rng(1).normal(5, 2, dtype=torch.float64)
    times, solver = grid.shifted(7, Linear()), table("pseudo-corrector")
    first, points = velocity(x, 1.0), [x]
    for time, target in itertools.pairwise(times):
        point = x + (target - time) * first
        points.append(point)
        if target > 0.0:
            second = velocity(point, target)
            x, first = x + (target - time) * 0.5 * (first + second), second
    drawn = sample(velocity, start, Linear(), times, solver, Rng(0))
    assert drawn.evaluations == 7
    for ours, theirs in zip(drawn.states, points, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-14)


def test_it_is_second_order_at_one_evaluation_a_step_and_better_than_heun_at_two(mixture: Callable):
    pseudo, coarse = solved(mixture, table("pseudo-corrector"), 160)
    _, fine = solved(mixture, table("pseudo-corrector"), 320)
    assert pseudo.evaluations == 160
    assert math.log2(coarse / fine) == pytest.approx(2, abs=0.15)
    heun, error_of_heun = solved(mixture, table("heun"), 80)
    euler, error_of_euler = solved(mixture, table("euler"), 160)
    assert heun.evaluations == euler.evaluations == 160
    assert coarse < error_of_euler / 10
    assert coarse < error_of_heun


def test_without_the_first_velocity_in_its_mean_it_is_of_first_order(mixture: Callable):
    planted = table("pseudo-corrector").replace(corrector_order=1)
    assert math.log2(solved(mixture, planted, 160)[1] / solved(mixture, planted, 320)[1]) < 1.2


def test_a_corrector_that_changes_nothing_makes_it_euler(mixture: Callable, monkeypatch):
    monkeypatch.setattr(History, "corrected", lambda self, x, newest: x)
    left, right = (solved(mixture, table(name), 40)[0].final for name in ("pseudo-corrector", "euler"))
    assert torch.equal(left, right)


def test_adams_in_time_with_a_corrector_has_a_higher_order(mixture: Callable):
    """The row is one of a family: order 2 with three predictions in its corrector is Adams-Bashforth-Moulton 3."""
    adams = table("pseudo-corrector").replace(order=2, corrector_order=3, lower_final=False)
    assert math.log2(solved(mixture, adams, 160)[1] / solved(mixture, adams, 320)[1]) > 2.6


@pytest.mark.parametrize("name", ["linear", "vp-linear", "ve"])
def test_dpm_solver_2_has_the_steps_of_its_paper(mixture: Callable, name: str):
    """u = (a_s1 / a_s) x - sigma_s1 (exp(h / 2) - 1) E, x' = (a' / a_s) x - sigma' (exp(h) - 1) E(u): eq. 4.1."""
    on, time, target = path(name), 0.6, 0.4
    x = Rng(2).normal(4, 2, dtype=torch.float64)

    def noise(x: Tensor, t: float) -> Tensor:
        return on.convert(mixture(on).data(x, t), x, t, "data", "noise")

    h = on.log_snr(target) - on.log_snr(time)
    middle = on.time(on.log_snr(time) + 0.5 * h)
    between = on.alpha(middle) / on.alpha(time) * x - on.sigma(middle) * math.expm1(0.5 * h) * noise(x, time)
    expected = on.alpha(target) / on.alpha(time) * x - on.sigma(target) * math.expm1(h) * noise(between, middle)
    distribution, _ = propose(noise, x, 0, [time, target, 0.2], on, table("dpm-2s"), output="noise")
    assert torch.allclose(distribution.sample(Rng(0)), expected, atol=1e-11 * float(x.abs().max() * on.sigma(time)))


def test_dpm_solver_2_agrees_with_diffusers(mixture: Callable):
    diffusers = pytest.importorskip("diffusers")
    on, settings = path("vp-linear", minimum=0.1, maximum=25.0), {"beta_schedule": "linear"}
    scheduler: Any = diffusers.DPMSolverSinglestepScheduler(
        **settings, solver_order=2, algorithm_type="dpmsolver", final_sigmas_type="sigma_min"
    )
    scheduler.set_timesteps(10)
    outer = [0.95, 0.8, 0.6, 0.4, 0.2]
    both = []
    for time, target in zip(outer, [*outer[1:], 0.1], strict=True):
        both += [time, on.time(0.5 * (on.log_snr(time) + on.log_snr(target)))]
    scheduler.sigmas = torch.tensor([math.exp(-on.log_snr(time)) for time in [*both, 0.1]], dtype=torch.float64)

    def noise(x: Tensor, t: float) -> Tensor:
        return on.convert(mixture(on).data(x, t), x, t, "data", "noise")

    states = [Rng(0).normal(16, 2, dtype=torch.float64)]
    for time, timestep in zip(both, scheduler.timesteps, strict=True):
        states.append(scheduler.step(noise(states[-1], time), timestep, states[-1], return_dict=False)[0])
    drawn = sample(noise, states[0], on, [*outer, 0.1], table("dpm-2s"), Rng(0), output="noise", partial=True)
    gap = max(float((a - b).abs().max()) for a, b in zip(drawn.states, states[::2], strict=True))
    print(f"parity: {gap:.1e}")  # shown by pytest -s
    assert gap < rounding(torch.float32, 100)
