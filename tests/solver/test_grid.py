"""Grids: n + 1 falling times, from noise to exactly no noise."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepwell.errors import InputError
from stepwell.solver import grid
from stepwell.solver.path import PATHS, Cosine, Linear, VarianceExploding, path

BUILDERS = [grid.uniform, grid.shifted, grid.karras, grid.log_snr_uniform, grid.trailing]


@given(st.sampled_from(BUILDERS), st.sampled_from(sorted(PATHS)), st.integers(2, 60))
def test_every_grid_falls_from_noise_to_no_noise(build, name: str, steps: int):
    times = build(steps, path(name))
    assert len(times) == steps + 1
    assert times[-1] == 0.0
    assert all(later < earlier for earlier, later in itertools.pairwise(times))
    assert path(name).alpha(times[0]) / path(name).sigma(times[0]) <= grid.TERMINAL


def test_grids_have_their_published_values():
    assert grid.shifted(4, Linear(), 3.0) == pytest.approx([1, 0.9, 0.75, 0.5, 0])
    noise = [VarianceExploding().sigma(time) for time in grid.karras(3, VarianceExploding())]
    middle = ((80 ** (1 / 7) + 0.002 ** (1 / 7)) / 2) ** 7
    assert noise == pytest.approx([80, middle, 0.002, 0])
    steps = [Linear().log_snr(time) for time in grid.log_snr_uniform(4, Linear())[:-1]]
    assert [b - a for a, b in itertools.pairwise(steps)] == pytest.approx([math.log(40000) / 3] * 3)
    assert grid.trailing(3, Linear()) == (1.0, 0.667, 0.333, 0.0)
    assert grid.leading(4, Linear(), terminal=math.inf) == (0.751, 0.501, 0.251, 0.001, 0.0)


def test_a_grid_that_is_wrong_at_an_end_is_refused():
    with pytest.raises(InputError, match=r"must end at 0, without noise, got 0\.25 as the last, where sigma is 0\.25"):
        grid.check_grid([1.0, 0.5, 0.25], Linear())
    with pytest.raises(InputError, match=r"start at noise, got 0\.901 as the first"):
        grid.leading(10, Linear())
    with pytest.raises(InputError, match=r"got 0\.5 and then 0\.5 in step 1"):
        grid.check_grid([1.0, 0.5, 0.5, 0.0], Linear())
    with pytest.raises(InputError, match="start at noise"):
        grid.uniform(4, VarianceExploding(2.0))
    with pytest.raises(InputError, match="at most 80"):
        grid.karras(4, VarianceExploding(), largest=100.0)
    with pytest.raises(InputError, match="steps must be at least 1, got 0"):
        grid.uniform(0, Cosine())
    with pytest.raises(InputError, match="times must fall"):
        grid.check_grid([math.nan, 0.0], Linear())
    with pytest.raises(InputError, match="steps must be at least 2"):
        grid.karras(1, Linear())
