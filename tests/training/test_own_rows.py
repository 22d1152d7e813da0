"""The log counts the policy's own rows under plain names, all others under theirs, and says when groups are tied."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass

import pytest
import torch

import stepwell as sw
from stepwell import Prompt, Request
from stepwell.credit.group import GroupCredit
from stepwell.objective.policy import Policy
from stepwell.planning.demonstrations import Demonstrated
from stepwell.planning.groups import Groups
from stepwell.planning.hints import Hinted
from stepwell.planning.queue import Queue
from stepwell.planning.trees import SegmentTree
from stepwell.sampling.request import Branch, Completion, Continuation, Snapshot
from stepwell.trajectories import PROVENANCES

MODEL = {"symbols": 3, "length": 3, "prompts": 4}


def ones(completions, **columns):
    return [float(text.count(1)) for text in completions]


def train(planner, prompts, reward=ones, recipe=None, **settings):
    recipe = (recipe or sw.methods.get("rloo").recipe()).replace(planner=planner)
    return sw.train(sw.exact.markov(**MODEL), prompts, reward, recipe, **{"steps": 1, "learning_rate": 0.1, **settings})


@dataclass
class Seen(Demonstrated):
    """Keeps the rows for the test to look at."""

    def learn(self, trajectories, signals):
        SEEN.append(trajectories)


SEEN: list = []


def test_demonstrations_have_their_own_numbers():
    """The demonstration is the best answer there is: its reward of 3 must not raise the policy's."""
    SEEN.clear()
    prompts = [{"prompt": number, "demonstration": (1, 1, 1)} for number in range(4)]
    (metrics,) = train(Seen(prompts=4, size=2), prompts).history
    (rows,) = SEEN
    own = rows[rows.source == 0]
    assert len(rows) == 12
    assert metrics["reward"] == pytest.approx(float(own.reward.mean()))
    assert metrics["length"] == pytest.approx(float(own.length.double().mean()))
    assert metrics["demonstrations/reward"] == 3.0
    assert metrics["demonstrations/truncated"] == 0.0
    assert float(rows.reward.mean()) > metrics["reward"] + 0.2


def test_rewards_by_name_are_those_of_own_rows_too():
    def first(completions, **columns):
        return [float(text[:1] == (1,)) for text in completions]

    prompts = [{"prompt": number, "demonstration": (1, 1, 1)} for number in range(4)]
    (metrics,) = train(Demonstrated(prompts=4, size=2), prompts, [ones, first]).history
    assert metrics["demonstrations/reward/first"] == 1.0
    assert metrics["reward/first"] < 1.0


def test_hinted_rows_have_their_own_numbers():
    prompts = [{"prompt": number, "hinted": 3} for number in range(3)]
    (metrics,) = train(Hinted(prompts=3, size=2, failure=9.0), prompts).history
    assert {"reward", "hinted/reward", "hinted/length"} <= metrics.keys()


def test_completions_in_the_log_say_where_they_are_from(tmp_path):
    prompts = [{"prompt": number, "demonstration": (1, 1, 1)} for number in range(4)]
    train(Demonstrated(prompts=4, size=2), prompts, out=tmp_path / "run", completions_logged=12)
    lines = [json.loads(line) for line in (tmp_path / "run/completions.jsonl").read_text().splitlines()]
    given = [line for line in lines if line.get("origin") == "demonstrations"]
    assert len(given) == 4
    assert all(line["reward"] == 3.0 for line in given)
    assert sum("origin" not in line for line in lines) == 8


@pytest.mark.parametrize(
    "planner", [Groups(prompts=2, size=2), Queue(prompts=2, size=2, steps=3, first=0), SegmentTree(prompts=2, size=4)]
)
def test_rows_that_the_policy_drew_in_pieces_are_its_own(planner):
    history = train(planner, [{"prompt": number} for number in range(4)], steps=5).history
    assert all({"reward", "length", "truncated"} <= metrics.keys() for metrics in history)
    assert not any(name.split("/")[0] in PROVENANCES for metrics in history for name in metrics)


def origins(requests, **options):
    return [PROVENANCES[number] for number in drawn(requests, **options).provenance.tolist()]


