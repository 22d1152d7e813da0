"""DC-Solver: a ratio of 1 changes nothing, the interpolation is exact, and a fit on Gaussian data has no error left."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from stepwell.errors import InputError
from stepwell.rng import Rng
from stepwell.solver import compensation, grid, integrate
from stepwell.solver.integrate import History, propose, sample
from stepwell.solver.path import Linear
from stepwell.solver.table import Table, load, table

CENTRE = torch.tensor([1.0, 1.0], dtype=torch.float64)  # of the conditional data, N(CENTRE, 0.1)


def conditional(x: Tensor, t: float) -> Tensor:
    alpha = 1.0 - t
    return CENTRE + alpha * 0.1 / (alpha**2 * 0.1 + t**2) * (x - alpha * CENTRE)


def guided(mixture: Callable, scale: float) -> Callable[[Tensor, float], Tensor]:
    """Classifier-free guidance of the mixture towards one of its components."""

    def data(x: Tensor, t: float) -> Tensor:
        unconditional = mixture(Linear()).data(x, t)
        return unconditional + scale * (conditional(x, t) - unconditional)

    return data


@pytest.mark.parametrize("name", ["unipc-2", "unipc-3", "dpmpp-2m", "sa-solver-2"])
def test_ratios_of_one_are_the_plain_solver_bit_for_bit(mixture: Callable, name: str):
    times, x = grid.shifted(8, Linear()), Rng(0).normal(5, 2, dtype=torch.float64)
    ones = table(name).replace(compensation=(1.0,) * 8)
    settings = {"output": "data"}
    left = sample(mixture(Linear()).data, x, Linear(), times, ones, Rng(1), **settings).states
    right = sample(mixture(Linear()).data, x, Linear(), times, table(name), Rng(1), **settings).states
    assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def polynomial(t: float) -> Tensor:
    return torch.tensor([[1.0 + t, 2.0 - 3.0 * t**2, t * t]], dtype=torch.float64)


@pytest.mark.parametrize("ratio", [0.3, 0.9, 1.4])
def test_compensation_is_exact_for_quadratics_in_time(ratio: float):
    """The newest prediction becomes the one of the time r t + (1 - r) t_previous, and stays so in the history."""
    times, ddim = [0.9, 0.7, 0.4, 0.2, 0.1], table("ddim").replace(compensation=(1.0, 1.0, ratio, 1.0))
    x, history = torch.zeros(1, 3, dtype=torch.float64), None
    for step in range(3):
        distribution, history = propose(
            lambda _x, t: polynomial(t), x, step, times, Linear(), ddim, history, output="data"
        )
    moved = ratio * 0.4 + (1.0 - ratio) * 0.7
    assert torch.allclose(history.predictions[0], polynomial(moved), atol=1e-13)
    still = propose(lambda _x, _t: polynomial(moved), x, 0, times[2:], Linear(), table("ddim"), output="data")[0]
    assert torch.allclose(distribution.value, still.value, atol=1e-13)
    planted = polynomial((1.0 - ratio) * 0.4 + ratio * 0.7)  # the ratio counted from the other end
    assert not torch.allclose(history.predictions[0], planted, atol=1e-3)


@pytest.mark.parametrize("name", ["unipc-2", "dpmpp-2m"])
@pytest.mark.parametrize("steps", [5, 9])
def test_on_gaussian_data_one_number_a_step_leaves_no_error(name: str, steps: int):
    """States stay on the line through the mean and the start, so a ratio can put each where the reference is."""
    times = grid.uniform(steps, Linear())
    few, fresh = Rng(0).normal(10, 2, dtype=torch.float64), Rng(1).normal(50, 2, dtype=torch.float64)
    settings = {"output": "data"}
    known = compensation.trajectory(conditional, few, Linear(), times, table("ddim"), 50, **settings)
    fitted = compensation.fit(conditional, Linear(), times, table(name), known, **settings)
    exact = compensation.trajectory(conditional, fresh, Linear(), times, table("ddim"), 50, **settings)[-1]
    plain = sample(conditional, fresh, Linear(), times, table(name), Rng(0), **settings).final
    compensated = sample(conditional, fresh, Linear(), times, fitted, Rng(0), **settings).final
    print(f"{float((plain - exact).abs().max()):.1e} -> {float((compensated - exact).abs().max()):.1e}")
    assert float((plain - exact).abs().max()) > 3e-3
    assert float((compensated - exact).abs().max()) < 1e-7  # Brent's tolerance of 1e-8 in the ratio


def errors(mixture: Callable, scale: float, steps: int) -> tuple[Tensor, Tensor]:
    """Squared errors (N,) on fresh seeds, plain and compensated, of UniPC-2 fitted to 10 trajectories."""
    times, model = grid.uniform(steps, Linear()), guided(mixture, scale)
    few, fresh = Rng(0).normal(10, 2, dtype=torch.float64), Rng(1).normal(500, 2, dtype=torch.float64)
    settings = {"output": "data"}
    known = compensation.trajectory(model, few, Linear(), times, table("ddim"), 100, **settings)
    fitted = compensation.fit(model, Linear(), times, table("unipc-2"), known, **settings)
    exact = compensation.trajectory(model, fresh, Linear(), times, table("ddim"), 100, **settings)[-1]
    finals = [sample(model, fresh, Linear(), times, row, Rng(0), **settings) for row in (table("unipc-2"), fitted)]
    assert finals[0].evaluations == finals[1].evaluations == steps
    plain, compensated = ((drawn.final - exact).square().sum(1) for drawn in finals)
    return plain, compensated


@pytest.mark.parametrize("scale", [3.0, 7.5])
def test_under_guidance_a_fit_on_ten_trajectories_helps_on_fresh_seeds(mixture: Callable, scale: float):
    plain, compensated = errors(mixture, scale, 8)
    gain = plain - compensated
    print(f"{float(plain.mean()):.1e} -> {float(compensated.mean()):.1e}")
    assert float(gain.mean()) > 4 * float(gain.std()) / len(gain) ** 0.5


def test_no_step_that_is_fitted_is_worse_than_without(mixture: Callable):
    """Given the steps before it, each ratio brings its own corrected state closer to the reference, or is 1."""
    times, model = grid.uniform(6, Linear()), guided(mixture, 5.0)
    x, settings = Rng(0).normal(10, 2, dtype=torch.float64), {"output": "data"}
    known = compensation.trajectory(model, x, Linear(), times, table("ddim"), 50, **settings)
    fitted = compensation.fit(model, Linear(), times, table("unipc-2"), known, **settings)
    assert fitted.compensation[:3] == (1.0, 1.0, 1.0)  # nothing to interpolate through; t = 1 is not remembered
    assert 1.0 not in fitted.compensation[3:]
    for step in range(3, 6):
        gaps = []
        for ratio in (fitted.compensation[step], 1.0):
            ratios = (*fitted.compensation[:step], ratio, *(1.0,) * (5 - step))
            state, history = x, History()
            for place in range(step + 1):
                solver = table("unipc-2").replace(compensation=ratios)
                distribution, history = propose(model, state, place, times, Linear(), solver, history, **settings)
                state = distribution.sample(Rng(0))
            if step < 5:
                state = history.corrected(state, model(state, times[step + 1]))
            gaps.append(float((state - known[step + 1]).square().mean()))
        assert gaps[0] < gaps[1]


def ratio(guidance: float, steps: int, step: int) -> float:
    place = (step + 1) / steps
    return 0.9 + 0.01 * guidance * place - 0.02 * steps * place + 0.0004 * guidance**2 * steps**2 * place**2


def test_regression_finds_the_ratios_of_settings_that_were_not_fitted():
    known = {
        (guidance, steps): [1.0, 1.0, *(ratio(guidance, steps, step) for step in range(2, steps))]
        for guidance in (1.0, 4.0, 9.0)
        for steps in (6, 9, 15)
    }
    found = compensation.Regression.fit(known, degree=2).compensation(6.0, 12)
    assert found == pytest.approx([1.0, 1.0, *(ratio(6.0, 12, step) for step in range(2, 12))], rel=1e-7)
    assert compensation.Regression.fit(known, degree=1).compensation(6.0, 12) != pytest.approx(found, rel=1e-2)
    del known[(9.0, 15)]
    with pytest.raises(InputError, match="do not determine"):
        compensation.Regression.fit(known, degree=2)


def test_a_compensated_table_is_saved_and_refused_on_another_grid(tmp_path):
    mine = table("unipc-2").replace(name="mine", compensation=(1.0, 0.9, 1.1))
    mine.save(tmp_path / "solver.json")
    assert load(tmp_path / "solver.json") == mine
    with pytest.raises(InputError, match="must have 4 entries, one for each step of the grid, got 3"):
        sample(conditional, torch.zeros(1, 2), Linear(), grid.uniform(4, Linear()), mine, Rng(0), output="data")
    with pytest.raises(InputError, match="predict data"):
        Table("mine", predicts="velocity", compensation=(1.0,))
    with pytest.raises(InputError, match="draws noise"):
        compensation.fit(conditional, Linear(), (1.0, 0.0), table("ddpm"), [])
    with pytest.raises(InputError, match="must have 2 states"):
        compensation.fit(conditional, Linear(), (1.0, 0.0), table("unipc-2"), [])
    assert integrate.COMPENSATED == 3
