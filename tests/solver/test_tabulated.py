"""A path known at training times only: exact there, at both ends, and in its rates; diffusers' times fall on it."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stepwell.check.tolerance import rounding
from stepwell.errors import InputError
from stepwell.rng import Rng
from stepwell.solver import grid
from stepwell.solver.integrate import sample
from stepwell.solver.path import PREDICTIONS
from stepwell.solver.table import table
from stepwell.solver.tabulated import Tabulated


def stable_diffusion(zero: bool = False) -> Tabulated:
    """Stable Diffusion's levels, and with `zero` those of Lin et al. (arXiv 2305.08891, algorithm 1)."""
    root = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64)
    alpha = (1.0 - root**2).cumprod(0).sqrt()
    if zero:
        alpha = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
    return Tabulated(tuple((alpha**2).tolist()))


PLAIN, ZERO = stable_diffusion(), stable_diffusion(zero=True)
BOTH = st.sampled_from([PLAIN, ZERO])


def test_levels_are_exact_at_the_training_times():
    for on in (PLAIN, ZERO):
        for k, level in enumerate(on.alphas_cumprod):
            t = (k + 1) / 1000
            assert on.alpha(t) ** 2 == pytest.approx(level, abs=1e-13)
            assert on.alpha(t) ** 2 + on.sigma(t) ** 2 == pytest.approx(1.0, abs=1e-14)


def test_the_ends_are_data_and_noise():
    for on in (PLAIN, ZERO):
        assert (on.alpha(0.0), on.sigma(0.0), on.log_snr(0.0)) == (1.0, 0.0, math.inf)
    assert (ZERO.alpha(1.0), ZERO.sigma(1.0), ZERO.log_snr(1.0)) == (0.0, 1.0, -math.inf)
    assert PLAIN.alpha(1.0) / PLAIN.sigma(1.0) == pytest.approx(0.0684, abs=1e-4)
    assert np.allclose(grid.uniform(10, PLAIN), grid.trailing(10, PLAIN), rtol=1e-15, atol=0)


@given(BOTH, st.floats(1e-6, 1.0))
def test_the_time_of_a_log_snr_is_its_inverse(on: Tabulated, t: float):
    assert on.time(on.log_snr(t)) == pytest.approx(t, rel=1e-11)
    row = torch.tensor([t], dtype=torch.float64)
    assert float(on.time(on.log_snr(row))) == pytest.approx(t, rel=1e-11)


@given(BOTH, st.integers(1, 998), st.floats(0.0, 1.0))
def test_between_training_times_lambda_is_linear(on: Tabulated, k: int, part: float):
    low, high = on.log_snr(k / 1000), on.log_snr((k + 1) / 1000)
    assert on.log_snr((k + part) / 1000) == pytest.approx(low + part * (high - low), abs=1e-9)


@given(BOTH, st.floats(0.0, 1.0))
def test_rates_are_the_derivatives_and_finite(on: Tabulated, t: float):
    row = torch.tensor(t, dtype=torch.float64, requires_grad=True)
    for value, rate in ((on.alpha, on.alpha_rate), (on.sigma, on.sigma_rate)):
        (derivative,) = torch.autograd.grad(value(row), row)
        assert math.isfinite(rate(t))
        assert rate(t) == pytest.approx(float(derivative), rel=1e-9, abs=1e-9)
    near = 1e-7
    for value, rate in ((on.alpha, on.alpha_rate), (on.sigma, on.sigma_rate)):  # against differences, off the jumps
        if 0.05 < (t * 1000) % 1.0 < 0.95:
            slope = (value(t + near) - value(t - near)) / (2 * near)
            assert slope == pytest.approx(rate(t), rel=1e-5, abs=1e-5)