def drawn(requests, **options):
    return sw.rollout(sw.exact.markov(**MODEL), requests, sw.Rng(0), **options).trajectories


def test_the_origin_of_a_row_follows_from_its_request():
    prompt = Prompt(0, 0)

    def same(distribution, state, prompts):
        return distribution

    assert origins([Request(prompt, 1)]) == ["policy"]
    assert origins([Request(prompt, 1, start=Completion((1, 2)))]) == ["demonstrations"]
    assert origins([Request(prompt, 1, context=1)]) == ["hinted"]
    assert origins([Request(prompt, 1, proposal=same)]) == ["proposed"]
    mixed = [Request(prompt, 2), Request(prompt, 1, start=Completion((1, 2))), Request(prompt, 1, context=1)]
    assert origins(mixed) == ["policy", "policy", "demonstrations", "hinted"]


def test_rows_that_go_on_from_others_are_of_their_origin():
    prompt = Prompt(0, 0)
    rows = drawn([Request(prompt, 1), Request(prompt, 1, start=Completion((1, 2))), Request(prompt, 1, context=1)])
    branches = [Request(prompt, 1, start=Branch(row, 1)) for row in range(3)]
    assert origins(branches, so_far=rows) == ["policy", "demonstrations", "hinted"]
    state = sw.exact.markov(**MODEL).start([0], sw.Rng(0))
    nothing = rows[:1].replace(length=torch.tensor([0]))
    assert origins([Request(prompt, 1, start=Snapshot(state, nothing))]) == ["policy"]


def test_a_whole_row_of_an_earlier_rollout_is_no_sample_of_this_one():
    prompt = Prompt(0, 0)
    whole = drawn([Request(prompt, 1)])
    part = drawn([Request(prompt, 1, horizon=1, judged=False)])
    assert origins([Request(prompt, 1, start=Continuation(whole))]) == ["replayed"]
    assert origins([Request(prompt, 1, start=Continuation(part))]) == ["policy"]


def test_a_length_counts_what_was_drawn():
    """Three steps, of which only those inside the window are drawn at random."""

    @dataclass
    class Window(Groups):
        def ask(self, prompts, count, weights=None):
            return [Request(prompt, self.size, window=(0, 1)) for prompt in prompts.take(count, weights)]

    (metrics,) = train(Window(prompts=2, size=2), [{"prompt": number} for number in range(4)]).history
    assert metrics["length"] == 1.0


def zeros(completions, **columns):
    return [0.0] * len(completions)


def sometimes(completions, prompts, **columns):
    return [float(text.count(1)) if prompt == 0 else 0.0 for text, prompt in zip(completions, prompts, strict=True)]


def asked(caught):
    return [str(each.message) for each in caught if "had the same reward" in str(each.message)]


def test_tied_groups_are_the_share_of_groups_without_a_difference():
    prompts = [{"prompt": number} for number in range(4)]
    (metrics,) = train(Groups(prompts=4, size=8), prompts, sometimes).history
    assert metrics["tied_groups"] == 0.75
    (alone,) = train(Groups(prompts=4, size=1), prompts, sometimes, sw.methods.get("reinforce").recipe()).history
    assert "tied_groups" not in alone


@pytest.mark.parametrize(
    ("reward", "steps", "sentences"), [(zeros, 2, 0), (zeros, 3, 1), (zeros, 9, 1), (sometimes, 4, 0)]
)
def test_after_a_few_steps_of_ties_one_sentence_asks_for_another_reward_or_more_samples(reward, steps, sentences):
    prompts = [{"prompt": number} for number in range(4)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        history = train(Groups(prompts=4, size=8), prompts, reward, steps=steps).history
    assert len(asked(caught)) == sentences
    if sentences:
        assert "give a reward that tells them apart, more samples a prompt" in asked(caught)[0]
        assert [metrics["tied_groups"] for metrics in history] == [1.0] * steps


def test_a_method_that_compares_nothing_is_not_told_of_ties():
    absolute = sw.Recipe(Policy(GroupCredit("none")))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(Groups(prompts=2, size=4), [{"prompt": number} for number in range(4)], zeros, absolute, steps=4)
    assert not asked(caught)
