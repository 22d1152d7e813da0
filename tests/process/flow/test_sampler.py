"""The sampler of a flow: grids, strides and tails by hand, and settings that contradict themselves."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepwell.errors import InputError, UnknownName
from stepwell.process.flow.sampler import SETTINGS, sampler_with
from stepwell.solver.path import path
from stepwell.solver.schedule import Schedule
from stepwell.solver.table import table

LINEAR = path("linear")


def sampler(**settings):
    return sampler_with(None, LINEAR, {"solver": "sde-flow", "steps": 10} | settings)


def again(first, **settings):
    return sampler_with(first, LINEAR, settings)


def test_steps_are_equal_in_time_and_shifted_once():
    assert sampler(steps=4).times == (1.0, 0.75, 0.5, 0.25, 0.0)
    assert sampler(steps=4, shift=3.0).times == pytest.approx([3 * t / (1 + 2 * t) for t in (1, 0.75, 0.5, 0.25, 0)])


def test_settings_change_what_they_name_and_nothing_else():
    first = sampler(shift=3.0, guidance=2.0)
    assert again(first, steps=5).shift == 3.0
    assert again(first, steps=5).times == sampler(steps=5, shift=3.0).times
    assert again(first, shift=1.0).times == sampler().times
    assert again(first, guidance=1.0).times == first.times
    assert again(first, solver="ddpm").times == first.times
    assert again(first, level=0.2).solver == table("sde-flow").replace(level=0.2)
    assert again(first).guidance == 2.0
    assert {t.name for t in again(first, solver="ddpm").tables} == {"ddpm"}


def test_times_of_ones_own_have_no_shift_and_can_be_stepped_evenly_again():
    mine = sampler_with(None, LINEAR, {"solver": "euler", "times": (1.0, 0.9, 0.2, 0.0)})
    assert mine.times == (1.0, 0.9, 0.2, 0.0)
    assert mine.shift is None
    assert again(mine, steps=2).times == (1.0, 0.5, 0.0)


@given(st.integers(1, 30), st.data())
def test_strides_hit_zero_whatever_they_leave_over(steps, data):
    first = sampler(steps=steps)
    step, stride = data.draw(st.integers(0, steps)), data.draw(st.integers(1, steps + 3))
    times = again(first, stride=(step, stride)).times
    assert times[: step + 1] == first.times[: step + 1]
    assert times[-1] == 0.0
    places = [first.times.index(time) for time in times[step:]]
    assert all(after - before == stride for before, after in itertools.pairwise(places[:-1]))
    assert len(places) < 2 or 0 < places[-1] - places[-2] <= stride
    assert len(times) == step + 1 + -(-(steps - step) // stride)


def test_strides_by_hand():
    first = sampler(steps=7)
    for stride, places in ((1, [0, 1, 2, 3, 4, 5, 6, 7]), (2, [0, 1, 2, 4, 6, 7]), (3, [0, 1, 2, 5, 7])):
        assert again(first, stride=(2, stride)).times == tuple(first.times[k] for k in places)
    assert again(first, stride=(7, 3)).times == first.times


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_tail_is_equal_in_the_time_before_the_shift_and_keeps_what_came_before(shift):
    first = sampler(steps=10, shift=shift)
    tailed = again(first, tail=(4, "dpmpp-2m", 3))
    assert tailed.times[:5] == first.times[:5]
    even = [0.6, 0.4, 0.2, 0.0]
    assert tailed.times[4:] == pytest.approx([shift * t / (1 + (shift - 1) * t) for t in even])
    assert tailed.times[-1] == 0.0
    assert [t.name for t in tailed.tables] == ["sde-flow"] * 4 + ["dpmpp-2m"] * 3


def test_a_tail_of_as_many_steps_is_the_same_grid():
    first = sampler(steps=10, shift=3.0)
    assert again(first, tail=(4, "ddim", 6)).times == pytest.approx(first.times)


def test_a_tail_survives_another_guidance():
    tailed = again(sampler(), tail=(4, "dpmpp-2m", 3))
    assert again(tailed, guidance=2.0).schedule == tailed.schedule


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_every_tail_from_every_step_ends_at_zero(steps):
    for step in range(10):
        times = again(sampler(), tail=(step, "euler", steps)).times
        assert times[-1] == 0.0
        assert len(times) == step + steps + 1


def test_the_deterministic_sampler_has_the_same_times_and_no_noise():
    for name in ("sde-flow", "sde-euler", "cps", "sa-solver-2", "euler"):
        first = sampler(solver=name)
        assert first.deterministic.times == first.times
        assert not first.deterministic.stochastic


def test_a_schedule_brings_its_own_steps():
    schedule = Schedule("two", (1.0, 0.4, 0.0), (table("ddpm"), table("dpmpp-2m")))
    given_ = sampler_with(None, LINEAR, {"solver": schedule, "guidance": 1.5})
    assert given_.times == schedule.times
    assert given_.remembers
    assert again(given_, solver="euler").times == schedule.times
    for name, value in (("steps", 3), ("level", 0.1), ("tail", (1, "euler", 1)), ("stride", (0, 2)), ("shift", 2.0)):
        with pytest.raises(InputError, match=f"{name} cannot be set"):
            again(given_, **{name: value})


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"solver": "dpmpp-2"}, UnknownName, "dpmpp-2"),
        ({"solver": 3}, InputError, "a name, a Table or a Schedule"),
        ({"noise": 3}, UnknownName, "noise"),
        ({"steps": 0}, InputError, "at least 1, got 0"),
        ({"steps": 2.0}, InputError, "at least 1, got 2.0"),
        ({"steps": True}, InputError, "at least 1, got True"),
        ({"steps": 3, "times": (1.0, 0.0)}, InputError, "times cannot be given beside steps"),
        ({"guidance": -1.0}, InputError, "0 or more"),
        ({"guidance": float("nan")}, InputError, "0 or more"),
        ({"solver": "euler", "level": 0.5}, InputError, "level"),
        ({"stride": (0, 0)}, InputError, "stride >= 1, got"),
        ({"stride": (11, 2)}, InputError, "step <= 10 and"),
        ({"tail": (10, "euler", 1)}, InputError, "step < 10 and"),
        ({"tail": (3, "euler", 0)}, InputError, "steps >= 1, got step 3 and 0 steps"),
        ({"tail": (3, "eular", 2)}, UnknownName, "euler"),
    ],
)
def test_what_contradicts_itself_is_refused_in_words(settings, error, message):
    first = sampler()
    with pytest.raises(error, match=message):
        again(first, **settings)


def test_every_setting_is_described():
    assert sorted(SETTINGS) == ["guidance", "level", "shift", "solver", "steps", "stride", "tail", "times"]
    assert all(SETTINGS.values())
