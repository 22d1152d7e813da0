"""Paths: inverses, derivatives and conversions are exact; what does not exist is refused."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stepwell.errors import InputError, UnknownName
from stepwell.solver.path import PATHS, PREDICTIONS, Linear, Path, path, shift_time

ALL = [path(name) for name in PATHS]
TIMES = st.floats(0.01, 0.99)


@given(st.sampled_from(ALL), TIMES)
def test_the_time_of_a_log_snr_is_its_inverse(on: Path, t: float):
    assert on.time(on.log_snr(t)) == pytest.approx(t, rel=1e-11)


@given(st.sampled_from(ALL), TIMES)
def test_rates_are_the_derivatives(on: Path, t: float):
    row = torch.tensor(t, dtype=torch.float64, requires_grad=True)
    for value, rate in ((on.alpha, on.alpha_rate), (on.sigma, on.sigma_rate)):
        (derivative,) = torch.autograd.grad(value(row) + 0 * row, row)
        assert rate(t) == pytest.approx(float(derivative), rel=1e-10, abs=1e-12)


@given(st.sampled_from(ALL), TIMES)
def test_floats_and_tensors_agree(on: Path, t: float):
    row = torch.tensor([t], dtype=torch.float64)
    for name in ("alpha", "sigma", "alpha_rate", "sigma_rate", "log_snr"):
        assert float(getattr(on, name)(row)) == pytest.approx(getattr(on, name)(t), rel=1e-12, abs=1e-14)
    value = on.log_snr(t)
    assert float(on.time(torch.tensor([value], dtype=torch.float64))) == pytest.approx(on.time(value), rel=1e-12)


@given(st.sampled_from(ALL), st.floats(0.05, 0.95), st.integers(0, 1000))
@settings(deadline=None)
def test_conversions_agree_with_the_definitions_and_come_back(on: Path, t: float, seed: int):
    data, noise = torch.randn(2, 3, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = on.noised(data, noise, t)
    truth = {
        "data": data,
        "noise": noise,
        "score": -noise / on.sigma(t),
        "velocity": on.alpha_rate(t) * data + on.sigma_rate(t) * noise,
    }
    times = torch.full((3, 1), t, dtype=torch.float64)
    for source, target in itertools.product(PREDICTIONS, repeat=2):
        scale = 1 + x.abs().max() / min(on.alpha(t), on.sigma(t))  # what division by alpha or sigma costs in digits
        for given_time in (t, times):
            found = on.convert(truth[source], x, given_time, source, target)
            assert torch.allclose(found, truth[target], rtol=1e-9, atol=float(1e-12 * scale))


@pytest.mark.parametrize("on", ALL, ids=lambda on: on.name)
def test_the_ends_are_data_and_noise(on: Path):
    assert (on.alpha(0.0), on.sigma(0.0)) == (1.0, 0.0)
    assert on.log_snr(0.0) == math.inf
    assert on.alpha(1.0) / on.sigma(1.0) < 0.1
    if on.name in ("linear", "vp-cosine", "trigonometric"):
        assert on.alpha(1.0) == 0.0
        assert on.log_snr(1.0) == -math.inf


@given(TIMES, st.floats(0.1, 10.0))
def test_a_shift_lowers_the_log_snr_and_is_undone_by_its_inverse(t: float, factor: float):
    moved = shift_time(t, factor)
    assert shift_time(moved, 1 / factor) == pytest.approx(t, rel=1e-12)
    assert Linear().log_snr(moved) == pytest.approx(Linear().log_snr(t) - math.log(factor), abs=1e-9)


def test_the_exponential_shift_of_diffusers_is_the_static_one():
    mu, t = 1.15, 0.3
    assert shift_time(t, math.exp(mu)) == pytest.approx(math.exp(mu) / (math.exp(mu) + (1 / t - 1)), rel=1e-14)


def test_what_does_not_exist_is_refused():
    x = torch.ones(1, 2)
    with pytest.raises(InputError, match="nothing of the data is left"):
        Linear().convert(x, x, 1.0, "noise", "data")
    with pytest.raises(InputError, match="no noise"):
        Linear().convert(x, x, 0.0, "data", "noise")
    with pytest.raises(UnknownName, match="did you mean 'noise'"):
        Linear().convert(x, x, 0.5, "noize", "data")
    with pytest.raises(UnknownName, match="did you mean 'linear'"):
        path("liner")
    with pytest.raises(InputError, match="positive"):
        shift_time(0.5, 0.0)
    assert torch.equal(Linear().convert(x, x, 1.0, "velocity", "data"), 0 * x)
