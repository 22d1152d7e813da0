"""Wrappers of predictions: each undoes, exactly, the error it is meant for, on Gaussian data where that is known."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from scipy.optimize import brentq
from torch import Tensor

from stepwell.errors import InputError
from stepwell.rng import Rng
from stepwell.solver import grid, wrappers
from stepwell.solver.integrate import sample
from stepwell.solver.parallel import sample_parallel
from stepwell.solver.path import PREDICTIONS, Linear, path
from stepwell.solver.schedule import Schedule
from stepwell.solver.search.scores import sample_moments
from stepwell.solver.table import table
from stepwell.solver.wrappers import (
    Calibration,
    calibrate,
    calibrated,
    epsilon_scaled,
    load_calibration,
    predicting,
    time_shifted,
)

VARIANCE = 0.3
MEAN = torch.tensor([0.7, -0.2, 0.4], dtype=torch.float64)


def exact(on, output: str = "data"):
    """The exact model of data N(MEAN, 0.3), for times that are floats or tensors."""

    def data(x: Tensor, t) -> Tensor:
        alpha, sigma = on.alpha(t), on.sigma(t)
        return MEAN + alpha * VARIANCE / (alpha**2 * VARIANCE + sigma**2) * (x - alpha * MEAN)

    return predicting(data, on, "data", output)


def with_noise_error(on, output: str, error):
    """A model whose noise prediction E is error(E, t) instead."""

    def predict(x: Tensor, t) -> Tensor:
        return on.convert(error(exact(on, "noise")(x, t), t), x, t, "noise", output)

    return predict


def states(seed: int = 0, rows: int = 5) -> Tensor:
    return Rng(seed).normal(rows, 3, dtype=torch.float64)


PATHS = ("linear", "vp-linear", "ve", "trigonometric")


@pytest.mark.parametrize(("name", "output"), [*itertools.product(PATHS, PREDICTIONS)])
def test_epsilon_scaling_undoes_an_overconfident_noise_prediction(name: str, output: str, monkeypatch):
    on = path(name, maximum=3.0) if name == "ve" else path(name)
    wrong = with_noise_error(on, output, lambda noise, t: (1.05 + 0.1 * t) * noise)
    mended = epsilon_scaled(wrong, on, base=1.05, slope=0.1, output=output)
    mixed = torch.tensor([0.9, 0.5, 0.3, 0.1, 0.7], dtype=torch.float64)[:, None]
    for t in (0.9, 0.4, 0.05, mixed):
        assert torch.allclose(mended(states(), t), exact(on, output)(states(), t), rtol=1e-11)
        assert not torch.allclose(wrong(states(), t), exact(on, output)(states(), t), rtol=1e-3)
    monkeypatch.setattr(wrappers, "_effect", lambda *_: 1.0)  # planted: scaling the output, whatever it is
    assert torch.allclose(mended(states(), 0.4), exact(on, output)(states(), 0.4)) == (output == "noise")


@pytest.mark.parametrize("output", ["velocity", "data"])
def test_epsilon_scaling_leaves_pure_noise_alone(output: str):
    mended = epsilon_scaled(exact(Linear(), output), Linear(), base=1.1, output=output)
    assert torch.equal(mended(states(), 1.0), exact(Linear(), output)(states(), 1.0))
    times = torch.tensor([1.0, 0.5, 0.5, 0.5, 0.5], dtype=torch.float64)[:, None]
    changed = (mended(states(), times) != exact(Linear(), output)(states(), times)).all(1)
    assert changed.tolist() == [False, True, True, True, True]


def test_the_scale_with_the_right_variance_tends_to_the_overconfidence_at_order_one():
    """With finite steps the scale also makes up for the solver's own error, of order 1 for DDIM."""
    on, gaps = path("vp-linear"), []
    wrong = with_noise_error(on, "noise", lambda noise, _: 1.05 * noise)
    for steps in (100, 200):
        schedule = Schedule.of(grid.uniform(steps, on), table("ddim"))

        def excess(base: float, schedule=schedule) -> float:
            mended = epsilon_scaled(wrong, on, base=base, output="noise")
            return float(sample_moments(schedule, mended, on, 3, output="noise")[1][0]) - VARIANCE

        gaps.append(abs(brentq(excess, 1.0, 1.1, xtol=1e-10) - 1.05))
    assert math.log2(gaps[0] / gaps[1]) == pytest.approx(1.0, abs=0.15)


