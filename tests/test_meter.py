"""The meter adds up what was spent, unit by unit."""

import time

import pytest

from stepwell.meter import Cost, Meter


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
