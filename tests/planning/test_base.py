"""A planner of one's own: what it need not write, its numbers, its notes, and what it remembers."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

import stepwell as sw
from stepwell.batch import Read
from stepwell.data.stream import PromptStream
from stepwell.errors import InputError
from stepwell.objective.policy import Policy
from stepwell.parts import Part
from stepwell.planning.base import Planner
from stepwell.planning.groups import Groups
from stepwell.planning.queue import Queue
from stepwell.process.exact.table import markov
from stepwell.recipe.recipe import Recipe
from stepwell.reward.mixing import Rewards
from stepwell.rng import Rng
from stepwell.sampling.request import Prompt, Request
from stepwell.training.collect import collect

DATA = [{"prompt": number} for number in range(3)]


def length(completions, **columns):
    return [float(len(text)) for text in completions]


class Once(Planner):
    """The plainest planner: one request, and nothing else of its own."""

    def plan(self, step, so_far, prompts):
        return [Request(prompts.by_id[step % 3], 4)] if so_far is None else []


def collected(planner):
    stream = PromptStream([Prompt(i, i) for i in range(3)], Rng(0), shuffle=False)
    return collect(markov(prompts=3), planner, stream, Rewards(length), Rng(0), 0).drawn.trajectories


def test_a_planner_has_to_plan_and_nothing_else():
    rows = collected(Once())
    assert rows.prompt.tolist() == [0] * 4
    assert rows.info is None
    assert Once().state_dict() == {}
    run = sw.train(markov(prompts=3), DATA, length, Recipe(Policy(), Once()), steps=2, learning_rate=0.1)
    assert run.steps == 2
    with pytest.raises(TypeError, match="abstract"):
        Planner()


@dataclass(frozen=True)
class Noted(Part):
    """The note of a planner as the advantage."""

    reads = frozenset({Read("rows", "better")})

    def __call__(self, batch):
        return batch.field("better")


class Comparing(Once):
    """Notes on each row by how much it is better than the worst."""

    def note(self, so_far):
        return {"better": so_far.reward - so_far.reward.min()}


def test_notes_are_there_when_credit_is_given():
    rows = collected(Comparing())
    assert torch.equal(rows.info["better"], rows.reward - rows.reward.min())
    recipe = Recipe(Policy(Noted()), Comparing())
    run = sw.train(markov(prompts=3), DATA, length, recipe, steps=6, learning_rate=0.1)
    assert max(step["gradient_norm"] for step in run.history) > 0


def test_a_resized_planner_is_another_with_the_numbers_given():
    planner = Groups(3, 4)
    assert planner.resized(prompts=5) == Groups(5, 4)
    assert planner.resized(size=2) == Groups(3, 2)
    assert planner.resized() == planner == Groups(3, 4)
    queue = Queue(1, 2, steps=3)
    collected(queue)
    assert queue.resized(size=3).waiting is queue.waiting


class Counted(Once):
    """A planner that is no dataclass and has a number of samples."""

    def __init__(self):
        self.size, self.seen = 2, [1]

    def plan(self, step, so_far, prompts):
        return [Request(prompt, self.size) for prompt in prompts.take(1)] if so_far is None else []


def test_planners_that_are_no_dataclasses_are_resized_too():
    planner = Counted()
    assert planner.resized(size=3).size == 3
    assert planner.size == 2


@pytest.mark.parametrize(
    ("planner", "setting", "name"),
    [
        (Once(), "prompts_per_step", "prompts"),
        (Once(), "group_size", "size"),
        (Counted(), "prompts_per_step", "prompts"),
    ],
)
def test_a_number_that_a_planner_does_not_have_cannot_be_set(planner, setting, name):
    said = f"{setting} must be left out for the planner {type(planner).__name__}, which has no '{name}' to set, got 4"
    with pytest.raises(InputError, match=said):
        planner.resized(**{name: 4})
    with pytest.raises(InputError, match=said):
        sw.train(markov(prompts=3), DATA, length, Recipe(Policy(), planner), steps=1, **{setting: 4})


def test_a_number_out_of_range_is_refused_as_by_the_planner_itself():
    with pytest.raises(InputError, match=r"Groups\.size must be a whole number, at least 1, got 0"):
        Groups(3, 4).resized(size=0)


WRONG_NOTES = {
    "no dictionary": (lambda rows: torch.zeros(len(rows)), "got a Tensor"),
    "a list": (lambda rows: {"it": [0.0] * len(rows)}, "got 'it', a list"),
    "a number": (lambda rows: {"it": torch.tensor(0.5)}, r"got 'it' of shape \(\)"),
    "one a prompt": (lambda rows: {"it": torch.zeros(1)}, r"here N, T = \(4, \d\); got 'it' of shape \(1,\)"),
    "a step too many": (lambda rows: {"it": torch.zeros(4, rows.mask.shape[1] + 1)}, "got 'it' of shape"),
}


@pytest.mark.parametrize(("note", "words"), WRONG_NOTES.values(), ids=list(WRONG_NOTES))
def test_a_note_of_another_shape_is_refused(note, words):
    planner = Once()
    planner.note = note
    with pytest.raises(InputError, match=f"Once.note must return tensors .*{words}"):
        collected(planner)


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (lambda so_far: None, "must return a list of requests, got None"),
        (lambda so_far: ["x"], r"must return a list of requests, got \['x'\]"),
        (lambda so_far: [], "must ask for at least one request in step 0"),
        (lambda so_far: [Request(Prompt(0, 0), 1)], "must return \\[\\] to end step 0; it asked again 5 times"),
    ],
)
def test_a_planner_that_does_not_plan_or_does_not_end_is_refused(plan, words, monkeypatch):
    monkeypatch.setattr("stepwell.training.collect.PARTS", 5)
    planner = Once()
    planner.plan = lambda step, so_far, prompts: plan(so_far)
    with pytest.raises(InputError, match=words):
        collected(planner)


@pytest.mark.parametrize("planner", ["groups", Once])
def test_the_planner_of_a_recipe_is_one(planner):
    with pytest.raises(InputError, match=r"Recipe\.planner must be a Planner"):
        Recipe(Policy(), planner)


@dataclass(frozen=True)
class Returns(Part):
    """A credit that returns anything."""

    value: object = None

    def __call__(self, batch):
        return self.value


@pytest.mark.parametrize("value", [None, 1.0, torch.zeros(3), torch.zeros(4, 9)])
def test_a_credit_of_another_shape_is_refused_by_name(value):
    with pytest.raises(InputError, match=r"Policy.credit_of \(Returns[^!]*must return a tensor \(N,\) or \(N, T\)"):
        sw.train(markov(prompts=3), DATA, length, Recipe(Policy(Returns(value)), Once()), steps=1, learning_rate=0.1)


def test_a_class_in_place_of_a_part_is_refused():
    with pytest.raises(InputError, match=r"Policy.credit_of must be a Part, got the class Returns; write Returns\(\)"):
        Policy(Returns)
