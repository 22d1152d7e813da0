"""SA-Solver: parity with diffusers under the same noise, weak orders on Gaussian data, and an exact corrector."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from stepwell.check.tolerance import rounding
from stepwell.distributions import Gaussian, Point
from stepwell.errors import InputError
from stepwell.rng import Rng
from stepwell.solver import grid
from stepwell.solver.integrate import History, propose, sample
from stepwell.solver.path import Linear, Path, path
from stepwell.solver.table import Table, table

MEAN, VARIANCE = 0.7, 0.3  # of the Gaussian data
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
VP = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear", "timestep_spacing": "trailing"}
ALWAYS = {"window": (0.0, 1.0)}


def run(predict: Any, x: Tensor, on: Path, times: list[float], solver: Table, output: str, noises: Any) -> list[Tensor]:
    """The states with noise of our choosing: `noises[k]` in step k, whether or not the steps before it drew any."""
    states, history = [x], None
    for step in range(len(times) - 1):
        distribution, history = propose(predict, states[-1], step, times, on, solver, history, output=output)
        drew = isinstance(distribution, Gaussian)
        states.append(
            distribution.mean + distribution.standard_deviation * noises[step] if drew else distribution.sample(Rng(0))
        )
    return states


def theirs(times: list[float], scheduler: Any, predict: Any, x: Tensor) -> list[Tensor]:
    states, generator = [x], torch.Generator().manual_seed(7)
    for time, timestep in zip(times, scheduler.timesteps, strict=False):
        output = predict(states[-1], time)
        states.append(scheduler.step(output, timestep, states[-1], generator=generator, return_dict=False)[0])
    return states


def worst(left: list[Tensor], right: list[Tensor]) -> float:
    gap = max(float((a - b).abs().max()) for a, b in zip(left, right, strict=True))
    print(f"parity: {gap:.1e}")  # shown by pytest -s
    return gap


ORDERS = [(1, 1), (1, 2), (2, 1), (2, 2), (3, 2), (3, 3), (3, 4)]


def orders(predictor: int, corrector: int) -> Table:
    return table("sa-solver-2").replace(order=predictor, corrector_order=corrector)


@pytest.mark.parametrize("tau", ["window", "always", "never"])
@pytest.mark.parametrize(("predictor", "corrector"), ORDERS)
@pytest.mark.parametrize("kind", ["flow", "vp"])
def test_every_order_agrees_with_diffusers_under_the_same_noise(
    mixture: Any, kind: str, predictor: int, corrector: int, tau: str
):
    diffusers = pytest.importorskip("diffusers")
    levels = {"window": None, "always": lambda t: 1, "never": lambda t: 0}
    options = {"predictor_order": predictor, "corrector_order": corrector, "tau_func": levels[tau]}
    scheduler = diffusers.SASolverScheduler(**(FLOW if kind == "flow" else VP), **options)
    scheduler.set_timesteps(10)
    scheduler.sigmas = scheduler.sigmas.double()  # it divides by alpha = 0.0003, which costs four digits
    solver = orders(predictor, corrector).replace(
        **{"window": {}, "always": ALWAYS, "never": {"noise": "none", "level": 0.0}}[tau]
    )
    on, output = (Linear(), "velocity") if kind == "flow" else (path("vp-linear", minimum=0.1, maximum=25.0), "noise")
    ratios = [float(sigma) for sigma in scheduler.sigmas]
    times = ratios if kind == "flow" else [on.time(-math.log(ratio)) for ratio in ratios]

    def predict(x: Tensor, t: float) -> Tensor:
        return on.convert(mixture(on).data(x, t), x, t, "data", output)

    if tau == "window" and kind == "vp":  # their window is in the training times
        inside = [time for time, step in zip(times, scheduler.timesteps, strict=False) if 200 <= step <= 800]
        solver = solver.replace(window=(inside[-1], inside[0]))
    x, generator = Rng(0).normal(16, 2, dtype=torch.float64), torch.Generator().manual_seed(7)
    noises = [torch.randn(16, 2, generator=generator, dtype=torch.float64) for _ in range(10)]
    right = theirs(times, scheduler, predict, x)
    if kind == "flow":  # their last step does nothing, ours removes the noise
        left, right = run(predict, x, on, [*times[:-1], 0.0], solver, output, noises)[:-1], right[:-1]
    else:
        left = run(predict, x, on, times, solver, output, noises)
    assert worst(left, right) < rounding(torch.float32, 100) * max(
        1.0, max(float(state.abs().max()) for state in right)
    )


@pytest.mark.parametrize("name", ["DEISMultistepScheduler", "SASolverScheduler"])
def test_diffusers_null_last_step_leaves_noise_in_a_known_image_and_ours_leaves_none(name: str):
    """With every prediction equal to the image, what a solver returns beside it is the noise that it has left."""
    diffusers = pytest.importorskip("diffusers")
    image, sigma = torch.full((1, 4), 0.3, dtype=torch.float64), 0.2498
    scheduler = getattr(diffusers, name)(**FLOW)
    scheduler.set_timesteps(10)
    scheduler.sigmas = scheduler.sigmas.double()
    times = [float(time) for time in scheduler.sigmas]
    assert times[-1] == times[-2] == pytest.approx(sigma, abs=1e-4)
    x = torch.randn(20_000, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for time, timestep in zip(times, scheduler.timesteps, strict=False):
        velocity = (x - image) / time
        settings = {"generator": torch.Generator().manual_seed(int(timestep))} if name.startswith("SA") else {}
        x = scheduler.step(velocity, timestep, x, return_dict=False, **settings)[0]
    left = float((x - image).std())
    assert left == pytest.approx(sigma, abs=4 * sigma / math.sqrt(2 * 80_000))
    solver, start = (
        table("deis-2" if name.startswith("DEIS") else "sa-solver-2"),
        Rng(5).normal(64, 4, dtype=torch.float64),
    )
    times = list(grid.shifted(10, Linear(), 3.0))
    ours = sample(lambda x, t: image.expand_as(x), start, Linear(), times, solver, Rng(0), output="data").final
    assert torch.allclose(ours, image.expand_as(ours), atol=1e-12)


def test_without_noise_it_is_the_predictor_corrector_of_unipc(mixture: Callable):
    """Adams with the halved-step weights is UniPC's bh1, bit for bit where the corrector uses as many predictions."""
    x, times = Rng(1).normal(8, 2, dtype=torch.float64), grid.shifted(9, Linear())
    for order in (2, 3):
        still = table("sa-solver-2").replace(order=order, corrector_order=None).deterministic
        settings = {"output": "data"}
        ours = sample(mixture(Linear()).data, x, Linear(), times, still, Rng(0), **settings)
        unipc = sample(mixture(Linear()).data, x, Linear(), times, table(f"unipc-{order}-bh1"), Rng(0), **settings)
        assert torch.equal(ours.final, unipc.final)
        assert not bool(ours.random.any())


