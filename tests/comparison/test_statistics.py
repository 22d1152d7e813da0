"""Intervals are exact where resamples can be listed, cover the truth as often as they say, and pair what is paired."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from stepwell.comparison.statistics import difference, interquartile_mean, interval, mean_score
from stepwell.errors import InputError
from stepwell.rng import Rng


def test_a_plain_interval_is_the_percentiles_of_every_resample():
    scores = np.array([[0.0, 0.2], [0.5, 0.1], [0.9, 1.0]])
    every = [
        scores[np.ix_(seeds, prompts)].mean()
        for seeds in itertools.product(range(3), repeat=3)
        for prompts in itertools.product(range(2), repeat=2)
    ]
    found = interval(scores, widened=False)
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(every, [0.025, 0.975])), abs=1e-12)
    assert found.value == pytest.approx(scores.mean(), abs=1e-12)


def test_the_widening_of_three_seeds_is_that_of_students_law():
    scores = np.array([[0.0], [1.0], [3.0]])
    plain = [np.mean(drawn) for drawn in itertools.product(scores[:, 0], repeat=3)]
    factor = math.sqrt(3 / 2) * stats.t.ppf(0.975, 2) / stats.norm.ppf(0.975)
    expected = scores.mean() + factor * (np.quantile(plain, [0.025, 0.975]) - scores.mean())
    found = interval(scores)
    assert (found.low, found.high) == pytest.approx(tuple(expected), abs=1e-12)


def test_drawn_resamples_agree_with_listed_ones():
    scores = np.random.default_rng(0).normal(size=(3, 3))
    listed = interval(scores)
    many = np.tile(scores, (1, 20))  # 60 prompts: too many resamples to list
    drawn = interval(many, resamples=20_000, rng=Rng(1))
    by_seed = interval(scores.mean(1, keepdims=True))
    assert drawn.value == pytest.approx(listed.value)
    # 60 copies of three prompts leave little but the seeds' deviation
    assert abs(drawn.low - by_seed.low) < abs(listed.low - listed.high)
    again = interval(many, resamples=20_000, rng=Rng(1))
    assert (drawn.low, drawn.high) == (again.low, again.high)


def _misses(seeds, prompts, *, widened, spread, trials=400):
    """The number of intervals that miss the true mean of 0, with deviations by seed, by prompt, and of each score."""
    draw, misses = np.random.default_rng(7), 0
    for trial in range(trials):
        of_seed, of_prompt, of_each = (
            s * draw.standard_normal(n) for s, n in zip(spread, _shapes(seeds, prompts), strict=True)
        )
        found = interval(of_seed + of_prompt + of_each, resamples=300, widened=widened, rng=Rng(trial))
        misses += not found.low <= 0.0 <= found.high
    return misses


def _shapes(seeds, prompts):
    return (seeds, 1), (1, prompts), (seeds, prompts)


@pytest.mark.parametrize(
    ("seeds", "prompts", "spread"), [(3, 40, (0.1, 0.0, 0.1)), (3, 30, (0.05, 0.3, 0.3)), (5, 30, (0.1, 0.1, 0.3))]
)
def test_intervals_cover_the_truth_as_often_as_they_say(seeds, prompts, spread):
    trials = 400
    allowed = 0.05 * trials + 4 * math.sqrt(trials * 0.05 * 0.95)
    assert _misses(seeds, prompts, widened=True, spread=spread, trials=trials) <= allowed


def test_planted_mistake_percentiles_of_three_seeds_alone_cover_too_little():
    trials = 400
    allowed = 0.05 * trials + 4 * math.sqrt(trials * 0.05 * 0.95)
    assert _misses(3, 40, widened=False, spread=(0.1, 0.0, 0.1), trials=trials) > allowed


def test_what_pairs_have_in_common_cancels():
    draw = np.random.default_rng(3)
    hard = draw.uniform(size=(1, 50))
    first = hard + 0.02 + 0.001 * draw.standard_normal((3, 50))
    second = hard + 0.001 * draw.standard_normal((3, 50))
    assert difference(first, second).above_zero
    unpaired = difference(first, second[:, draw.permutation(50)])
    assert not unpaired.above_zero


def test_one_seed_speaks_of_prompts_only():
    one = interval(np.array([[0.0, 1.0, 1.0]]))
    assert one.low < one.value < one.high
    same = interval(np.array([[0.5, 0.5, 0.5]]))
    assert (same.low, same.value, same.high) == (0.5, 0.5, 0.5)


def test_the_middle_half_ignores_what_lies_outside():
    scores = np.array([[0.0, 1.0, 2.0, 3.0], [4.0, 5.0, 6.0, 1e9]])
    assert interquartile_mean(scores) == pytest.approx(3.5)
    assert mean_score(scores) > 1e8


@pytest.mark.parametrize("scores", [[], [[]], [1.0], [[float("nan")]]])
def test_scores_that_are_no_table_are_refused(scores):
    with pytest.raises(InputError, match="table of finite numbers"):
        interval(scores)


def test_unpaired_scores_are_refused():
    with pytest.raises(InputError, match="same seeds and prompts"):
        difference([[1.0, 2.0]], [[1.0]])


def test_an_interval_stays_within_the_bounds_of_its_scores_and_keeps_the_other_end():
    scores = [[0.0, 0.1], [0.0, 0.0], [0.9, 1.0]]
    free, cut = interval(scores), interval(scores, bounds=(0.0, 1.0))
    assert free.low < 0  # the widening of three seeds
    assert free.high > 1
    assert (cut.low, cut.value, cut.high) == (0.0, free.value, 1.0)
    assert interval(scores, bounds=(0.0, math.inf)).high == free.high


@pytest.mark.parametrize("prompts", [1, 5, 20])
def test_scores_that_are_all_at_a_bound_have_the_interval_of_clopper_and_pearson(prompts):
    none, every = np.zeros((2, prompts)), np.ones((2, prompts))
    exact = stats.binomtest(0, prompts).proportion_ci(method="exact")
    low, high = interval(none, bounds=(0.0, 1.0)), interval(every, bounds=(0.0, 1.0))
    assert (low.low, low.high) == pytest.approx((exact.low, exact.high), abs=1e-12)
    assert (high.low, high.high) == pytest.approx((1 - exact.high, 1.0), abs=1e-12)
    assert interval(none, bounds=(0.0, math.inf)).high == 0.0  # nothing is known then


def test_scores_beyond_their_bounds_are_refused():
    with pytest.raises(InputError, match=r"scores must be from 0 to 1, got 0\.5 to 2"):
        interval([[0.5, 2.0]], bounds=(0.0, 1.0))
