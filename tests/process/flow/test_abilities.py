"""Looking ahead, starting from given data and going back, by hand and in closed form on Gaussian data."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from stepwell.check import expectation
from stepwell.distributions import Gaussian, Point
from stepwell.errors import InputError
from stepwell.process.abilities import LookAhead, Renoising, StartsAt, ability
from stepwell.process.flow import process as module
from stepwell.process.flow.build import flow
from stepwell.process.flow.process import Flow
from stepwell.process.flow.state import FlowState
from stepwell.rng import Rng
from stepwell.solver.path import Path
from stepwell.solver.path import path as path_named
from stepwell.solver.schedule import Schedule
from stepwell.solver.tabulated import Tabulated

MEAN, DEVIATION = 0.7, 0.6
STEPS = 4
PATHS = ["linear", "vp-linear", "vp-cosine", "ve", "trigonometric"]


def on(path: str | Path, **settings) -> Flow:
    """A flow with the exact data prediction of N(MEAN, DEVIATION^2)."""
    path = path_named(path) if isinstance(path, str) else path

    def data(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = path.alpha(t), path.sigma(t)
        return MEAN + alpha * DEVIATION**2 / (alpha**2 * DEVIATION**2 + sigma**2) * (x - alpha * MEAN)

    settings = {"solver": "ddpm", "steps": STEPS, "dtype": torch.float64} | settings
    return flow(data, (1,), path=path, predicts="data", **settings)


def drawn_data(rng: Rng) -> Tensor:
    return MEAN + DEVIATION * rng.normal(1, 1, dtype=torch.float64)


def moments(program) -> tuple[float, float, float]:
    """Mean and variance of x, and its covariance with y, for program(rng) -> x, y: exact for affine programs."""

    def products(rng: Rng) -> tuple[Tensor, ...]:
        x, y = (value.reshape(()) for value in program(rng))
        return x, x**2, y, x * y

    x, square, y, product = (float(value) for value in expectation(products, normal_nodes=2))
    return x, square - x**2, product - x * y


def marginal(process: Flow, step: int) -> tuple[float, float]:
    """Mean and variance of alpha x_0 + sigma e at the time after so many steps."""
    time = process.sampler.times[step - 1]
    alpha, sigma = process.path.alpha(time), process.path.sigma(time)
    return alpha * MEAN, alpha**2 * DEVIATION**2 + sigma**2


# starting from data


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("step", range(1, STEPS + 1))
def test_data_noised_to_a_step_have_the_forward_processes_marginal(name, step):
    process = on(name)

    def program(rng):
        data = drawn_data(rng)
        state = process.start_at([None], data, step, rng)
        assert state.step == step
        return state.x, data

    mean, variance, covariance = moments(program)
    assert (mean, variance) == pytest.approx(marginal(process, step), abs=1e-12)
    assert covariance == pytest.approx(process.path.alpha(process.sampler.times[step - 1]) * DEVIATION**2, abs=1e-12)


@pytest.mark.parametrize("solver", ["ddpm", "sde-dpmpp-2m", "sa-solver-2", "dpmpp-2m", "unipc-2", "heun"])
def test_rows_started_from_data_go_on_as_the_solver_does_on_what_is_left_of_the_grid(solver):
    process = on("linear", solver=solver, steps=6)
    state = process.start_at([None] * 3, Rng(0).normal(3, 1, dtype=torch.float64), 3, Rng(1))
    rest = Schedule("rest", process.sampler.times[2:], process.sampler.tables[2:])
    predict = process.denoiser.predictor(None, 1.0)
    with torch.no_grad():
        expected = rest.sample(predict, state.x, process.path, Rng(2), output="data").states[1:]
    rng = Rng(2)
    for x in expected:
        state = process.advance(state, process.propose(state).sample(rng), rng)
        assert torch.equal(state.x, x)
    assert state.done.all()


def test_a_start_from_data_has_its_prompts_conditions_and_can_be_forked():
    process = small()
    data = Rng(0).normal(2, 3, dtype=torch.float64)
    state = process.start_at([1, 2], data, 2, Rng(1))
    assert state.condition["label"].tolist() == [1, 2]
    time = process.sampler.times[1]
    assert torch.allclose(state.x, (1 - time) * data + time * Rng(1).normal(2, 3, dtype=torch.float64), atol=1e-15)
    fork = state[torch.tensor([1, 1, 0])]
    assert torch.equal(fork.x, state.x[[1, 1, 0]])
    assert fork.condition["label"].tolist() == [2, 2, 1]
    assert torch.equal(process.start_at([1, 2], data, 2, Rng(1)).x, state.x), "the same seed gives the same states"


# going back


PAIRS = [*itertools.combinations(range(1, STEPS + 1), 2)]


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize(("step", "taken"), PAIRS)
def test_going_back_gives_the_marginal_of_the_earlier_step(name, step, taken):
    """And the covariance a Var[x_t] of the forward process, a = alpha_s / alpha_t: it is its joint distribution."""
    process = on(name)

    def program(rng):
        state = process.start_at([None], drawn_data(rng), taken, rng)
        back = process.renoise(state, step, rng)
        assert (back.step, len(back)) == (step, 1)
        return back.x, state.x

    mean, variance, covariance = moments(program)
    assert (mean, variance) == pytest.approx(marginal(process, step), abs=1e-10)
    ratio = process.path.alpha(process.sampler.times[step - 1]) / process.path.alpha(process.sampler.times[taken - 1])
    assert covariance == pytest.approx(ratio * marginal(process, taken)[1], abs=1e-10)


def test_going_back_has_the_marginal_on_a_path_of_stable_diffusions_kind():
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    process = on(Tabulated(tuple((1 - betas).cumprod(0).tolist())))

    def program(rng):
        state = process.start_at([None], drawn_data(rng), 4, rng)
        return process.renoise(state, 2, rng).x, state.x

    assert moments(program)[:2] == pytest.approx(marginal(process, 2), abs=1e-12)


@pytest.mark.parametrize("name", PATHS)
def test_given_the_state_going_back_has_the_mean_and_variance_of_the_formula(name):
    process = on(name)
    x = torch.tensor([[1.3]], dtype=torch.float64)
    state = FlowState(x, 3, STEPS, None)
    t, s = process.sampler.times[2], process.sampler.times[0]
    alpha, sigma = process.path.alpha, process.path.sigma
    a = alpha(s) / alpha(t)
    mean, variance, _ = moments(lambda rng: (process.renoise(state, 1, rng).x, x))
    assert (mean, variance) == pytest.approx((1.3 * a, sigma(s) ** 2 - a**2 * sigma(t) ** 2), abs=1e-10)


def test_two_ways_back_are_one():
    """The forward process is Markov: from step 4 over 3 to 1 as from 4 to 1."""
    process = on("linear", times=(0.95, 0.7, 0.5, 0.2, 0.0))
    state = FlowState(torch.tensor([[1.3]], dtype=torch.float64), 4, STEPS, None)
    straight = moments(lambda rng: (process.renoise(state, 1, rng).x, state.x))
    over = moments(lambda rng: (process.renoise(process.renoise(state, 3, rng), 1, rng).x, state.x))
    assert over == pytest.approx(straight, abs=1e-12)


def test_a_planted_way_back_that_does_not_shrink_the_old_noise_is_off(monkeypatch):
    """With b^2 = sigma_s^2 - sigma_t^2 the marginal has a variance that is wrong by (a^2 - 1) sigma_t^2."""

    def planted(path, x, time, target):
        scale = math.sqrt(path.sigma(target) ** 2 - path.sigma(time) ** 2)
        return Gaussian(path.alpha(target) / path.alpha(time) * x, x.new_tensor(scale), trained=False)

    process = on("linear", times=(0.95, 0.7, 0.5, 0.2, 0.0))

    def program(rng):
        state = process.start_at([None], drawn_data(rng), 3, rng)
        with monkeypatch.context() as patch:
            patch.setattr(module, "renoised", planted)
            return process.renoise(state, 2, rng).x, state.x

    ratio, sigma = (1 - 0.7) / (1 - 0.5), 0.5
    off = moments(program)[1] - marginal(process, 2)[1]
    assert off == pytest.approx((ratio**2 - 1) * sigma**2, abs=1e-12)


@pytest.mark.parametrize("solver", ["sde-dpmpp-2m", "sa-solver-2", "unipc-2"])
def test_a_solver_that_remembers_begins_anew_after_going_back(solver):
    process = on("linear", solver=solver, steps=6)
    state, rng = process.start([None] * 2, Rng(0)), Rng(0)
    for _ in range(4):
        state = process.advance(state, process.propose(state).sample(rng), rng)
    assert state.history is not None
    back = process.renoise(state, 2, rng)
    assert back.history is None
    fresh = FlowState(back.x, 2, back.last, None)
    for _ in range(2):
        distribution, expected = process.propose(back), process.propose(fresh)
        for one, other in zip(numbers(distribution), numbers(expected), strict=True):
            assert torch.equal(one, other)
        back, fresh = (process.advance(each, numbers(distribution)[0], Rng(0)) for each in (back, fresh))


def numbers(distribution: Gaussian | Point) -> tuple[Tensor, ...]:
    if isinstance(distribution, Gaussian):
        return distribution.mean, distribution.standard_deviation
    return (distribution.value,)


# looking ahead


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3, dtype=torch.float64)
        self.names = nn.Embedding(4, 3, dtype=torch.float64)
        for place, parameter in enumerate(self.parameters()):
            parameter.data.copy_(Rng(1).split(place).normal(*parameter.shape, dtype=torch.float64))

    def forward(self, x: Tensor, time: Tensor, label: Tensor) -> Tensor:
        return (self.layer(torch.cat([x, time[:, None]], 1)) + self.names(label)).tanh()


def small(**settings) -> Flow:
    return flow(Net(), (3,), **{"solver": "sde-flow", "steps": STEPS, "encode": "label"} | settings)


def walked(process: Flow, steps: int, count: int = 3) -> FlowState:
    state, rng = process.start([0] * count, Rng(0)), Rng(0)
    for _ in range(steps):
        state = process.advance(state, process.propose(state).sample(rng), rng)
    return state


@pytest.mark.parametrize("name", PATHS)
def test_looking_ahead_is_the_posterior_mean_of_gaussian_data(name):
    process = on(name, decode=lambda x: 10.0 * x)
    state = FlowState(torch.tensor([[1.3], [-0.4]], dtype=torch.float64), 3, STEPS, None)
    alpha, sigma = (part(process.sampler.times[2]) for part in (process.path.alpha, process.path.sigma))
    gain = alpha * DEVIATION**2 / (alpha**2 * DEVIATION**2 + sigma**2)
    expected = [10.0 * (MEAN + gain * (float(x) - alpha * MEAN)) for x in state.x]
    assert [float(value) for value in process.look_ahead(state).values] == pytest.approx(expected, abs=1e-12)


def test_looking_ahead_costs_an_evaluation_a_row_and_changes_nothing():
    for process, each in ((small(), 1), (small(guidance=2.0, unconditional={"label": torch.tensor([3])}), 2)):
        state = walked(process, 2)
        kept, before = state.x.clone(), process.meter.spent
        values = process.look_ahead(state).values
        spent = process.meter.spent - before
        assert (spent.model_evaluations, spent.backward) == (3 * each, 0)
        assert torch.equal(state.x, kept)
        assert not values[0].requires_grad
        with torch.no_grad():
            expected = process.decoded(process.data_prediction(state, state.x))
        assert torch.equal(torch.stack(values), expected)
        assert torch.equal(torch.stack(process.finish(state).values), expected), "a row that is cut short ends there"


def test_looking_ahead_from_the_end_is_the_sample_and_costs_nothing():
    process = small()
    state = walked(process, STEPS + 1)
    spent = process.meter.spent
    assert torch.equal(torch.stack(process.look_ahead(state).values), state.x)
    assert process.meter.spent == spent


# rows that are done


@pytest.mark.parametrize("solver", ["sde-flow", "sa-solver-2", "euler"])
def test_rows_that_are_done_stay_as_they_are(solver):
    process = small(solver=solver)
    state = walked(process, STEPS + 1)
    spent = process.meter.spent
    for distribution in (process.propose(state), process.deterministic(state)):
        after = process.advance(state, distribution.sample(Rng(0)) + 1.0, Rng(0))
        assert torch.equal(after.x, state.x)
        assert after.step == state.step
        assert after.done.all()
    assert process.meter.spent == spent, "nothing is asked of the network"


# what cannot be done


def test_a_flow_has_these_abilities():
    for protocol in (LookAhead, StartsAt, Renoising):
        assert ability(small(), protocol, "a test") is not None


@pytest.mark.parametrize(
    ("ask", "said"),
    [
        (lambda p, state: p.renoise(state, 3, Rng(0)), "step must be at least 1 and less than the 3 taken"),
        (lambda p, state: p.renoise(state, 4, Rng(0)), "less than the 3 taken so far, got 4"),
        (lambda p, state: p.renoise(state, 0, Rng(0)), "step must be at least 1 .* got 0"),
        (lambda p, state: p.renoise(p.start([0], Rng(0)), 0, Rng(0)), "less than the 0 taken so far"),
        (lambda p, state: p.start_at([0], torch.zeros(1, 3), 5, Rng(0)), "less than the 5 steps of a row, got 5"),
        (lambda p, state: p.start_at([0], torch.zeros(1, 3), 0, Rng(0)), "step must be at least 1 .* got 0"),
        (lambda p, state: p.start_at([0], torch.zeros(2, 3), 1, Rng(0)), r"data must be .* \(1, 3\), one row a prompt"),
        (lambda p, state: p.start_at([0], torch.zeros(1, 2), 1, Rng(0)), r"got a tensor of shape \(1, 2\)"),
        (lambda p, state: p.start_at([0], [[1.0] * 3], 1, Rng(0)), "got a list"),
        (lambda p, state: p.look_ahead(p.start([0], Rng(0))), "before the noise"),
    ],
)
def test_steps_and_data_that_do_not_fit_are_refused_in_words(ask, said):
    process = small()
    with pytest.raises(InputError, match=said):
        ask(process, walked(process, 3))
