"""The meter adds up what was spent, unit by unit."""

import time

import pytest

from stepwell.errors import InputError
from stepwell.meter import Budget, Cost, Meter


def test_costs_add_and_subtract_unit_by_unit():
    one, two = Cost(1, 2, 3, 4, 5, 0.5), Cost(10, 20, 30, 40, 50, 1.5)
    assert one + two == Cost(11, 22, 33, 44, 55, 2.0)
    assert (one + two) - two == one


def test_a_meter_counts_what_is_added_and_nothing_else():
    meter = Meter()
    meter.add(forward=3, model_evaluations=1)
    meter.add(forward=4)
    assert (meter.spent.forward, meter.spent.model_evaluations, meter.spent.backward) == (7, 1, 0)


def test_an_unknown_unit_is_an_error():
    with pytest.raises(TypeError, match="tokens"):
        Meter().add(tokens=3)


def test_reading_costs_nothing_and_time_only_grows():
    meter = Meter()
    meter.add(forward=2)
    first, second = meter.read(), meter.read()
    assert first.forward == second.forward == 2
    assert 0 <= first.wall_time <= second.wall_time


def test_a_meter_resumes_with_what_was_spent_before(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    meter = Meter(_since=100.0)
    meter.add(reward_calls=5)
    clock[0] = 103.0
    state = meter.state_dict()
    clock[0] = 500.0  # the pause between two runs is not spent
    resumed = Meter()
    resumed.load_state_dict(state)
    clock[0] = 501.0
    resumed.add(reward_calls=1)
    assert resumed.read() == Cost(reward_calls=6, wall_time=4.0)


def test_a_paused_meter_counts_neither_units_nor_time():
    meter = Meter()
    meter.add(forward=3)
    before = meter.read()
    with meter.paused():
        meter.add(forward=100, reward_calls=7)
        time.sleep(0.05)
    after = meter.read()
    assert (after.forward, after.reward_calls) == (3, 0)
    assert after.wall_time - before.wall_time < 0.04


MINUTE = Budget.parse("60s")


@pytest.mark.parametrize(
    ("seconds", "steps", "over"),
    [
        (30.0, 10, False),
        (57.0, 19, False),  # another step of 3 s ends on it
        (59.9, 10, False),  # another step of 6 s ends at 65.9 s
        (57.0, 6, True),  # another step of 9.5 s ends at 66.5 s
        (40.0, 1, False),  # 80 s are as near as 40 s
        (40.1, 1, True),
        (60.0, 5, True),
        (0.0, 0, False),
    ],
)
def test_a_budget_in_seconds_ends_within_a_tenth_or_as_near_as_steps_allow(seconds, steps, over):
    cost = Cost(wall_time=seconds)
    assert (MINUTE.share(cost, steps) >= 1) == over
    if not over:
        assert MINUTE.share(cost, steps) == MINUTE.fraction(cost, steps)


@pytest.mark.parametrize("length", [0.01, 0.7, 3.0, 5.9, 6.0])
def test_steps_up_to_a_tenth_of_the_budget_end_within_a_tenth_of_it(length):
    seconds, steps = 0.0, 0
    while MINUTE.share(Cost(wall_time=seconds), steps) < 1:
        seconds, steps = seconds + length, steps + 1
    assert abs(seconds - 60.0) <= 6.0 + 1e-9
    assert MINUTE.missed(Cost(wall_time=seconds), steps) == ""


@pytest.mark.parametrize("length", [7.0, 25.0, 45.0, 100.0])
def test_longer_steps_end_as_near_as_they_can_and_say_so(length):
    seconds, steps = 0.0, 0
    while MINUTE.share(Cost(wall_time=seconds), steps) < 1:
        seconds, steps = seconds + length, steps + 1
    ends = [length * (number + 1) for number in range(20)]
    assert abs(seconds - 60) == min(abs(end - 60) for end in ends)
    missed = MINUTE.missed(Cost(wall_time=seconds), steps)
    assert (missed == "") == (abs(seconds - 60) <= 6)
    if missed:
        assert f"took {seconds:.3g} s for a budget of 60 s: a step, which is never cut, took {length:.3g} s" in missed


def test_other_units_stop_when_they_are_spent():
    tokens = Budget.parse("100-tokens")
    assert tokens.share(Cost(forward=90), 1) == 0.9
    assert tokens.missed(Cost(forward=190), 1) == ""


@pytest.mark.parametrize("text", ["0s", "0.0m", "0-steps", "0k-tokens", "3-hours", "-1s", "5", "1e3-steps", "", "s"])
def test_a_budget_that_is_none_is_refused_with_examples_of_one(text):
    with pytest.raises(InputError, match=f"A budget must be like 60s, 5m, .*, got '{text}'"):
        Budget.parse(text)


def test_a_budget_may_be_any_amount_above_none():
    assert Budget.parse("0.5s") == Budget(0.5, "seconds")
    assert Budget.parse(" 1.5h ") == Budget(5400.0, "seconds")
    assert Budget.parse("0.5k-steps") == Budget(500.0, "steps")
    assert Budget.parse("2M-tokens") == Budget(2e6, "tokens")
    assert Budget.parse("1B-evaluations") == Budget(1e9, "evaluations")
