"""Greedy answers, vines, trees of answers and hints: rows, costs, notes, and exact distributions."""

from __future__ import annotations

import itertools

import pytest
import torch

from stepwell.check import law
from stepwell.data.stream import PromptStream
from stepwell.errors import InputError
from stepwell.planning.base import Planner
from stepwell.planning.hints import Hinted
from stepwell.planning.measured import Vines, WithGreedy
from stepwell.planning.trees import SegmentTree
from stepwell.process.exact.table import markov
from stepwell.reward.mixing import Rewards
from stepwell.rng import Rng
from stepwell.sampling.request import Prompt
from stepwell.training.collect import collect
from stepwell.trajectories import edges


def length(completions):
    return [float(len(text)) for text in completions]


def collected(process, planner, rng=None, reward=length, prompts=2, **columns):
    """All that a step's rollout keeps."""
    asked = [Prompt(i, i, dict(columns)) for i in range(prompts)]
    stream = PromptStream(asked, Rng(0), shuffle=False)
    return collect(process, planner, stream, Rewards(reward), rng or Rng(0), 0).drawn


@pytest.mark.parametrize("planner", [WithGreedy(1, 2), Vines(2, 2), SegmentTree(2, 4, segment=1), Hinted(2, 2)])
def test_they_are_planners_whose_groups_can_be_resized(planner):
    assert isinstance(planner, Planner)
    assert planner.size in (1, 2, 4)


def test_samples_beside_a_greedy_answer_are_distributed_as_plain_ones():
    process = markov(symbols=2, length=2, seed=3)
    found = law(lambda rng: collected(process, WithGreedy(1, 1), rng, prompts=1))
    strings = dict(zip(process.strings(), process.string_probabilities().tolist(), strict=True))
    assert {text: strings[text] for (text,) in found} == pytest.approx({text: p for (text,), p in found.items()})


def test_the_greedy_reward_of_each_prompt_is_noted_on_its_samples():
    process = markov(symbols=3, length=4, prompts=3, seed=3)
    rows = collected(process, WithGreedy(size=4, prompts=3), prompts=3).trajectories
    assert len(rows) == 12
    best = collected(process, WithGreedy(size=1, prompts=3), Rng(9), prompts=3).trajectories.info["greedy"]
    assert rows.info["greedy"].tolist() == [float(best[p]) for p in rows.prompt.tolist()]


@pytest.mark.parametrize("segment", [1, 2, 5])
def test_leaves_of_a_tree_are_distributed_as_plain_samples(segment):
    process = markov(symbols=2, length=3, order=None, seed=3)
    program = lambda rng: collected(process, SegmentTree(1, 4, 2, segment), rng, prompts=1)  # noqa: E731
    if segment == 1:  # each leaf by itself, over 2^9 outcomes at most
        found = law(lambda rng: program(rng).samples.values[3])
        strings = dict(zip(process.strings(), process.string_probabilities().tolist(), strict=True))
        assert found == pytest.approx({text: strings[text] for text in found})
    rows = program(Rng(5)).trajectories
    assert len(rows) == 4
    for a, b in itertools.combinations(range(4), 2):
        shared = rows.node[a] == rows.node[b]
        assert bool((rows.action[a][shared] == rows.action[b][shared]).all())
        alike = int((shared & (rows.node[a] >= 0)).sum())
        assert alike in (0, min(segment, int(rows.length[a])))


def test_a_tree_costs_its_edges():
    process = markov(symbols=3, length=8, end=False, seed=3)
    rows = collected(process, SegmentTree(1, 8, 2, 2), prompts=1).trajectories
    assert process.meter.read().forward == len(edges(rows).row) == 2 * 2 + 4 * 2 + 8 * 4


def test_rows_that_ended_are_copied_for_no_step():
    process = markov(symbols=2, length=6, seed=3)
    process.logits.data[..., 0] = 4.0  # nearly all strings end at once
    rows = collected(process, SegmentTree(1, 8, 2, 2), prompts=1).trajectories
    assert len(rows) == 8
    assert process.meter.read().forward == len(edges(rows).row)


def test_vines_start_where_segments_do_and_are_not_kept():
    process = markov(symbols=3, length=5, end=False, seed=3)
    rows = collected(process, Vines(1, 2, segment=2, vines=3), prompts=1).trajectories
    assert len(rows) == 2
    assert process.meter.read().forward == 2 * 5 + 2 * 3 * (5 + 3 + 1)
    before, after, ends = (rows.info[name] for name in ("value_before", "value_after", "ends"))
    assert torch.equal(before[:, 2:4], after[:, :2])
    assert ends.tolist() == [[0, 0, 0, 0, 1]] * 2


def test_a_group_that_failed_is_asked_again_under_its_hint_and_only_then():
    process = markov(symbols=2, length=2, end=False, prompts=4, seed=3)
    asked = []

    def right(completions, prompts):
        asked.append(len(completions))
        return [float(prompt == 0) for prompt in prompts]

    drawn = collected(process, Hinted(2, 3, hints=2), reward=right, hinted=3)
    rows = drawn.trajectories
    assert asked == [6, 2]
    assert rows.source.tolist() == [0] * 6 + [1] * 2
    assert rows.prompt.tolist() == [0] * 3 + [1] * 5
    assert rows.condition["prompt"].tolist() == [0] * 3 + [1] * 5  # scored without the hint
    hinted = rows[6:]
    under = process.score(hinted, context=process.condition([3, 3])).log_prob
    assert torch.equal(hinted.log_prob, under.detach())  # drawn with it
    assert not torch.equal(hinted.log_prob, process.score(hinted).log_prob.detach())


def test_prompts_without_a_hint_are_left():
    process = markov(symbols=2, length=2, end=False, prompts=2, seed=3)
    assert len(collected(process, Hinted(2, 3), reward=lambda completions: [0.0] * len(completions)).samples) == 6


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: SegmentTree(size=6), "SegmentTree.size must be a power of branching=2, at least 2, got 6"),
        (lambda: SegmentTree(size=1), "SegmentTree.size must be a power of branching=2, at least 2, got 1"),
        (lambda: SegmentTree(segment=0), "SegmentTree.segment must be a whole number, at least 1, got 0"),
        (lambda: Vines(vines=0), "Vines.vines must be a whole number, at least 1, got 0"),
        (lambda: Hinted(hints=-1), "Hinted.hints must be a whole number, 0 or more, got -1"),
    ],
)
def test_impossible_plans_are_refused(build, words):
    with pytest.raises(InputError, match=words):
        build()
