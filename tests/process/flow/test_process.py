"""Flows obey the laws of every process, draw as their solvers do, and are made and changed as asked."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from stepwell import check
from stepwell.check.tolerance import rounding
from stepwell.distributions import Gaussian, Point
from stepwell.errors import InputError, LawBroken, UnknownName
from stepwell.process.flow.build import flow
from stepwell.process.flow.process import Flow
from stepwell.rng import Rng
from stepwell.sampling.request import Prompt, Request
from stepwell.sampling.rollout import rollout
from stepwell.solver.path import path as path_named
from stepwell.solver.table import table

PROMPTS = [0, 1, 2]
WITHOUT = {"label": torch.tensor([3])}
LATE = (0.98, 0.7, 0.5, 0.2, 0.0)  # a noise or score prediction says nothing of the data at t = 1


class Net(nn.Module):
    """Three numbers, their time and a label, with weights from an Rng."""

    def __init__(self, dtype: torch.dtype = torch.float64, dimension: int = 3):
        super().__init__()
        self.inner = nn.Linear(dimension + 1, 8, dtype=dtype)
        self.outer = nn.Linear(8, dimension, dtype=dtype)
        self.names = nn.Embedding(4, 8, dtype=dtype)
        for place, parameter in enumerate(self.parameters()):
            parameter.data.copy_(0.5 * Rng(1).split(place).normal(*parameter.shape, dtype=dtype))

    def forward(self, x: Tensor, time: Tensor, label: Tensor | None = None) -> Tensor:
        hidden = self.inner(torch.cat([x, time[:, None]], 1))
        if label is not None:
            hidden = hidden + self.names(label)
        return self.outer(hidden.tanh())


def small(dtype: torch.dtype = torch.float64, **settings) -> Flow:
    return flow(Net(dtype), (3,), **{"steps": 4, "encode": "label"} | settings)


def draw(process: Flow, count: int = 4, seed: int = 0, **request):
    return rollout(process, [Request(Prompt(0, 0), count, **request)], Rng(seed)).trajectories


# the laws of every process


SOLVERS = [
    *("sde-flow", "sde-euler", "sde-euler-published", "sde-dance", "cps", "ddpm", "ddim-eta"),
    *("sde-dpmpp-2m", "sa-solver-2", "sa-solver-3"),
    *("euler", "heun", "ddim", "dpmpp-2m", "dpmpp-2s", "unipc-2", "deis-2", "pseudo-corrector"),
]


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_makes_a_lawful_process(solver):
    report = check.process(small(solver=solver), PROMPTS)
    drawn = {"seed", "fork", "ratio", "rows", "padding", "absorbing", "meter", "frozen"}
    stochastic = table(solver).stochastic
    assert set(report.measured) == drawn | ({"gradient"} if stochastic else set())
    assert ("gradient" in report.skipped) is not stochastic
    assert max(report.measured.values()) < 1e-12


@pytest.mark.parametrize("name", ["vp-linear", "vp-cosine", "ve", "trigonometric"])
@pytest.mark.parametrize("predicts", ["velocity", "noise", "data", "score"])
def test_every_path_and_prediction_makes_a_lawful_process(name, predicts):
    times = {"times": LATE} if name in ("vp-cosine", "trigonometric") else {}
    report = check.process(small(path=name, predicts=predicts, solver="ddpm", **times), PROMPTS[:2])
    assert max(report.measured.values()) < 1e-10


@pytest.mark.parametrize("solver", ["sde-flow", "sa-solver-2", "heun"])
def test_guidance_makes_a_lawful_process(solver):
    report = check.process(small(solver=solver, guidance=2.5, unconditional=WITHOUT), PROMPTS)
    assert max(report.measured.values()) < 1e-12


@pytest.mark.parametrize("solver", ["sde-flow", "sde-dpmpp-2m", "euler"])
def test_single_precision_is_lawful_within_its_rounding(solver):
    report = check.process(small(torch.float32, solver=solver), PROMPTS)
    assert report.tolerance == rounding(torch.float32, 100 + 4 + 8 + 8)  # the inputs of three layers
    assert max(report.measured.values()) < report.tolerance


def test_a_network_without_condition_and_a_function_are_lawful_processes():
    assert max(check.process(small(encode=None, solver="ddpm"), PROMPTS).measured.values()) < 1e-12
    report = check.process(flow(lambda x, t: x * t, (2, 2), solver="sde-flow", steps=3), [None, None])
    assert max(report.measured.values()) < report.tolerance
    assert report.skipped["gradient"].startswith("no parameter")


def test_a_condition_of_several_tensors_is_handed_on_row_by_row():
    class Shifted(Net):
        def forward(self, x, time, label, shift):
            return super().forward(x, time, label) + shift[:, None]

    def encode(prompts):
        return {"label": torch.tensor(prompts), "shift": torch.tensor([0.1 * p for p in prompts]).double()}

    process = flow(Shifted(), (3,), steps=3, solver="ddpm", encode=encode)
    assert max(check.process(process, PROMPTS).measured.values()) < 1e-12
    rows = draw(process)
    other = process.condition([2] * 4)
    assert not torch.allclose(process.score(rows).log_prob, process.score(rows, context=other).log_prob)


def test_a_planted_score_of_another_step_is_caught():
    class Late(Flow):
        def score(self, trajectories, needs=(), context=None, reference=None):
            moved = trajectories.replace(action=trajectories.action.roll(1, 1))
            return super().score(moved, needs, context, reference)

    process = small(solver="ddpm")
    process.__class__ = Late
    with pytest.raises(LawBroken, match="ratio"):
        check.process(process, PROMPTS)


def test_a_planted_fork_that_forgets_the_past_of_a_multistep_solver_is_caught():
    from stepwell.process.flow import state as module

    class Forgets(module.FlowState):
        def __getitem__(self, index):
            fork = super().__getitem__(index)
            return Forgets(fork.x, fork.step, fork.last, fork.condition)

    process = small(solver="sde-dpmpp-2m")
    start = process.start

    def forgetful(prompts, rng):
        state = start(prompts, rng)
        return Forgets(state.x, state.step, state.last, state.condition)

    process.start = forgetful
    with pytest.raises(LawBroken, match="rows"):
        check.process(process, PROMPTS)


# the solvers' own sampling


@pytest.mark.parametrize(
    "solver", ["sde-flow", "sde-dpmpp-2m", "sa-solver-2", "sa-solver-3", "dpmpp-2m", "unipc-2", "heun"]
)
def test_a_rollout_is_the_solvers_own_sampling_bit_for_bit(solver):
    process, rng = small(solver=solver, encode=None), Rng(3)
    noise = rng.normal(4, 3, dtype=torch.float64)
    with torch.no_grad():
        drawn = process.sampler.schedule.sample(
            lambda x, t: process.module(x, x.new_full((4,), t)), noise, process.path, rng, output="velocity"
        )
    rows = draw(process, seed=3)
    assert torch.equal(rows.action, torch.stack([*drawn.states], 1))
    assert torch.equal(rows.mask, torch.cat([torch.tensor([False]), drawn.random]).expand(4, -1))
    assert torch.equal(rows.log_prob[:, 1:], drawn.log_prob.double() * drawn.random)


# what a flow can do


def walked(process, steps, count=3, seed=0):
    """A state after so many steps, drawn from the process."""
    state, rng = process.start([0] * count, Rng(seed)), Rng(seed)
    for _ in range(steps):
        state = process.advance(state, process.propose(state).sample(rng), rng)
    return state


@pytest.mark.parametrize("name", ["linear", "vp-linear", "ve"])
def test_rows_start_from_the_noise_of_their_path(name):
    process = small(path=name, solver="ddpm")
    distribution, path = process.propose(walked(process, 0)), path_named(name)
    assert isinstance(distribution, Gaussian)
    assert not distribution.mean.any()
    assert not distribution.random.any()
    assert float(distribution.standard_deviation) == pytest.approx(math.hypot(path.alpha(1.0), path.sigma(1.0)))


@pytest.mark.parametrize(
    ("solver", "ode"), [("sde-flow", "ddim"), ("sde-euler", "euler"), ("sde-dpmpp-2m", "dpmpp-2m")]
)
def test_the_deterministic_step_is_the_odes(solver, ode):
    process, other = small(solver=solver), small(solver=ode)
    noise = process.deterministic(walked(process, 0))
    assert isinstance(noise, Gaussian), "the noise is drawn all the same"
    state, twin = walked(process, 1), walked(other, 1)
    for _ in range(4):
        distribution, exact = process.deterministic(state), other.propose(twin)
        assert isinstance(distribution, Point)
        torch.testing.assert_close(distribution.value, exact.value, rtol=0, atol=1e-14)
        state, twin = process.advance(state, distribution.value, Rng(0)), other.advance(twin, exact.value, Rng(0))


def test_another_sampler_shares_the_network_and_the_meter_and_leaves_the_first_as_it_was():
    process = small(solver="sde-flow")
    before = draw(process).action
    twin = process.with_sampler(solver="ddpm", steps=2, guidance=1.0)
    assert twin.module is process.module
    assert twin.meter is process.meter
    assert (process.horizon, twin.horizon) == (5, 3)
    spent = process.meter.spent.model_evaluations
    draw(twin)
    assert process.meter.spent.model_evaluations == spent + 2 * 4
    assert torch.equal(draw(process).action, before)


def test_guidance_is_the_weighted_difference_of_two_predictions():
    plain, guided = small(), small(guidance=2.5, unconditional=WITHOUT)
    x, time = torch.ones(2, 3).double(), torch.full((2,), 0.5).double()
    with torch.no_grad():
        conditional, bare = (plain.predict(x, time, plain.condition([label] * 2)) for label in (1, 3))
        found = guided.predict(x, time, guided.condition([1, 1]), 2.5)
    torch.testing.assert_close(found, bare + 2.5 * (conditional - bare), rtol=0, atol=1e-14)
    spent = guided.meter.spent.model_evaluations
    assert spent == 4, "two evaluations a row"


@pytest.mark.parametrize("horizon", [2, 4])
def test_a_row_that_is_cut_short_ends_as_the_data_that_the_network_expects(horizon):
    process = small(solver="ddpm")
    drawn = rollout(process, [Request(Prompt(0, 0), 3, horizon=horizon)], Rng(0))
    rows, time = drawn.trajectories, process.sampler.times[horizon - 1]
    assert rows.truncated.all()
    x = rows.action[:, horizon - 1]
    with torch.no_grad():
        expected = x - time * process.module(x, torch.full((3,), time).double(), torch.zeros(3).long())
    torch.testing.assert_close(torch.stack(drawn.samples.values), expected, rtol=0, atol=1e-14)


def test_the_data_prediction_is_differentiable_counted_and_without_side_effects():
    process = small(solver="sa-solver-2")
    state = walked(process, 2)
    kept, spent = (state.x.clone(), list(state.following)), process.meter.spent.model_evaluations
    x = state.x.clone().requires_grad_()
    data = process.data_prediction(state, x)
    assert process.meter.spent.model_evaluations == spent + len(x)
    (gradient,) = torch.autograd.grad(data.sum(), x)
    width, along = 1e-6, Rng(5).normal(3, 3, dtype=torch.float64)
    with torch.no_grad():
        ends = [process.data_prediction(state, state.x + sign * width * along).sum() for sign in (1, -1)]
    assert float((ends[0] - ends[1]) / (2 * width)) == pytest.approx(float((gradient * along).sum()), abs=1e-8)
    assert torch.equal(state.x, kept[0])
    assert state.following == kept[1]
    last = walked(process, 5)
    assert process.data_prediction(last, last.x) is last.x
    with pytest.raises(InputError, match="noise"):
        process.data_prediction(walked(process, 0), state.x)


def test_samples_are_decoded_and_the_states_stay_latent():
    process = small(solver="ddpm", decode=lambda x: x.reshape(-1, 1, 1, 3).sigmoid())
    drawn = rollout(process, [Request(Prompt(0, 0), 2)], Rng(0))
    assert drawn.samples.values[0].shape == (1, 1, 3)
    assert drawn.trajectories.action.shape == (2, 5, 3)
    torch.testing.assert_close(drawn.samples.values[1][0, 0], drawn.trajectories.action[1, -1].sigmoid())


def test_the_cost_of_a_rollout_is_a_network_evaluation_for_each_of_a_rows_steps():
    for solver, each in (("ddpm", 1), ("sde-dpmpp-2m", 1), ("heun", 2)):
        process = small(solver=solver)
        draw(process, 5)
        last = 5 if solver == "heun" else 0  # Heun's last step is Euler's
        assert process.meter.spent.model_evaluations == 5 * 4 * each - last
        assert process.meter.spent.backward == 0


def test_a_saved_network_is_its_weights(tmp_path):
    from safetensors.torch import load_file

    process = small()
    process.save(tmp_path)
    found = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(found[name], value) for name, value in process.module.state_dict().items())


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: flow(Net(), (3,), predicts="speed"), InputError, "predicts must be one of velocity"),
        (lambda: flow(3, (3,)), InputError, "must be a function or a torch.nn.Module"),
        (lambda: flow(lambda x: x, (3,)), InputError, r"called as f\(x, t"),
        (lambda: flow(Net(), (3,), solver="eular"), UnknownName, "euler"),
        (lambda: flow(Net(), (3,), path="liner"), UnknownName, "linear"),
        (lambda: flow(Net(), (3,), guidance=2.0), InputError, "unconditional"),
        (lambda: small().with_sampler(guidance=2.0), InputError, "unconditional"),
        (lambda: small().with_sampler(step=3), UnknownName, "steps"),
        (lambda: small().condition(["cat"]), InputError, "must be a whole number"),
        (lambda: small(encode=lambda p: {"label": torch.zeros(1)}).condition([1, 2]), InputError, "one row a prompt"),
        (lambda: small(encode=lambda p: {"label": [1, 2]}).condition([1, 2]), InputError, "one row a prompt"),
        (lambda: draw(flow(lambda x, t: x[:, :1], (3,))), InputError, "tensor of its states' shape"),
        (lambda: draw(flow(lambda x, t: x / 0, (3,))), InputError, "NaN or infinite"),
    ],
)
def test_what_contradicts_itself_is_refused_in_words(make, error, message):
    with pytest.raises(error, match=message):
        make()