def between(steps: int) -> list[float]:
    """Times from 0.95 to 0.05, equally spaced in lambda."""
    first, last = Linear().log_snr(0.95), Linear().log_snr(0.05)
    return [Linear().time(first + (last - first) * step / steps) for step in range(steps + 1)]


def convergence(mixture: Callable, solver: Table) -> float:
    model, x = mixture(Linear()), Rng(0).normal(16, 2, dtype=torch.float64)
    exact, found = model.solve(x, 0.95, 0.05), []
    for steps in (160, 320):
        settings = {"output": "data", "partial": True}
        drawn = sample(model.data, x, Linear(), between(steps), solver.replace(lower_final=False), Rng(0), **settings)
        found.append(float((drawn.final - exact).abs().mean()))
    return math.log2(found[0] / found[1])


def test_without_noise_it_converges_at_its_order_and_a_poorer_corrector_takes_the_order_down(mixture: Callable):
    assert convergence(mixture, table("sa-solver-2").deterministic) == pytest.approx(2, abs=0.15)
    assert convergence(mixture, table("sa-solver-3").deterministic) > 2.85
    assert convergence(mixture, orders(3, 1).deterministic) == pytest.approx(1, abs=0.15)


class Columns(Rng):
    """Noise that is 1 in row k at the k-th draw and 0 elsewhere, so that rows are the effects of single draws."""

    drawn = 0

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        self.drawn += 1
        noise = torch.zeros(shape, dtype=torch.float64)
        noise[self.drawn + 1] = 1.0
        return noise


def gaussian(x: Tensor, t: float) -> Tensor:
    """E[x_0 | x_t = x] for data N(0.7, 0.3) on the linear path."""
    variance = (1 - t) ** 2 * VARIANCE + t**2
    return MEAN + (1 - t) * VARIANCE / variance * (x - (1 - t) * MEAN)


def variance(solver: Table, times: list[float]) -> float:
    """The exact variance at the last time, from the exact marginal at the first."""
    x = torch.full((len(times) + 2, 1), (1 - times[0]) * MEAN, dtype=torch.float64)
    x[1] += math.sqrt((1 - times[0]) ** 2 * VARIANCE + times[0] ** 2)
    final = sample(gaussian, x, Linear(), times, solver, Columns(0), output="data", partial=True).final[:, 0]
    assert float(final[0]) == pytest.approx((1 - times[-1]) * MEAN, abs=1e-12)
    return float(((final - final[0]) ** 2).sum())


MARGINAL = 0.95**2 * VARIANCE + 0.05**2  # at t = 0.05


@pytest.mark.parametrize("level", [0.4, 1.0, 1.3])
@pytest.mark.parametrize("name", ["sa-solver-2", "sa-solver-3"])
def test_every_tau_keeps_the_marginal_at_weak_order_two(name: str, level: float):
    solver = table(name).replace(level=level, **ALWAYS)
    coarse, fine = (variance(solver, between(steps)) - MARGINAL for steps in (100, 200))
    assert abs(fine) < 2e-3
    assert math.log2(abs(coarse / fine)) == pytest.approx(2, abs=0.3)


