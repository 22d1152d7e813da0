"""Schedules: one table is the sampler there was, and several may follow each other without losing order."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import pytest
import torch

from stepwell.errors import InputError
from stepwell.rng import Rng
from stepwell.solver import grid, schedule
from stepwell.solver.exponential import coefficients
from stepwell.solver.integrate import sample
from stepwell.solver.path import Linear
from stepwell.solver.schedule import Schedule, load_schedule
from stepwell.solver.table import TABLES, table

ON = Linear()


@pytest.mark.parametrize("name", TABLES)
def test_one_table_in_every_step_is_that_tables_sampler(mixture: Callable, name: str):
    times, x = grid.shifted(7, ON), Rng(0).normal(4, 2, dtype=torch.float64)
    one = sample(mixture(ON).data, x, ON, times, table(name), Rng(1), output="data")
    other = Schedule.of(times, table(name)).sample(mixture(ON).data, x, ON, Rng(1), output="data")
    assert torch.equal(one.final, other.final)
    assert torch.equal(one.log_prob, other.log_prob)
    assert (one.evaluations, one.random.tolist()) == (other.evaluations, other.random.tolist())


def order(mixture, names: tuple[str, ...]) -> float:
    """The order at which a cycle of tables converges between t = 0.9 and 0.1, from the last of two halvings."""
    model, errors = mixture(ON), []
    x = 0.9 * Rng(0).normal(16, 2, dtype=torch.float64)
    exact = model.solve(x, 0.9, 0.1)
    for steps in (120, 240):
        first, last = ON.log_snr(0.9), ON.log_snr(0.1)
        times = [ON.time(first + (last - first) * step / steps) for step in range(steps + 1)]
        rows = tuple(table(names[step % len(names)]).replace(lower_final=False) for step in range(steps))
        final = Schedule("mixed", tuple(times), rows).sample(model.data, x, ON, Rng(0), output="data").final
        errors.append(float((final - exact).abs().mean()))
    return math.log2(errors[0] / errors[1])


@pytest.mark.parametrize(
    "names", [("dpmpp-2m", "deis-2"), ("unipc-2", "deis-2", "dpmpp-2s"), ("heun", "deis-2", "dpmpp-2m-heun")]
)
def test_tables_of_order_two_follow_each_other_at_order_two(mixture: Callable, names: tuple[str, ...], monkeypatch):
    assert order(mixture, names) == pytest.approx(2.0, abs=0.2)
    monkeypatch.setattr(schedule, "_translated", lambda history, *_: history)  # planted: noise taken for data
    assert order(mixture, names) < 1.5


def test_a_corrector_corrects_its_own_step_before_a_table_of_another_kind(mixture: Callable):
    model, times = mixture(ON).data, (0.8, 0.6, 0.3)
    x = Rng(0).normal(4, 2, dtype=torch.float64)
    rows = tuple(table(name).replace(lower_final=False) for name in ("unipc-2", "deis-2"))
    found = Schedule("mixed", times, rows).sample(model, x, ON, Rng(0), output="data").final
    first = model(x, 0.8)
    reached = coefficients(ON, rows[0], (0.8,), 0.6).mean(x, (first,))
    second = model(reached, 0.6)
    corrected = coefficients(ON, rows[0], (0.6, 0.8), 0.6, 0.8).mean(x, (second, first))
    noises = (ON.convert(second, reached, 0.6, "data", "noise"), ON.convert(first, x, 0.8, "data", "noise"))
    step = coefficients(ON, rows[1], (0.6, 0.8), 0.3)
    assert torch.allclose(found, step.mean(corrected, noises), rtol=1e-12)
    assert not torch.allclose(found, step.mean(reached, noises), rtol=1e-3)  # planted: no correction


def test_a_fork_of_a_mixed_schedule_goes_on_as_the_original(mixture: Callable):
    names = ("unipc-2", "deis-2", "sde-dpmpp-2m", "euler", "dpmpp-3m")
    mixed = Schedule("mixed", grid.shifted(5, ON), tuple(table(name) for name in names))
    model, x, past = mixture(ON).data, Rng(4).normal(3, 2, dtype=torch.float64), None
    index = torch.tensor([2, 0, 2])
    for step in range(5):
        distribution, following = mixed.propose(model, x, step, ON, past, output="data")
        if past is not None:
            forked, _ = mixed.propose(model, x[index], step, ON, past[index], output="data")
            assert torch.equal(distribution[index].sample(Rng(0)), forked.sample(Rng(0)))
        x, past = distribution.sample(Rng(step)), following


def test_a_saved_schedule_comes_back_and_a_wrong_one_is_refused(tmp_path):
    mine = Schedule("mine", (1.0, 1 / 3, 0.0), (table("heun"), table("sde-flow")), "me")
    mine.save(tmp_path / "mine.json")
    assert load_schedule(tmp_path / "mine.json") == mine
    assert "heun" in str(mine)
    with pytest.raises(InputError, match="must be 2, one for each step, got 1"):
        Schedule("mine", (1.0, 0.5, 0.0), (table("heun"),))
    with pytest.raises(InputError, match="must fall"):
        Schedule("mine", (0.0, 1.0), (table("heun"),))
    for text in ("[]", "{", json.dumps({"name": "x", "times": [1, 0]})):
        (tmp_path / "wrong.json").write_text(text)
        with pytest.raises(InputError, match="not a saved schedule"):
            load_schedule(tmp_path / "wrong.json")


def test_the_times_of_a_schedule_fall():
    with pytest.raises(InputError, match="times must fall from 1"):
        Schedule("risen", (0.1, 0.9), (table("euler"),))