def test_floats_and_tensors_agree_in_any_shape():
    times = torch.linspace(0.0, 1.0, 24, dtype=torch.float64).reshape(4, 3, 2)
    for on in (PLAIN, ZERO):
        for name in ("alpha", "sigma", "alpha_rate", "sigma_rate"):
            found = getattr(on, name)(times)
            single = [getattr(on, name)(float(t)) for t in times.flatten()]
            assert torch.allclose(found.flatten(), torch.tensor(single, dtype=torch.float64), rtol=1e-12, atol=1e-14)
        single = on.alpha(times.float())
        assert single.dtype == torch.float32
        assert torch.allclose(single.double(), on.alpha(times), atol=rounding(torch.float32, 100))


def test_conversions_come_back_at_every_time_where_they_exist():
    data, noise = Rng(0).normal(2, 3, 2, dtype=torch.float64)
    for on, t in itertools.product((PLAIN, ZERO), (0.0007, 0.001, 0.5, 0.9993, 1.0)):
        x = on.noised(data, noise, t)
        velocity = on.alpha_rate(t) * data + on.sigma_rate(t) * noise
        assert torch.allclose(on.convert(data, x, t, "data", "velocity"), velocity, rtol=1e-9, atol=1e-9)
        for source, target in itertools.product(PREDICTIONS, repeat=2):
            if on.alpha(t) == 0.0 and (source in ("noise", "score")) and target in ("data", "velocity"):
                continue
            first = on.convert(data, x, t, "data", source)
            assert torch.allclose(
                on.convert(first, x, t, source, target), on.convert(data, x, t, "data", target), rtol=1e-6, atol=1e-6
            )


def test_diffusers_times_between_training_times_are_these():
    """Karras' sigmas lie between training times; their timesteps are (index + 1) / T here, to their rounding."""
    diffusers = pytest.importorskip("diffusers", reason="parity with diffusers needs diffusers installed")
    scheduler = diffusers.EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", use_karras_sigmas=True
    )
    scheduler.set_timesteps(10)
    on = Tabulated(tuple(scheduler.alphas_cumprod.double().tolist()))
    ours = [on.time(-math.log(float(sigma))) * 1000 - 1 for sigma in scheduler.sigmas[:-1]]
    theirs = [float(step) for step in scheduler.timesteps]
    print(f"parity: {max(abs(a - b) for a, b in zip(ours, theirs, strict=True)):.1e} training steps")
    assert np.allclose(ours, theirs, atol=1e-3)  # float32 steps near 1000 are 6e-5 apart, as are those of sigmas
    off = [step + 1 for step in ours]  # the planted mistake: t = index / T
    assert not np.allclose(off, theirs, atol=1e-3)


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_ddim_is_that_of_diffusers(mixture: Any, kind: str):
    diffusers = pytest.importorskip("diffusers", reason="parity with diffusers needs diffusers installed")
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="trailing",
        clip_sample=False,
        prediction_type=kind,
    )
    scheduler.set_timesteps(20)
    on = Tabulated(tuple(scheduler.alphas_cumprod.double().tolist()))
    times, x = grid.trailing(20, on), Rng(0).normal(16, 2, dtype=torch.float64)
    states, model = [x], mixture(on)
    for time, step in zip(times, scheduler.timesteps, strict=False):
        assert int(step) == round(time * 1000) - 1
        data = model.data(states[-1], time)
        prediction = on.convert(data, states[-1], time, "data", "noise")
        if kind == "sample":
            prediction = data
        elif kind == "v_prediction":
            prediction = on.alpha(time) * prediction - on.sigma(time) * data
        states.append(scheduler.step(prediction, step, states[-1], return_dict=False)[0])
    found = sample(model.data, x, on, times, table("ddim"), Rng(0), output="data").states
    assert max(float((a - b).abs().max()) for a, b in zip(found, states, strict=True)) < rounding(torch.float32, 100)


def test_levels_that_are_no_path_are_refused():
    with pytest.raises(InputError, match="at least two"):
        Tabulated((0.5,))
    for levels in ((0.5, 0.5), (0.5, 0.7), (1.0, 0.5), (0.5, -0.1), (0.5, math.nan)):
        with pytest.raises(InputError, match="fall from below 1"):
            Tabulated(levels)