@pytest.mark.parametrize("output", PREDICTIONS)
def test_calibration_undoes_a_constant_offset(output: str):
    on, offset = path("vp-linear"), torch.tensor([0.1, -0.05, 0.02], dtype=torch.float64)
    wrong = with_noise_error(on, output, lambda noise, t: noise + offset)
    times = (1.0, 0.8, 0.5, 0.2, 0.1)
    data = MEAN + torch.cat([states(1), -states(1)])  # their mean is that of the distribution, to rounding
    mended = calibrated(wrong, calibrate(wrong, data, times, on, Rng(2), output=output))
    for t in times:
        assert torch.allclose(mended(states(), t), exact(on, output)(states(), t), atol=1e-10)
        assert not torch.allclose(wrong(states(), t), exact(on, output)(states(), t), atol=1e-4)
    mixed = torch.tensor([0.8, 0.5, 1.0, 0.1, 0.2], dtype=torch.float64)[:, None]
    assert torch.allclose(mended(states(), mixed), exact(on, output)(states(), mixed), atol=1e-10)


def test_between_its_times_a_calibration_is_linear():
    wrong = with_noise_error(Linear(), "noise", lambda noise, t: noise + 0.3 * t)
    known = calibrate(wrong, MEAN + torch.cat([states(1), -states(1)]), (0.9, 0.1), Linear(), Rng(2), output="noise")
    for t in (0.9, 0.35, 0.1):
        assert torch.allclose(calibrated(wrong, known)(states(), t), exact(Linear(), "noise")(states(), t), atol=1e-12)
    curved = with_noise_error(Linear(), "noise", lambda noise, t: noise + 0.3 * t**2)
    missed = calibrated(curved, known)(states(), 0.35) - exact(Linear(), "noise")(states(), 0.35)
    assert torch.allclose(missed, torch.tensor(0.3 * (0.35**2 - 0.35), dtype=torch.float64), atol=1e-12)


def test_calibration_lowers_the_score_matching_loss_by_the_square_of_the_mean(monkeypatch):
    """On any model: the loss over the same rows falls by |mean error|^2, here of the score."""

    def model(x: Tensor, t: float) -> Tensor:
        return torch.sin(3 * x) - x / (0.2 + t)

    def loss(predict) -> float:
        half, data = Rng(2).normal(40, 3, dtype=torch.float64), states(3, 40)
        noise, clean = torch.cat([half, -half]), torch.cat([data, data])
        return float((predict(Linear().noised(clean, noise, 0.6), 0.6) + noise / 0.6).square().sum(1).mean())

    known = calibrate(model, states(3, 40), (0.6,), Linear(), Rng(2), output="score")
    drop = loss(model) - loss(calibrated(model, known))
    assert drop == pytest.approx(float(known.offsets[0].square().sum()), rel=1e-10)
    assert drop > 1e-3
    half = Calibration(known.times, 0.5 * known.offsets, "score")
    assert loss(model) - loss(calibrated(model, half)) < 0.8 * drop  # planted: half of it gives 3/4


def test_a_calibration_is_saved_and_knows_its_limits(tmp_path):
    known = Calibration((0.9, 0.2), torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "noise")
    known.save(tmp_path / "mean.safetensors")
    again = load_calibration(tmp_path / "mean.safetensors")
    assert again.times == known.times
    assert again.output == "noise"
    assert torch.equal(again.offsets, known.offsets)
    with pytest.raises(InputError, match=r"got 0\.95 to"):
        known.at(0.95)
    with pytest.raises(InputError, match="falling times"):
        Calibration((0.2, 0.9), known.offsets, "noise")
    (tmp_path / "other").write_text("x")
    with pytest.raises(InputError, match="not a saved calibration"):
        load_calibration(tmp_path / "other")


def rows_of_variance(variances: list[float], size: int = 50) -> Tensor:
    """Rows whose variance over their coordinates is exactly as given."""
    x = Rng(5).normal(len(variances), size, dtype=torch.float64)
    x = (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True)
    return x * torch.tensor(variances, dtype=torch.float64).sqrt()[:, None]


