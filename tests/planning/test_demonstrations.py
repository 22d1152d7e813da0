"""Completions that others wrote stand in a rollout as rows of their own: judged, trained, and never drawn."""

from __future__ import annotations

import pytest
import torch

import stepwell as sw
from stepwell.data.stream import PromptStream
from stepwell.errors import InputError
from stepwell.planning.demonstrations import Demonstrated
from stepwell.process.exact.table import markov
from stepwell.rng import Rng
from stepwell.sampling.request import Completion, Prompt, Request
from stepwell.sampling.rollout import rollout

WRITTEN = [(1, 2, 0), (2, 2, 2, 0)]
PROMPTS = [Prompt(i, i, {"demonstration": text}) for i, text in enumerate(WRITTEN)]


def test_a_prompt_is_asked_for_its_samples_and_given_what_the_data_have():
    process = markov(symbols=3, length=4, prompts=2)
    planner = Demonstrated(prompts=2, size=3)
    requests = planner.plan(0, None, PromptStream(PROMPTS, Rng(0), shuffle=False))
    rows = rollout(process, requests, Rng(1)).trajectories
    assert rows.source.tolist() == [0, 0, 0, 1] * 2
    assert rows.prompt.tolist() == [0] * 4 + [1] * 4
    for place, text in zip((3, 7), WRITTEN, strict=True):
        length = int(rows.length[place])
        assert tuple(rows.action[place, :length].tolist()) == text
        assert rows.mask[place].sum() == length
        assert bool((rows.log_prob[place] == 0).all())
        assert bool(rows.outcome[place])
    assert planner.plan(0, rows, PromptStream(PROMPTS, Rng(0))) == []


def test_nothing_is_drawn_or_evaluated_for_a_completion():
    process, rng = markov(symbols=3, length=4), Rng(5)
    request = Request(Prompt(0, 0), 1, start=Completion((1, 0)), source=1)
    before = process.meter.read().model_evaluations
    drawn = rollout(process, [request], rng)
    assert process.meter.read().model_evaluations == before
    assert drawn.samples.values == [(1, 0)]
    assert torch.equal(rng.uniform(3), Rng(5).uniform(3))


def test_a_completion_without_an_end_is_one_that_was_cut():
    process = markov(symbols=3, length=4)
    rows = rollout(process, [Request(Prompt(0, 0), 1, start=Completion((1, 2)))], Rng(0)).trajectories
    assert rows.truncated.tolist() == [True]
    assert rows.length.tolist() == [2]


def test_data_without_demonstrations_are_refused_by_name():
    with pytest.raises(InputError, match=r"Demonstrated\.column must be a column .*, which prompt 3 has not"):
        Demonstrated(1, 2).plan(0, None, PromptStream([Prompt(3, 0)], Rng(0)))


@pytest.mark.parametrize("text", [(), (1, 1, 1, 1, 1), (7,)])
def test_a_string_that_is_none_is_refused(text):
    with pytest.raises(InputError, match="must be 1 to 4 symbols from 0 to 2, got"):
        rollout(markov(symbols=3, length=4), [Request(Prompt(0, 0), 1, start=Completion(text))], Rng(0))


@pytest.mark.parametrize("name", ["rl-plus", "hpt", "luffy"])
def test_a_policy_learns_to_write_what_nobody_ever_drew(name):
    """The reward is for one string of probability 0.002; only the demonstration says which."""
    secret = (3, 1, 2, 3, 0)
    model = sw.exact.markov(symbols=4, length=5, order=None, seed=6)
    place = model.strings().index(secret)
    before = float(model.string_probabilities().detach()[place])

    def reward(completions, **columns):
        return [float(tuple(text) == secret) for text in completions]

    data = [{"prompt": 0, "demonstration": secret}]
    settings = {"steps": 30, "learning_rate": 0.1, "prompts_per_step": 1, "group_size": 8}
    sw.train(model, data, reward, name, progress=False, **settings)
    after = float(model.string_probabilities().detach()[place])
    assert before < 0.01
    assert after > 0.2
