"""Distances of samples to a mixture: closed forms, an integral over quantiles, and the floor of perfect samples."""

from __future__ import annotations

import math
from statistics import NormalDist

import pytest
import torch
from scipy.integrate import quad
from scipy.optimize import brentq
from torch import Tensor

from stepwell.process.exact import distance
from stepwell.process.exact.distance import sampling_floor, sliced_wasserstein
from stepwell.process.exact.mixture import Mixture
from stepwell.rng import Rng

DATA = Mixture(
    torch.tensor([0.3, 0.5, 0.2]),
    torch.tensor([[-1.5, 0.5], [1.0, 1.0], [0.5, -1.5]]),
    torch.tensor([[[0.3, 0.1], [0.1, 0.2]], [[0.15, -0.05], [-0.05, 0.4]], [[0.25, 0.0], [0.0, 0.25]]]),
)
GAUSS = Mixture(torch.ones(1), torch.tensor([[0.7, -0.4]]), torch.tensor([[[0.5, 0.2], [0.2, 0.3]]]))


def test_the_distance_of_one_sample_is_a_closed_form():
    """All of the mixture goes to one point y: (|y - m|^2 + trace C) / 2, as even directions average u u' to 1 / 2."""
    y = torch.tensor([[0.4, -1.0]], dtype=torch.float64)
    exact = math.sqrt(0.5 * float(((y[0] - DATA.mean) ** 2).sum() + DATA.covariance.trace()))
    assert sliced_wasserstein(y, DATA) == pytest.approx(exact, rel=1e-12)


def test_the_distance_in_one_dimension_is_an_integral_over_quantiles():
    two = Mixture(torch.tensor([0.3, 0.7]), torch.tensor([[-2.0], [1.0]]), torch.tensor([[[0.2]], [[0.5]]]))
    samples = torch.tensor([[-1.7], [0.1], [2.0]], dtype=torch.float64)

    low, high = NormalDist(-2.0, 0.2**0.5), NormalDist(1.0, 0.5**0.5)

    def quantile(level: float) -> float:
        return brentq(lambda y: 0.3 * low.cdf(y) + 0.7 * high.cdf(y) - level, -9, 9)

    parts = [
        quad(lambda u, i=i: (float(samples[i]) - quantile(u)) ** 2, i / 3, (i + 1) / 3, epsabs=1e-7)[0]
        for i in range(3)
    ]
    assert sliced_wasserstein(samples[torch.tensor([2, 0, 1])], two) == pytest.approx(sum(parts) ** 0.5, abs=1e-6)


def test_the_order_of_samples_and_a_turn_by_one_direction_change_nothing():
    drawn, turn = DATA.sample(50, Rng(1)), torch.tensor([[0.0, -1.0], [1.0, 0.0]]).double()
    turned = Mixture(DATA.weights, DATA.means @ turn.mT, turn @ DATA.covariances @ turn.mT)
    assert sliced_wasserstein(drawn.flip(0), DATA) == pytest.approx(sliced_wasserstein(drawn, DATA), rel=1e-12)
    assert sliced_wasserstein(drawn @ turn.mT, turned) == pytest.approx(sliced_wasserstein(drawn, DATA), rel=1e-10)


def test_perfect_samples_are_at_the_floor_and_other_laws_above_it():
    count, repeats = 1600, 50
    floor, error = sampling_floor(DATA, count, Rng(2), repeats=repeats)
    spread = error * repeats**0.5
    again = sampling_floor(DATA, count, Rng(3), repeats=repeats)
    assert abs(again[0] - floor) < 4 * math.hypot(error, again[1])
    wrong_weights = Mixture(torch.tensor([0.5, 0.3, 0.2]), DATA.means, DATA.covariances)
    moved = Mixture(DATA.weights, DATA.means + 0.2, DATA.covariances)
    for other in (wrong_weights, moved):
        assert sliced_wasserstein(other.sample(count, Rng(4)), DATA) > floor + 4 * spread


def test_the_floor_of_one_gaussian_falls_with_the_root_of_the_count():
    """Up to the slowly growing factor of the tails, sqrt(log log n)."""
    few, many = (sampling_floor(GAUSS, count, Rng(5), repeats=40)[0] for count in (200, 800))
    assert 1.7 < few / many < 2.2


def test_a_planted_midpoint_quantile_is_seen(monkeypatch):
    """What others do, quantiles at (i - 1/2) / n, is not the distance: at n = 1 it loses the mixture's whole spread."""

    def planted(target: Mixture, count: int, directions: int) -> tuple[Tensor, Tensor]:
        axes = distance._axes(target.dimension, directions)
        return (axes @ target.mean)[:, None], (axes @ target.mean) ** 2

    monkeypatch.setattr(distance, "_quantile_integrals", planted)
    y = torch.tensor([[0.4, -1.0]], dtype=torch.float64)
    assert (
        sliced_wasserstein(y, DATA) ** 2 < 0.5 * float(((y[0] - DATA.mean) ** 2).sum() + DATA.covariance.trace()) - 0.1
    )