def test_a_window_of_tau_keeps_the_marginal_too():
    assert table("sa-solver-2").window == (0.2, 0.8)
    coarse, fine = (variance(table("sa-solver-2"), between(steps)) - MARGINAL for steps in (100, 200))
    assert math.log2(abs(coarse / fine)) == pytest.approx(2, abs=0.3)
    times = grid.uniform(8, Linear())
    drawn = sample(gaussian, torch.ones(3, 1), Linear(), times, table("sa-solver-2"), Rng(0), output="data")
    assert [times[step] for step in range(8) if drawn.random[step]] == [0.75, 0.625, 0.5, 0.375, 0.25]


def test_a_corrector_that_forgets_the_noise_of_its_step_is_seen(monkeypatch):
    def planted(self: History, x: Tensor, newest: Tensor) -> Tensor:
        if self.correction is None:
            return x
        return self.correction.mean(self.origin, (newest, *self.predictions[: self.used]))

    solver = table("sa-solver-2").replace(**ALWAYS)
    honest = variance(solver, between(100)) - MARGINAL
    monkeypatch.setattr(History, "corrected", planted)
    assert abs(variance(solver, between(100)) - MARGINAL) > 20 * abs(honest)


def test_the_log_density_of_a_corrected_trajectory_is_that_of_its_gaussian():
    """States are an affine map of the noise; their joint covariance gives the density that the steps must add up to."""
    times, solver = list(grid.shifted(6, Linear())), table("sa-solver-2").replace(**ALWAYS)
    start = torch.zeros(9, 1, dtype=torch.float64)
    effects = sample(gaussian, start, Linear(), times, solver, Columns(0), output="data")
    drawn = sample(gaussian, start[:2], Linear(), times, solver, Rng(3), output="data")
    random = [step for step in range(6) if drawn.random[step]]
    assert random == [0, 1, 2, 3, 4]
    columns = torch.stack([effects.states[step + 1][:, 0] for step in random], 1)  # (row, state)
    matrix = (columns[2 : 2 + len(random)] - columns[0]).T
    found = torch.stack([drawn.states[step + 1][0, 0] for step in random])
    joint = torch.distributions.MultivariateNormal(columns[0], matrix @ matrix.T)
    assert float(joint.log_prob(found)) == pytest.approx(float(drawn.log_prob[0].sum()), abs=1e-9)


def test_a_corrected_stochastic_step_forks_and_changes_table_on_the_way(mixture: Callable):
    """The step after a noisy one may be another solver's: the correction is that of the step which made it."""
    times, model = grid.shifted(7, Linear()), mixture(Linear()).data
    solver, x, history = table("sa-solver-2").replace(**ALWAYS), Rng(4).normal(3, 2, dtype=torch.float64), None
    for step in range(3):
        distribution, history = propose(model, x, step, times, Linear(), solver, history, output="data")
        x = distribution.sample(Rng(step))
    assert history.mean is not None
    index = torch.tensor([2, 0, 2])
    noisy, _ = propose(model, x, 3, times, Linear(), solver, history, output="data")
    forked, _ = propose(model, x[index], 3, times, Linear(), solver, history[index], output="data")
    assert torch.equal(noisy.mean[index], forked.mean)
    corrected = history.corrected(x, model(x, times[3]))
    still, _ = propose(model, x, 3, times, Linear(), solver.deterministic, history, output="data")
    assert isinstance(still, Point)
    plain = table("dpmpp-2m").replace(weights="half-linear")
    past = History(history.times, history.predictions)
    expected, _ = propose(lambda _x, _t: model(x, times[3]), corrected, 3, times, Linear(), plain, past, output="data")
    assert torch.allclose(still.value, expected.value, atol=1e-14)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"corrector_order": 6, "corrector": True}, "must be 1 to 5"),
        ({"corrector_order": 2}, "corrector=True"),
        ({"corrector": True, "predicts": "velocity", "noise": "flow", "level": 0.7}, "no corrector"),
    ],
)
def test_a_corrector_that_contradicts_itself_is_refused(changes: dict, message: str):
    with pytest.raises(InputError, match=message):
        Table("mine", **changes)


def test_tables_know_their_deterministic_part_and_whether_they_remember():
    assert table("sde-euler").deterministic is table("sde-dance").deterministic is table("euler")
    assert table("unipc-2").deterministic is table("unipc-2")
    for name in ("ddim-eta", "cps", "sa-solver-3", "sde-dpmpp-2m"):
        still = table(name).deterministic
        assert not still.stochastic
        assert still.replace(name=name, noise=table(name).noise, level=table(name).level) == table(name)
    remembering = {"dpmpp-2m", "unipc-2", "sa-solver-2", "deis-3", "pseudo-corrector", "sde-dpmpp-2m"}
    forgetting = {"euler", "heun", "ddim", "dpmpp-2s", "dpm-2s", "sde-euler", "cps", "ddpm"}
    assert {name for name in remembering | forgetting if table(name).remembers} == remembering
