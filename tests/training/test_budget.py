"""A run with a budget in seconds ends within a tenth of it, or says why not; evaluation and saving are not counted."""

from __future__ import annotations

import warnings

import pytest

import stepwell as sw

PROMPTS = [{"prompt": number} for number in range(4)]
SIZES = {"prompts_per_step": 2, "group_size": 2, "learning_rate": 0.1}


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Trains on a clock of its own, on which only rewards take time: `length` seconds a step, growing by a factor."""

    def train(budget: str, length: float, grows: float = 1.0, slow_save: float = 0.0, **settings):
        clock, seconds = [0.0], [length]

        def reward(completions):
            clock[0] += seconds[0]
            seconds[0] *= grows
            return [float(len(text)) for text in completions]

        if slow_save:
            from stepwell.training import loop

            def slowly(state, *rest, write=loop.export):
                clock[0] += slow_save
                return write(state, *rest)

            monkeypatch.setattr(loop, "export", slowly)
        monkeypatch.setattr("time.monotonic", lambda: clock[0])
        model = sw.exact.markov(symbols=3, length=3, prompts=4)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            out = tmp_path / "run" if slow_save else None
            done = sw.train(model, PROMPTS, reward, "rloo", budget=budget, out=out, **SIZES, **settings)
        return done, [str(each.message) for each in caught if "for a budget of" in str(each.message)]

    return train


@pytest.mark.parametrize("length", [0.5, 1.7, 3.1, 5.5])
def test_a_run_ends_within_a_tenth_of_its_budget(run, length):
    done, said = run("60s", length)
    assert abs(done.cost.wall_time - 60) <= 6
    assert not said


def test_steps_that_grow_a_little_end_within_a_tenth_too(run):
    done, said = run("60s", 2.0, grows=1.03)
    assert abs(done.cost.wall_time - 60) <= 6
    assert not said


def test_a_single_step_that_takes_longer_says_so(run):
    done, said = run("60s", 100.0)
    assert (done.steps, done.cost.wall_time) == (1, 100.0)
    assert said == ["The run took 100 s for a budget of 60 s: a step, which is never cut, took 100 s."]


def test_a_run_that_ends_by_its_steps_says_nothing_of_its_budget(run):
    done, said = run("60s", 1.0, steps=3)
    assert done.steps == 3
    assert not said


def test_writing_the_model_at_the_end_is_not_counted(run):
    done, said = run("60s", 1.0, slow_save=50.0)
    assert abs(done.cost.wall_time - 60) <= 1
    assert not said


def test_evaluation_is_not_counted(run):
    whole, _ = run("60s", 1.0)
    evaluated, said = run("60s", 1.0, evaluation=PROMPTS, evaluate_every=1)
    assert evaluated.cost.wall_time == pytest.approx(whole.cost.wall_time, abs=1.0)
    assert not said