def times_asked(x: Tensor, t, on=None, **settings) -> list[float]:
    asked = []

    def model(state, time):
        asked.append(time)
        return state

    time_shifted(model, on or Linear(), **settings)(x, t)
    time = asked[0]
    return [time] * len(x) if isinstance(time, float) else time.flatten().tolist()


def test_a_time_shift_finds_the_time_that_the_state_is_at():
    true = [0.52, 0.58, 0.601, 0.63]
    x = rows_of_variance([(1 - t) ** 2 * VARIANCE + t**2 for t in true])
    settings = {"window": 0.2, "cutoff": 0.3, "data_variance": VARIANCE}
    assert times_asked(x, 0.6, **settings) == pytest.approx(true, abs=1e-9)

    class Wrong(Linear):  # planted: the standard deviation in place of the variance
        def sigma(self, t):
            return t**0.5

    assert max(abs(a - b) for a, b in zip(times_asked(x, 0.6, Wrong(), **settings), true, strict=True)) > 0.05


def test_the_published_rule_moves_even_a_state_that_is_exactly_right_and_the_data_variance_mends_it():
    x = rows_of_variance([0.4**2 * VARIANCE + 0.6**2] * 3)
    asked = times_asked(x, 0.6, window=0.2, cutoff=0.3)
    assert asked == pytest.approx([math.sqrt(0.4**2 * VARIANCE + 0.6**2)] * 3, abs=0.0005)  # 0.639, to the spacing
    assert times_asked(x, 0.6, window=0.2, cutoff=0.3, data_variance=VARIANCE) == [0.6] * 3


def test_a_time_shift_keeps_to_its_window_its_cutoff_and_the_start():
    x = rows_of_variance([0.01, 9.0])
    assert times_asked(x, 0.6, window=0.1, cutoff=0.3) == pytest.approx([0.55, 0.65])
    assert times_asked(x, 0.6, window=0.0, cutoff=0.3) == [0.6, 0.6]
    assert times_asked(x, 0.3, window=0.1, cutoff=0.3) == [0.3, 0.3]
    assert times_asked(x, 1.0, window=0.1, cutoff=0.3) == [1.0, 1.0]
    assert times_asked(x, 0.98, window=0.1, cutoff=0.3) == pytest.approx([0.93, 1.0])
    both = torch.tensor([[0.6], [0.2]], dtype=torch.float64)
    assert times_asked(x, both, window=0.1, cutoff=0.3) == pytest.approx([0.55, 0.2])
    unit = {"window": 0.1, "cutoff": 0.1, "data_variance": 1.0}
    assert times_asked(x, 0.6, path("vp-linear"), **unit) == [0.6, 0.6]  # variance 1 at all times tells nothing
    with pytest.raises(InputError, match="two coordinates a row or more"):
        times_asked(x[:, :1], 0.6, window=0.1, cutoff=0.3)
    with pytest.raises(InputError, match="window must be >= 0"):
        times_asked(x, 0.6, window=-0.1, cutoff=0.3)


def test_wrappers_stack_and_go_through_samplers():
    on, offset = path("vp-linear"), torch.tensor([0.1, -0.05, 0.02], dtype=torch.float64)
    wrong = with_noise_error(on, "noise", lambda noise, t: 1.03 * noise + offset)
    times = grid.uniform(6, on)
    scaled = epsilon_scaled(wrong, on, base=1.03, output="noise")
    known = calibrate(scaled, MEAN + torch.cat([states(1), -states(1)]), times[:-1], on, Rng(2), output="noise")
    mended = calibrated(scaled, known)
    x, rows = states(4), table("deis-2")
    right = sample(exact(on, "noise"), x, on, times, rows, Rng(0), output="noise").final
    assert torch.allclose(sample(mended, x, on, times, rows, Rng(0), output="noise").final, right, atol=1e-9)
    together = sample_parallel(mended, x, on, times, rows, Rng(0), window=3, tolerance=0.0, output="noise")
    assert torch.allclose(together.final, right, atol=1e-9)
    shifted = time_shifted(mended, on, window=0.1, cutoff=0.2)
    moved = sample(shifted, x, on, times, rows, Rng(0), output="noise").final
    assert bool(torch.isfinite(moved).all())
    assert not torch.allclose(moved, right)
