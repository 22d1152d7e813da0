"""The integrator: convergence orders on an exact mixture, special cases that coincide, and mistakes that show."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.integrate import quad

from stepwell.distributions import Gaussian, Point
from stepwell.errors import InputError
from stepwell.rng import Rng
from stepwell.solver import exponential, grid
from stepwell.solver.exponential import coefficients, moments
from stepwell.solver.integrate import History, propose, sample
from stepwell.solver.path import PATHS, Linear, path
from stepwell.solver.table import TABLES, Table, table

START, END = 0.9, 0.1


def times_between(on, steps: int) -> list[float]:
    """Times from START to END that are equally spaced in lambda."""
    first, last = on.log_snr(START), on.log_snr(END)
    return [on.time(first + (last - first) * step / steps) for step in range(steps + 1)]


def errors(mixture, solver: Table, on, steps: list[int], seeded: bool = False) -> list[float]:
    """Mean errors at END; `seeded`: the history before START is exact, so that no step is of a lower order."""
    model = mixture(on)
    x = on.sigma(START) * Rng(0).normal(16, 2, dtype=torch.float64)
    exact, answers = model.solve(x, START, END), []
    for count in steps:
        times, history = times_between(on, count), None
        if seeded:
            h = (on.log_snr(END) - on.log_snr(START)) / count
            earlier = [on.time(on.log_snr(START) - h * place) for place in range(1, solver.order)]
            states = [model.solve(x, START, time, 200) for time in earlier]
            known = [model.data(state, time) for state, time in zip(states, earlier, strict=True)]
            kinds = [on.convert(*row, "data", solver.predicts) for row in zip(known, states, earlier, strict=True)]
            history = History(tuple(earlier), tuple(kinds))
        settings = {"output": "data", "history": history, "partial": True}
        found = sample(model.data, x, on, times, solver.replace(lower_final=False), Rng(0), **settings).final
        answers.append(float((found - exact).abs().mean()))
    return answers


def order(found: list[float]) -> float:
    return math.log2(found[-2] / found[-1])


ORDERS = {
    "euler": 1,
    "heun": 2,
    "pseudo-corrector": 2,
    "ddim": 1,
    "dpmpp-1": 1,
    "dpmpp-2m": 2,
    "dpmpp-2m-heun": 2,
    "dpmpp-2s": 2,
    "dpmpp-3m-published": 2,
    "dpm-2s": 2,
    "deis-2": 2,
    "unipc-2": 3,
    "unipc-2-bh1": 3,
    "adams-pc-2": 3,
}
HIGHER = ["unipc-3", "unipc-3-bh1", "adams-pc-3", "adams-pc-4"]
SEEDED_ORDERS = {"dpmpp-3m": 3, "dpmpp-3m-published": 2, "deis-3": 3}


@pytest.mark.parametrize("name", ORDERS)
def test_deterministic_solvers_converge_at_their_order(mixture: Callable, name: str):
    assert order(errors(mixture, table(name), Linear(), [160, 320])) == pytest.approx(ORDERS[name], abs=0.15)


@pytest.mark.parametrize("name", SEEDED_ORDERS)
def test_third_order_shows_once_the_history_is_exact(mixture: Callable, name: str):
    found = errors(mixture, table(name), Linear(), [160, 320], seeded=True)
    assert order(found) == pytest.approx(SEEDED_ORDERS[name], abs=0.15)


def test_every_deterministic_table_has_its_order_tested():
    deterministic = {name for name, row in TABLES.items() if not row.stochastic}
    assert deterministic - set(ORDERS) - set(SEEDED_ORDERS) == set(HIGHER)  # tested below


@pytest.mark.parametrize("name", HIGHER)
def test_correctors_of_three_predictions_and_more_are_third_order_from_a_cold_start(mixture: Callable, name: str):
    assert order(errors(mixture, table(name), Linear(), [80, 160])) > 2.85


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize(
    "solver", ["dpmpp-2m", *(pytest.param(name, marks=pytest.mark.slow) for name in ("deis-2", "heun"))]
)
def test_the_order_does_not_depend_on_the_path(mixture: Callable, name: str, solver: str):
    on = path("ve", maximum=3.0) if name == "ve" else path(name)
    assert order(errors(mixture, table(solver), on, [160, 320])) == pytest.approx(2, abs=0.2)


def test_a_wrong_second_weight_lowers_the_order(mixture: Callable, monkeypatch):
    def planted(count: int, z: float, rule: str = "exact") -> list[float]:
        values = moments(count, z, rule)
        return [values[0], *(0.9 * value for value in values[1:])]

    monkeypatch.setattr(exponential, "moments", planted)
    exponential._coefficients.cache_clear()
    try:
        assert order(errors(mixture, table("dpmpp-2m"), Linear(), [160, 320])) < 1.3
    finally:
        exponential._coefficients.cache_clear()


@pytest.mark.parametrize("z", [-3.0, -0.4, 1e-6, 0.3, 0.999, 1.001, 8.0])
def test_moments_are_integrals_of_the_kernel(z: float):
    for power, found in enumerate(moments(4, z)):
        exact = quad(lambda v, i=power: z * math.exp(-z * (1 - v)) * v**i, 0, 1, epsabs=1e-14)[0]
        assert found == pytest.approx(exact, rel=1e-11)


def test_interpolation_is_exact_for_polynomials_in_lambda():
    on, times, target = Linear(), (0.5, 0.6, 0.75), 0.3
    start, end = on.log_snr(0.5), on.log_snr(target)
    for power in range(3):
        row = coefficients(on, table("dpmpp-3m"), times, target)
        values = [(on.log_snr(time) - start) ** power for time in times]
        kernel = quad(lambda u, i=power: math.exp(-(end - start - u)) * u**i, 0, end - start)[0]
        assert np.dot(row.weights, values) == pytest.approx(on.alpha(target) * kernel, rel=1e-10)


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("solver", [name for name, row in TABLES.items() if row.predicts != "velocity"])
def test_a_step_keeps_the_law_of_a_known_image(name: str, solver: str):
    """If x_0 is known, x' has mean alpha' x_0 + (what is kept) e: no table mixes up data and noise."""
    on, row = path(name), table(solver)
    for time, target in itertools.pairwise([0.8, 0.5, 0.2]):
        numbers = coefficients(on, row, (time,), target)
        data = numbers.state * on.alpha(time) + numbers.weights[0]
        variance = (numbers.state * on.sigma(time)) ** 2 + numbers.noise**2
        assert data == pytest.approx(on.alpha(target), rel=1e-12)
        assert variance == pytest.approx(on.sigma(target) ** 2, rel=1e-12)


def test_euler_on_the_linear_path_is_ddim_is_exponential_euler_is_first_order_dpmpp():
    for time, target in itertools.pairwise(grid.uniform(7, Linear())):
        x, data = Rng(1).normal(2, 3, 2, dtype=torch.float64)
        velocity = Linear().convert(data, x, time, "data", "velocity")
        euler = coefficients(Linear(), table("euler"), (time,), target).mean(x, (velocity,))
        ddim = coefficients(Linear(), table("ddim"), (time,), target).mean(x, (data,))
        alpha, sigma = Linear().alpha(target), Linear().sigma(target)
        assert torch.allclose(euler, ddim, atol=1e-14)
        assert torch.allclose(ddim, alpha * data + sigma * Linear().convert(data, x, time, "data", "noise"), atol=1e-14)
        assert coefficients(Linear(), table("dpmpp-1"), (time,), target).weights == pytest.approx(
            coefficients(Linear(), table("ddim"), (time,), target).weights
        )


@pytest.mark.parametrize("name", TABLES)
def test_every_table_goes_from_noise_to_no_noise_and_counts_its_evaluations(mixture: Callable, name: str):
    calls = []

    def model(x, t):
        calls.append(t)
        return mixture(Linear()).data(x, t)

    times = grid.shifted(12, Linear())
    drawn = sample(
        model, Rng(2).normal(64, 2, dtype=torch.float64), Linear(), times, table(name), Rng(3), output="data"
    )
    assert drawn.evaluations == len(calls)
    skipped = {"heun": 1, "dpmpp-2s": 2, "dpm-2s": 2}.get(name, 0)  # no inner prediction where lambda is infinite
    assert len(calls) == 12 * table(name).evaluations - skipped
    assert len(drawn.states) == 13
    assert bool(torch.isfinite(drawn.final).all())
    assert min(calls) > 0.0
    assert bool(((drawn.log_prob == 0).all(0) == ~drawn.random).all())


@pytest.mark.parametrize("name", ["unipc-3", "deis-3", "sde-dpmpp-2m", "dpmpp-2s", "sde-euler"])
def test_a_fork_goes_on_as_the_original(mixture: Callable, name: str):
    times, model = grid.shifted(6, Linear()), mixture(Linear()).data
    x, history = Rng(4).normal(3, 2, dtype=torch.float64), None
    for step in range(3):
        distribution, history = propose(model, x, step, times, Linear(), table(name), history, output="data")
        x = distribution.sample(Rng(step))
    index = torch.tensor([2, 0, 2])
    distribution, _ = propose(model, x, 3, times, Linear(), table(name), history, output="data")
    forked, _ = propose(model, x[index], 3, times, Linear(), table(name), history[index], output="data")
    assert type(distribution) is type(forked)
    assert type(distribution) is (Gaussian if table(name).stochastic else Point)
    assert torch.equal(distribution[index].sample(Rng(0)), forked.sample(Rng(0)))


def test_every_kind_of_output_gives_the_same_trajectory(mixture: Callable):
    on = path("vp-linear")
    for name, output in itertools.product(["dpmpp-2m", "deis-3", "heun"], ["noise", "score", "velocity"]):

        def model(x, t, output=output):
            return on.convert(mixture(on).data(x, t), x, t, "data", output)

        x, times = Rng(5).normal(4, 2, dtype=torch.float64), grid.karras(8, on)
        one = sample(mixture(on).data, x, on, times, table(name), Rng(0), output="data").final
        other = sample(model, x, on, times, table(name), Rng(0), output=output).final
        assert torch.allclose(one, other, atol=1e-8)


def test_a_window_draws_noise_only_inside_it(mixture: Callable):
    solver, times = table("sde-euler").replace(window=(0.3, 0.6)), grid.uniform(10, Linear())
    drawn = sample(mixture(Linear()).data, torch.ones(2, 2), Linear(), times, solver, Rng(0), output="data")
    assert [times[step] for step in range(10) if drawn.random[step]] == pytest.approx([0.6, 0.5, 0.4, 0.3])


def test_bad_input_is_refused_in_one_sentence(mixture: Callable):
    x, on, euler = torch.ones(2, 2), Linear(), table("euler")
    with pytest.raises(InputError, match="must end at 0"):
        sample(mixture(on).data, x, on, [1.0, 0.5], euler, Rng(0), output="data")
    with pytest.raises(InputError, match=r"must return a prediction of its states' shape, \(2, 2\), got \(2,\)"):
        sample(lambda x, t: x[:, 0], x, on, [1.0, 0.0], euler, Rng(0))
    with pytest.raises(InputError, match="NaN"):
        sample(lambda x, t: x / 0, x, on, [1.0, 0.0], euler, Rng(0))
    with pytest.raises(InputError, match="linear path"):
        sample(lambda x, t: x, x, path("ve"), [1.0, 0.0], table("sde-euler"), Rng(0))
    with pytest.raises(InputError, match="nothing of the data is left"):
        sample(lambda x, t: x, x, on, [1.0, 0.0], euler, Rng(0), output="noise")
    with pytest.raises(InputError, match="must fall"):
        sample(lambda x, t: x, x, on, [0.0, 1.0], euler, Rng(0))
