"""The gradient that surrogates make of a ratio and an advantage: a table of slopes, by autograd."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stepwell.errors import InputError
from stepwell.objective.surrogate import (
    BySource,
    Clip,
    Drift,
    Focused,
    GammaScore,
    Plain,
    Score,
    Shaped,
    SignedScore,
    Surrogate,
    Taper,
)

RATIOS = (0.2, 0.7, 1.0, 1.4, 3.0, 6.0)


def multiplier(batch_of, surrogate, ratios, advantage, **fields):
    """g(r) in d loss / d log pi = -g(r) A, one row a ratio."""
    ratios = torch.as_tensor(ratios, dtype=torch.float64)
    advantages = torch.as_tensor(advantage, dtype=torch.float64).expand(len(ratios))[:, None]
    old = torch.full((len(ratios), 1), -1.5, dtype=torch.float64)
    present = (old + ratios.log()[:, None]).requires_grad_()
    batch = batch_of(present, behaviour=old, **fields)
    loss = surrogate(present - old, advantages, batch)
    return -torch.autograd.grad(loss.sum(), present)[0][:, 0] / advantages[:, 0]


TABLE = [
    (Clip(), ".2 .7 1 0 0 0", "0 0 1 1.4 3 6"),
    (Clip(dual=3.0 + 1e-9), ".2 .7 1 0 0 0", "0 0 1 1.4 3 0"),  # at r = 3 = dual itself the bound is a kink
    (Clip(dual=3.0 - 1e-9), ".2 .7 1 0 0 0", "0 0 1 1.4 0 0"),
    (Clip(delta=4.0), ".2 .7 1 0 0 0", "0 0 1 1.4 3 0"),
    (Score(maximum=5.0), ".2 .7 1 1.4 3 5", ".2 .7 1 1.4 3 5"),
    (Taper(), ".17 .68 1 1.35 1.26 .16", ".17 .68 1 1.34 1.17 .12"),
    (Drift(), ".2 .7 1 1.35 1.26 .16", "-.78 .42 1 1.40 3 6"),
    (Plain(), ".2 .7 1 1.4 3 6", ".2 .7 1 1.4 3 6"),
    (Score(), "1 1 1 1 1 1", "1 1 1 1 1 1"),
    (SignedScore(), "1 1 1 1 1 1", ".2 .7 1 1 1 1"),
    (SignedScore((0.5, 2.0), (0.0, float("inf"))), ".5 .7 1 1.4 2 2", ".2 .7 1 1.4 3 6"),
    (GammaScore(), ".44 1.21 1 .59 .02 0", ".04 .62 1 1.23 .49 .01"),
]


@pytest.mark.parametrize(("surrogate", "up", "down"), TABLE, ids=lambda value: str(value)[:24])
def test_the_multiplier_is_that_of_the_table(batch_of, surrogate, up, down):
    for sign, printed in ((1.0, up), (-1.0, down)):
        found = multiplier(batch_of, surrogate, RATIOS, sign)
        for value, text in zip(found.tolist(), printed.split(), strict=True):
            assert round(value, 2) == pytest.approx(float(text), abs=1e-12)


def test_at_the_dual_bound_itself_at_most_the_free_gradient_passes(batch_of):
    found = float(multiplier(batch_of, Clip(dual=3.0), [3.0], -1.0))
    assert 0 <= found <= 3


bounds = st.floats(0.01, 0.9)
surrogates = st.one_of(
    st.builds(Clip, bounds, bounds),
    st.builds(Clip, bounds, bounds, dual=st.floats(1.1, 20)),
    st.builds(Clip, bounds, bounds, delta=st.floats(2, 20)),
    st.just(Plain()),
    st.builds(Score, st.none() | st.floats(0, 1), st.none() | st.floats(1, 20)),
    st.builds(Taper, st.floats(0.1, 5), st.floats(0.1, 5)),
    st.builds(Drift, st.floats(0.1, 5), st.floats(0.1, 5)),
    st.builds(SignedScore, st.tuples(st.floats(0, 1), st.floats(1, 9)), st.tuples(st.floats(0, 1), st.floats(1, 9))),
    st.builds(GammaScore, st.tuples(st.floats(0, 5), st.floats(0, 5)), st.tuples(st.floats(0, 5), st.floats(0, 5))),
)


@given(surrogates, st.floats(0.01, 50), st.sampled_from([1.0, -1.0]))
@settings(deadline=None, max_examples=150)
def test_at_the_old_policy_every_surrogate_has_multiplier_one(batch_of, surrogate, size, sign):
    assert abs(float(multiplier(batch_of, surrogate, [1.0], sign * size)) - 1) < 1e-9


@given(surrogates, st.floats(0.2, 5), st.floats(0.1, 9), st.sampled_from([1.0, -1.0]))
@settings(deadline=None, max_examples=100)
def test_every_surrogate_but_the_drift_is_proportional_to_the_advantage(batch_of, surrogate, ratio, scale, sign):
    if isinstance(surrogate, Drift):
        return
    one, other = (multiplier(batch_of, surrogate, [ratio], sign * size) for size in (1.0, scale))
    assert float(one) == pytest.approx(float(other), rel=1e-9, abs=1e-12)


def test_soft_clips_of_two_papers_are_one_function_above_the_old_policy(batch_of):
    ratios = [1.0, 1.3, 2.0, 4.0]
    taper, drift = (multiplier(batch_of, part, ratios, 1.0) for part in (Taper(positive=1.0), Drift(a=2.0)))
    assert torch.allclose(taper, drift, rtol=0, atol=1e-12)


def test_the_drift_is_never_negative(batch_of):
    ratios = torch.linspace(0.05, 8, 200, dtype=torch.float64)[:, None]
    for sign in (1.0, -1.0):
        advantage = torch.full_like(ratios, sign)
        lost = Drift()(ratios.log(), advantage, batch_of(ratios.log())) + ratios * advantage
        assert float(lost.min()) >= -4 * 8 * torch.finfo(torch.float64).eps  # four roundings of numbers up to 8


def test_a_clip_at_an_exact_tie_keeps_its_gradient(batch_of):
    clip = Clip(0.5, 1.0)
    ties = torch.tensor([2.0, 0.5], dtype=torch.float64)
    assert ties.log().exp().tolist() == [2.0, 0.5]  # the tie is exact
    found = [multiplier_at_old_zero(batch_of, clip, r, sign) for r, sign in ((2.0, 1.0), (0.5, -1.0))]
    assert found == [2.0, 0.5]
    beyond = [multiplier_at_old_zero(batch_of, clip, r, sign) for r, sign in ((2.001, 1.0), (0.499, -1.0))]
    assert beyond == [0.0, 0.0]


def multiplier_at_old_zero(batch_of, surrogate, ratio, sign):
    """g(r) with log r itself as the variable, so that no rounding moves it off a tie."""
    log_ratio = torch.tensor([[ratio]], dtype=torch.float64).log().requires_grad_()
    loss = surrogate(log_ratio, torch.full_like(log_ratio, sign), batch_of(log_ratio))
    return float(-torch.autograd.grad(loss.sum(), log_ratio)[0] / sign)


@pytest.mark.parametrize("surrogate", [Clip(), Clip(dual=3.0), Clip(delta=4.0), Score(maximum=5.0), Taper(), Drift()])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_ratio_beyond_what_float32_holds_has_a_gradient_that_is_a_number(batch_of, surrogate, sign):
    log_ratio = torch.tensor([[200.0]], dtype=torch.float32).requires_grad_()
    loss = surrogate(log_ratio, torch.full_like(log_ratio, sign), batch_of(log_ratio))
    gradient = torch.autograd.grad(loss.sum(), log_ratio)[0]
    assert bool(loss.isfinite())
    assert bool(gradient.isfinite())
    if sign > 0 and isinstance(surrogate, Clip):
        assert float(gradient) == 0


@pytest.mark.parametrize(
    ("surrogate", "sign", "expected"),
    [
        (Clip(), 1.0, "000111"),
        (Clip(), -1.0, "110000"),
        (Score(maximum=5.0), 1.0, "000001"),
        (Score(minimum=0.5), -1.0, "100000"),
        (Score(), 1.0, "000000"),
        (Plain(), 1.0, "000000"),
    ],
)
def test_clipped_steps_are_reported(surrogate, sign, expected):
    log_ratio = torch.tensor([RATIOS], dtype=torch.float64).log()
    found = surrogate.clipped(log_ratio, torch.full_like(log_ratio, sign))
    assert "".join(str(int(flag)) for flag in found[0]) == expected


def test_rows_of_another_source_take_the_other_surrogate(batch_of):
    source = torch.tensor([0, 1, 0, 2])
    found = multiplier(batch_of, BySource(Clip(), Score()), [3.0, 3.0, 1.0, 0.2], 1.0, source=source)
    assert torch.allclose(found, torch.tensor([0.0, 1.0, 1.0, 1.0], dtype=torch.float64), rtol=0, atol=1e-12)


@dataclass(frozen=True)
class ClipOnly(Surrogate):
    """The mistake of clipping without the minimum: steps that moved the wrong way can never come back."""

    def __call__(self, log_ratio, advantage, batch):
        return -log_ratio.exp().clamp(0.8, 1.2) * advantage


@dataclass(frozen=True)
class LogClip(Surrogate):
    """The mistake of a scale: g(1) = 2."""

    def __call__(self, log_ratio, advantage, batch):
        return -2 * log_ratio * advantage


def test_planted_surrogates_are_caught_by_the_table_and_by_the_property(batch_of):
    found = multiplier(batch_of, ClipOnly(), RATIOS, 1.0)
    assert found[0] == 0  # the table: 0.2
    assert float(multiplier(batch_of, LogClip(), [1.0], 1.0)) != pytest.approx(1)


def test_a_tapers_temperature_is_as_fine_as_the_numbers_it_is_applied_to(batch_of):
    """tau = 1.05 in float64, and not in the float32 that torch makes of two plain numbers."""
    ratio = 3.0
    found = float(multiplier(batch_of, Taper(negative=1.05), [ratio], -1.0))
    assert found == pytest.approx(ratio / math.cosh(1.05 * (ratio - 1) / 2) ** 2, rel=1e-14)


def test_a_gamma_score_is_highest_where_its_shape_over_its_rate_is(batch_of):
    at = [0.9 * 2 / 3, 2 / 3, 1.1 * 2 / 3]
    below, top, above = multiplier(batch_of, GammaScore((2.0, 3.0)), at, 1.0).tolist()
    assert top > max(below, above)


@pytest.mark.parametrize("bounds", [(0.5, 0.9), (-0.1, 1.0), (1.5, 2.0)])
def test_a_signed_scores_interval_holds_one(bounds):
    with pytest.raises(InputError, match=r"SignedScore.negative must be \(low, high\) with 0 <= low <= 1 <= high"):
        SignedScore(negative=bounds)


def test_steps_that_a_signed_score_bounds_are_reported():
    log_ratio = torch.tensor([RATIOS], dtype=torch.float64).log()
    for sign, expected in ((1.0, "000000"), (-1.0, "000111")):  # where A > 0 there is no ratio at all
        found = SignedScore().clipped(log_ratio, torch.full_like(log_ratio, sign))
        assert "".join(str(int(flag)) for flag in found[0]) == expected


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focused_steps_count_by_how_unlikely_they_are(batch_of, gamma):
    found = multiplier(batch_of, Focused(gamma), [0.7, 1.4], 1.0)
    for value, ratio in zip(found.tolist(), (0.7, 1.4), strict=True):
        assert value == pytest.approx(ratio * (1 - ratio * math.exp(-1.5)) ** gamma, rel=1e-12)


def test_a_shaped_probability_has_its_largest_slope_at_gamma(batch_of):
    for ratio in (0.2, 1.0, 4.0):
        pi = ratio * math.exp(-1.5)
        found = float(multiplier(batch_of, Shaped(0.1), [ratio], -1.0))
        assert found == pytest.approx(0.1 * pi / (pi + 0.1) ** 2, rel=1e-12)
