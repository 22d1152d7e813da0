"""The figures that cards of credit methods give, and their parts by themselves."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import pytest
import torch

from stepwell import methods
from stepwell.batch import Batch, Read
from stepwell.check.methods import TOLERANCE
from stepwell.check.oracles.credit.gradients import gradient_of, plain, written_out
from stepwell.check.oracles.credit.rollouts import ascent, drawn, exact, expected_ascent, small
from stepwell.check.oracles.expected import expected_gradient, uneven
from stepwell.check.oracles.provable import deviation, policy_of
from stepwell.credit.baseline import GreedyBaseline, Informative
from stepwell.credit.branches import TreeCredit
from stepwell.credit.columns import answer_entropy
from stepwell.credit.contest import WinRate, pairs_within
from stepwell.credit.prefixes import PrefixValues
from stepwell.objective.gates.selection import widest
from stepwell.planning.measured import Vines, WithGreedy
from stepwell.planning.trees import SegmentTree
from stepwell.rng import Rng
from stepwell.trajectories import count

# what cards say in numbers


@pytest.mark.parametrize(("name", "figures"), [("opo", (0.54, 0.37)), ("otb", (0.59, 0.41))])
def test_a_baseline_that_holds_the_sample_is_off_by_what_the_card_says(name, figures):
    process, reward = uneven()
    true = gradient_of(process, (process.string_probabilities() * reward).sum())
    for size, figure in zip((2, 3), figures, strict=True):
        found = expected_gradient(process, policy_of(methods.get(name), variant="published"), size, reward)
        assert abs(deviation(found, true) - figure) < 0.005
        assert f"{100 * figure:.0f} %" in methods.get(name).note


def test_verl_counts_rows_that_all_succeed():
    assert "0.4 times" in methods.get("gpg").note
    _, batch = written_out()
    rows = batch.rows[torch.arange(10)].replace(
        prompt=torch.arange(5).repeat_interleave(2),
        reward=torch.tensor([1.0, 0, 1, 1, 1, 1, 0, 0, 0, 0], dtype=torch.float64),
    )
    batch = dataclasses.replace(batch, rows=rows)
    paper, verl = (float(Informative(nonzero)(batch)[0]) for nonzero in (False, True))
    assert (paper, verl) == (5.0, 2.0)


def test_empg_without_a_gain_is_grpo_on_rows_of_one_turn():
    """A row of one turn has no bonus."""
    process, reward = uneven()
    one = torch.zeros(len(reward), process.length, dtype=torch.long)
    found, plain = (
        expected_gradient(process, policy, 2, reward, fields={"segment": one})
        for policy in (policy_of(methods.get("empg"), k=0.0), policy_of(methods.get("grpo")))
    )
    assert deviation(found, plain) < TOLERANCE


def test_cards_state_what_their_oracles_prove():
    """`tree_gradient` and `hinted_gradient` hold these numbers to 1e-9."""
    assert all(words in methods.get("treepo").note for words in ("0.250", "0.625", "both with all of it"))
    assert "1 + (1 - p)^G / 2" in methods.get("guide").note


# parts by themselves


def test_cyclic_preferences_have_the_exact_gradient_of_self_play():
    """Rock, paper, scissors by length: no number ranks them."""

    @dataclass(frozen=True)
    class Cycle(WinRate):
        def _wins(self, batch, left, right):
            turn = (batch.reward[left] - batch.reward[right]).round() % 3
            return torch.where(turn == 1, 1.0, torch.where(turn == 2, 0.0, 0.5)).double()

    process, _ = uneven()
    length = torch.tensor([float(len(text)) for text in process.strings()], dtype=torch.float64)
    turn = (length[:, None] - length) % 3
    wins = torch.where(turn == 1, 1.0, torch.where(turn == 2, 0.0, 0.5)).double()
    probability = process.string_probabilities()
    true = gradient_of(process, (probability[:, None] * probability.detach() * wins).sum())
    policy = dataclasses.replace(policy_of(methods.get("spo-self-play")), credit_of=Cycle())
    assert deviation(expected_gradient(process, policy, 2, length), true) < TOLERANCE


def test_pairs_within_groups_are_all_ordered_pairs():
    group = torch.tensor([2, 0, 1, 0, 2, 2])
    left, right = pairs_within(group, 3)
    found = sorted(zip(left.tolist(), right.tolist(), strict=True))
    assert found == [(a, b) for a in range(6) for b in range(6) if a != b and group[a] == group[b]]


def test_the_widest_subset_need_not_take_as_many_from_either_end():
    values = torch.tensor([-3, -0.1, -0.05, 2, 2.1, 2.2], dtype=torch.float64)
    assert values[widest(values, 4)].tolist() == [-3, 2, 2.1, 2.2]


def test_answers_that_all_agree_have_no_entropy_and_two_halves_a_bit():
    _, batch = written_out()
    rows = batch.rows[torch.arange(8)].replace(prompt=torch.tensor([0] * 4 + [1] * 4))
    answers = torch.tensor([1.0, 1, 1, 1, 1, 1, 2, 2], dtype=torch.float64)
    found = answer_entropy(dataclasses.replace(batch, rows=rows), answers)
    assert found.tolist() == [0.0] * 4 + [1.0] * 4


def test_steps_inside_a_segment_have_no_siblings_for_a_credit_by_steps():
    """Why segments have a credit of their own: TreeCredit trains the first step of each alone."""
    process = small(length=2)
    tree = SegmentTree(prompts=1, size=2, branching=2, segment=2)
    policy = plain(TreeCredit(scale=False))
    first = process._contexts(process.trajectories().action)[0, 0]
    found = expected_ascent(process, policy, tree)
    later = torch.arange(process.contexts) != first
    assert float(found[:, later].abs().max()) < 1e-12 < float(exact(process)[:, later].abs().max())


def test_the_greedy_baseline_is_noted_for_each_prompt():
    """It reads nothing else."""
    rows = drawn(small(), WithGreedy(prompts=1, size=3), Rng(3))
    assert len(rows) == 3
    assert len(rows.info["greedy"].unique()) == 1
    slope = ascent(small(), policy_of(methods.get("remax")), rows)
    assert bool(slope.isfinite().all())
    assert GreedyBaseline().reads == {Read("rows", "greedy")}


def test_vine_credits_add_up_to_the_outcome_less_the_roots_value():
    process = small(length=5, end=True, seed=6)
    for segment in (1, 2, 3):
        rows = drawn(process, Vines(1, 3, segment=segment, vines=2), Rng(segment))
        values = PrefixValues()(Batch(rows, count(rows)))
        for row in range(len(rows)):
            starts = range(0, int(rows.length[row]), segment)
            total = sum(float(values[row, place]) for place in starts)
            assert abs(total - float(rows.reward[row] - rows.info["value_before"][row, 0])) < 1e-12
