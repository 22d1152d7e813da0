"""What a run does unless it is told otherwise, and the course of its learning rate."""

from __future__ import annotations

import math

import pytest

import stepwell as sw
from stepwell.training.settings import Settings


def train(out, **settings):
    model = sw.exact.markov(symbols=3, length=3, prompts=3)
    right = lambda completions, **columns: [float(text[0] == 1) for text in completions]  # noqa: E731
    return sw.train(model, [{"prompt": i} for i in range(3)], right, "grpo", out=out, steps=5, **settings)


@pytest.mark.parametrize(
    ("settings", "kept"), [({}, [0, 5]), ({"checkpoint_every": 2, "keep": 9}, [0, 2, 4, 5]), ({"keep": 1}, [5])]
)
def test_a_run_keeps_its_beginning_and_its_end_and_what_is_asked_for_between(settings, kept, tmp_path):
    """Five short steps are over long before the 300 seconds between checkpoints that are the default."""
    train(tmp_path / "run", **settings)
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert [int(name.removeprefix("update-")) for name in names] == kept


def test_a_run_learns_in_the_first_way_unless_another_is_asked_for(tmp_path):
    assert Settings().steps == 100
    assert (Settings().schedule, Settings().warmup, Settings().weight_decay) == ("constant", 0, 0.0)
    assert (Settings().max_gradient_norm, Settings().learning_rate, Settings().precision) == (1.0, 1e-6, "fp32")
    assert (Settings().evaluate_every, Settings().evaluation_samples, Settings().seed) == (0, 1, 0)
    assert Settings().shuffle
    assert not Settings().progress
    train(tmp_path / "run")
    lines = (tmp_path / "run" / "completions.jsonl").read_text().splitlines()
    assert len(lines) == 5 * 4


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_the_rate_rises_over_the_warmup_and_ends_as_its_schedule_says(schedule):
    settings = Settings(learning_rate=2.0, schedule=schedule, warmup=3)
    rates = [settings.learning_rate_at(update, 0.0) for update in range(5)]
    assert rates == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0])
    course = {
        "constant": [2.0] * 5,
        "linear": [2.0, 1.5, 1.0, 0.0, 0.0],
        "cosine": [1.0 + math.cos(math.pi * share) for share in (0.0, 0.25, 0.5, 1.0, 1.0)],
    }
    shares = (0.0, 0.25, 0.5, 1.0, 1.25)  # a budget may be passed before it is noticed
    assert [settings.learning_rate_at(9, share) for share in shares] == pytest.approx(course[schedule])
