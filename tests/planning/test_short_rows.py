"""Branches, trees, candidates and queues on texts, which may end before the step where a row was to part."""

from __future__ import annotations

import pytest
import torch

import stepwell as sw
from stepwell.credit.branches import BranchExtremes, TreeCredit
from stepwell.credit.group import GroupCredit
from stepwell.data.stream import PromptStream
from stepwell.objective.policy import Policy
from stepwell.objective.preference.pairs import Pairing, Pairs
from stepwell.objective.reduction import Reduction
from stepwell.planning.branches import Branches, Candidates, Tree
from stepwell.planning.queue import Queue
from stepwell.planning.windows import Backward
from stepwell.recipe.recipe import Recipe
from stepwell.reward.mixing import Rewards
from stepwell.rng import Rng
from stepwell.sampling.request import Prompt
from stepwell.training.collect import collect

PLANS = {
    "branches": Branches(3, 4, at=(0, 2, 5), first=0),
    "tree": Tree(3, 8, steps=6, first=0),
    "candidates": Candidates(3, 4, steps=6, first=0),
    "backward": Backward(3, 4, steps=6, least=2, first=0),
    "queue": Queue(2, 4, steps=6, first=0),
}
TERMS = {
    "branches": Policy(GroupCredit(keys=("prompt", "origin"))),
    "tree": Policy(TreeCredit(), reduction=Reduction("edge")),
    "candidates": Pairs(pairing=Pairing(keys=("prompt", "origin"))),
    "backward": Policy(BranchExtremes()),
    "queue": Policy(GroupCredit()),
}


def weighed(completions, **columns):
    return [0.37 * sum((place + 1) * symbol for place, symbol in enumerate(text)) % 1 for text in completions]


def grown(plan: str, steps: int = 3):
    model, planner = sw.exact.markov(symbols=3, length=6), PLANS[plan]
    stream = PromptStream([Prompt(0, 0), Prompt(1, 0)], Rng(1))
    for step in range(steps):
        yield collect(model, planner, stream, Rewards(weighed), Rng(2), step).drawn.trajectories


@pytest.mark.parametrize("plan", PLANS)
def test_rows_that_end_early_train_like_all_others(plan):
    model = sw.exact.markov(symbols=3, length=6)
    prompts = [{"prompt": 0, "number": number} for number in range(2)]
    run = sw.train(model, prompts, weighed, Recipe(TERMS[plan], PLANS[plan]), steps=4, learning_rate=0.05)
    assert max(metrics["gradient_norm"] for metrics in run.history) > 1e-3


def test_a_child_parts_at_a_step_that_its_trunk_has():
    for rows in grown("branches"):
        assert bool((rows.mask.sum(1) == 1).all())
        place = rows.mask.int().argmax(1)
        assert bool((place < rows.length).all())
        assert len(rows) == 3 * 3 * 4


def test_a_leaf_that_ended_stands_for_all_it_would_have_parted_into():
    early = 0
    for rows in grown("tree"):
        assert len(rows) == 3 * 8
        last = rows.node.gather(1, rows.length[:, None] - 1)[:, 0]
        for row in range(len(rows)):
            copies = int((last == last[row]).sum())
            early += copies > 1
            length = int(rows.length[row])
            assert copies == (2 ** (3 - length) if length < 3 else 1)  # a window of the first three steps
    assert early


def test_candidates_of_a_row_that_ended_are_not_kept():
    for rows in grown("candidates"):
        assert bool((rows.mask.sum(1) == 1).all())


def test_a_text_that_ends_early_leaves_the_queue_and_is_judged():
    waiting = 0
    for rows in grown("queue", steps=10):
        assert bool(rows.outcome.all())
        waiting = max(waiting, len(PLANS["queue"].waiting))
    assert waiting <= 6 * 2 * 4
    assert bool(PLANS["queue"].waiting.truncated.any())
    PLANS["queue"].waiting = None


def test_a_queue_of_half_precision_states_is_saved_and_read_back():
    process = sw.flow(lambda x, t: x / t, (2,), dtype=torch.float16)
    queue, stream = Queue(1, 2, steps=3), PromptStream([Prompt(0, None)], Rng(0))
    collect(
        process.with_sampler(steps=3), queue, stream, Rewards(lambda completions: [0.0] * len(completions)), Rng(0), 0
    )
    again = Queue(1, 2, steps=3)
    again.load_state_dict(queue.state_dict())
    assert torch.equal(again.waiting.action, queue.waiting.action)
