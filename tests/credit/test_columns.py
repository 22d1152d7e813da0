"""Parts of credit that read single reward functions, count different actions, or bound what they are given."""

from __future__ import annotations

import math

import pytest
import torch

from stepwell.batch import Batch
from stepwell.columns import Columns
from stepwell.credit.baseline import GreedyBaseline, Informative, LengthBaseline
from stepwell.credit.columns import AcrossPrompts, LengthClass, RewardColumn, Stratified
from stepwell.credit.contest import WinnerTakesAll, WinRate
from stepwell.credit.group import GroupCredit
from stepwell.credit.risk import MixedRisk
from stepwell.credit.sources import Outcome
from stepwell.credit.traces import Coverage, RewardToGo
from stepwell.errors import InputError
from stepwell.objective.constraint import Priced
from stepwell.objective.state import Multiplier, Ramp
from stepwell.trajectories import count, make


def batch(given, prompts, lengths=None, action=None, **fields):
    """Rows with these rewards, prompts and lengths."""
    lengths = lengths or [1] * len(given)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    action = torch.zeros(mask.shape, dtype=torch.long) if action is None else torch.tensor(action)
    rows = make(action, torch.zeros(mask.shape, dtype=torch.float64), mask, prompt=torch.tensor(prompts), **fields)
    rows = rows.replace(reward=torch.tensor(given, dtype=torch.float64))
    return Batch(rows, count(rows))


def test_a_column_is_one_functions_word_and_0_where_it_has_none():
    given = torch.tensor([[1.0, 2.0], [3.0, math.nan]])
    assert RewardColumn(1)(batch([0, 0], [0, 0], rewards=given)).tolist() == [2.0, 0.0]


def test_a_column_that_is_not_there_is_named():
    with pytest.raises(
        InputError, match=r"RewardColumn\.column must be below the number of reward functions, 2, got 2"
    ):
        RewardColumn(2)(batch([0], [0], rewards=torch.ones(1, 2)))


def test_length_classes_are_powers_of_two():
    lengths = [1, 2, 3, 4, 7, 8]
    assert LengthClass()(batch([0] * 6, [0] * 6, lengths)).tolist() == [0, 1, 1, 2, 2, 3]


def test_coverage_pays_for_the_first_time_of_each_action_and_adds_up():
    rows = batch([0, 0], [0, 0], [4, 3], action=[[1, 2, 1, 3], [5, 5, 5, 7]])
    assert Coverage(0.5)(rows).tolist() == [[0.5, 0.5, 0.0, 0.5], [0.5, 0.0, 0.0, 0.0]]
    assert RewardToGo(gain=Coverage(0.5))(rows)[:, 0].tolist() == [1.5, 0.5]


def test_a_sample_alone_is_compared_with_nobody():
    rows = batch([2.0, 1.0, 1.0], [0, 1, 1])
    for credit in (LengthBaseline(), WinnerTakesAll(), WinRate()):
        assert credit(rows)[0] == 0
        assert credit.compares


def test_strata_compare_the_reward_that_they_are_given():
    """All of one stratum: the standardised second reward, twice."""
    rows = batch([1, 0, 1, 0], [0, 0, 0, 0])
    second = rows.rows.replace(rewards=torch.tensor([[1.0, 0], [0, 0], [1, 1], [0, 1]]))
    found = Stratified(strata=RewardColumn(0), reward=RewardColumn(1))(Batch(second, rows.counts))
    whole = torch.tensor([-0.5, -0.5, 0.5, 0.5]) / torch.tensor(1 / 3).sqrt()
    apart = torch.tensor([-0.5, -0.5, 0.5, 0.5]) / torch.tensor(0.5).sqrt()
    assert found.tolist() == pytest.approx((0.5 * whole + 0.5 * apart).tolist(), abs=1e-5)


@pytest.mark.parametrize("part", [GroupCredit(), Outcome()])
def test_a_priced_part_compares_rows_where_its_part_does(part):
    assert Priced(part).compares is part.compares


def test_ties_win_nothing():
    assert WinnerTakesAll()(batch([1, 1, 0], [0, 0, 0])).tolist() == [0, 0, 0]
    assert WinRate()(batch([1, 1, 0], [0, 0, 0])).tolist() == [0.25, 0.25, -0.5]


def test_informative_rows_are_those_of_unequal_groups():
    rows = batch([1, 0, 1, 1, 0, 0], [0, 0, 1, 1, 2, 2])
    assert Informative()(rows).tolist() == [3.0] * 6
    assert Informative(nonzero=True)(rows).tolist() == [2.0] * 6
    assert Informative()(batch([1, 1], [0, 0])).tolist() == [2.0, 2.0]


def test_one_prompt_alone_is_not_compared_across_prompts():
    assert AcrossPrompts()(batch([1, 0], [0, 0])).tolist() == [0, 0]


def test_a_greedy_baseline_needs_what_its_planner_notes():
    rows = batch([1.0], [0])
    with pytest.raises(InputError, match="'greedy'"):
        GreedyBaseline()(rows)
    noted = rows.rows.replace(info=Columns({"greedy": torch.tensor([0.25])}, 1))
    assert GreedyBaseline()(Batch(noted, rows.counts)).tolist() == [0.75]


def test_credits_of_risk_are_never_positive():
    found = MixedRisk(epsilon=None)(batch([0.0, 1, 2, 3, 4, 5], [0, 0, 0, 1, 1, 1]))
    assert bool((found <= 0).all())
    assert found.argsort().tolist()[0] == 0
    with pytest.raises(InputError, match=r"MixedRisk\.low must be below high = 0\.1, got 0\.9"):
        MixedRisk(low=0.9, high=0.1)
    for wrong in ({"low": 0}, {"high": 1.5}, {"weight": -1}, {"bundle": 0}):
        with pytest.raises(InputError, match=f"MixedRisk.{next(iter(wrong))} must be"):
            MixedRisk(**wrong)


def test_a_price_is_read_when_credit_is_given():
    rows = batch([1.0], [0])
    part = Priced(RewardToGo(), Multiplier("price", 2.0))
    assert part(rows).tolist() == [[2.0]]
    assert part(Batch(rows.rows, rows.counts, states={"price": 0.5})).tolist() == [[0.5]]


def test_a_price_stays_between_0_and_its_ceiling():
    price = Multiplier("price", metric="x", threshold=1.0, rate=0.5, ceiling=0.75)
    assert price.update(0.5, {"x": 0.0}) == 0.75
    assert price.update(0.2, {"x": 3.0}) == 0.0
    assert price.update(0.2, {"x": 0.5}) == pytest.approx(0.45)


@pytest.mark.parametrize(("initial", "final"), [(0.2, 1.0), (1.0, 0.2)])
def test_a_ramp_goes_by_equal_steps_and_stops_at_its_end(initial, final):
    ramp, value, seen = Ramp("ramp", initial, final, updates=4), initial, []
    for _ in range(6):
        value = ramp.update(value, {})
        seen.append(value)
    step = (final - initial) / 4
    assert seen == pytest.approx([initial + step, initial + 2 * step, initial + 3 * step, final, final, final])
