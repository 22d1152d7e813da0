"""Credit where rows share their past: by hand, and on average over the leaves of a tree the policy gradient itself."""

from __future__ import annotations

import math

import pytest
import torch

from stepwell.batch import Batch
from stepwell.check import expectation
from stepwell.credit.branches import BranchExtremes, Pooled, TreeCredit
from stepwell.credit.group import GroupCredit
from stepwell.errors import InputError
from stepwell.objective.reduction import Reduction
from stepwell.process.exact.table import markov
from stepwell.rng import Rng
from stepwell.sampling.request import Prompt, Request
from stepwell.sampling.rollout import rollout
from stepwell.trajectories import concatenate, count, make


def batch(reward, node, mask=None, **fields):
    """Rows with these rewards and nodes (N, T); all steps trained unless said."""
    node = torch.tensor(node)
    mask = node >= 0 if mask is None else torch.tensor(mask).bool()
    action = torch.zeros(node.shape)
    fields = {"prompt": torch.zeros(len(node)).long()} | {k: torch.tensor(v) for k, v in fields.items()}
    rows = make(
        action,
        torch.zeros(node.shape).double(),
        mask,
        node=node,
        reward=torch.tensor(reward, dtype=torch.float64),
        **fields,
    )
    return Batch(rows, count(rows))


TREE = [[0, 1, 3], [0, 1, 4], [0, 2, 5], [0, 2, 6]]


def test_a_step_earns_the_mean_of_its_leaves_less_that_of_its_siblings():
    found = TreeCredit(scale=False)(batch([1.0, 3.0, 10.0, 2.0], TREE))
    expected = [[0, -2, -1], [0, -2, 1], [0, 2, 4], [0, 2, -4]]  # means 2 and 6 of 4, then each leaf of its two
    assert found.tolist() == expected


def test_along_a_row_the_steps_credits_add_up_to_its_reward_less_the_mean():
    reward = Rng(1).normal(8, dtype=torch.float64)
    node = [[0, 1 + leaf // 4, 3 + leaf // 2, 7 + leaf] for leaf in range(8)]
    found = TreeCredit(scale=False)(batch(reward.tolist(), node))
    torch.testing.assert_close(found.sum(1), reward - reward.mean(), rtol=0, atol=1e-14)


def test_scaling_divides_by_the_deviation_of_the_prompts_leaves():
    rewards = [1.0, 3.0, 10.0, 2.0]
    plain, scaled = (TreeCredit(scale=s, epsilon=1e-4)(batch(rewards, TREE)) for s in (False, True))
    torch.testing.assert_close(scaled, plain / (torch.tensor(rewards).double().std() + 1e-4), rtol=1e-12, atol=0)


def test_prompts_are_trees_of_their_own_and_masked_steps_earn_nothing():
    node = [*TREE, *[[n + 7 for n in row] for row in TREE]]
    both = batch([1.0, 3.0, 10.0, 2.0, 0.0, 0.0, 0.0, 5.0], node, prompt=[0] * 4 + [1] * 4)
    found = TreeCredit(scale=False)(both)
    assert found[:4].tolist() == TreeCredit(scale=False)(batch([1.0, 3.0, 10.0, 2.0], TREE)).tolist()
    assert found[4:].tolist() == [[0, -1.25, 0], [0, -1.25, 0], [0, 1.25, -2.5], [0, 1.25, 2.5]]
    mask = [[0, 1, 0]] * 8
    masked = TreeCredit(scale=False)(batch(both.rows.reward.tolist(), node, mask, prompt=[0] * 4 + [1] * 4))
    assert masked[:, 1].tolist() == found[:, 1].tolist()
    assert not masked[:, [0, 2]].any()


def test_rows_of_other_lengths_are_no_siblings_after_their_end():
    node = [[0, 1, -1], [0, 2, 3], [0, 2, 4]]
    found = TreeCredit(scale=False)(batch([3.0, 0.0, 6.0], node))
    assert found.tolist() == [[0, 0, 0], [0, 0, -3], [0, 0, 3]]


def test_plain_rows_are_a_tree_of_depth_one():
    rewards = [1.0, 5.0, 6.0]
    found = TreeCredit(scale=False)(batch(rewards, [[0, 1], [2, 3], [4, 5]]))
    assert found.tolist() == [[-3, 0], [1, 0], [2, 0]], "the first step parts them, the others have no siblings"
    one = TreeCredit(scale=True)(batch([2.0], [[0, 1]]))
    assert not one.any()


def tree_of_strings(model, rng):
    """Four strings of two symbols: two draws of the first, and two of the second below each."""
    rows = rollout(model, [Request(Prompt(0, 0), 1)], rng.split(0)).trajectories
    more = rollout(model, [Request(Prompt(0, 0), 1)], rng.split(1), first_node=int(rows.node.max()) + 1).trajectories
    rows = concatenate([rows, more])
    requests = [Request(Prompt(0, 0), 1, start=(row, 1)) for row in range(2)]
    return concatenate([rows, rollout(model, requests, rng.split(2), so_far=rows).trajectories])


def gradient_of_tree(model, reward, credit, mode="edge"):
    """The exact expectation of sum W A d log p over trees, by enumeration."""

    def program(rng):
        rows = tree_of_strings(model, rng)
        rows = rows.replace(reward=torch.tensor([reward[tuple(t)] for t in rows.action.tolist()]).double())
        found = Batch(rows, count(rows))
        weight = Reduction(mode)(found) * credit(found)
        return torch.autograd.grad((weight * model.score(rows).log_prob).sum(), model.logits)[0]

    return expectation(program)


def test_a_trees_credit_is_half_the_policy_gradient_of_each_step():
    """Of two siblings each step earns half its leaves' difference: 1 - 1/K = 1/2 of the policy gradient in expectation.

    Two first and four second steps, of which `edge` takes the mean: the first symbol's gradient counts 2/6, the
    second's 4/6.
    """
    model = markov(symbols=2, length=2, end=False, seed=4)
    reward = {text: float(value) for text, value in zip(model.strings(), Rng(5).normal(4).tolist(), strict=True)}
    found = gradient_of_tree(model, reward, TreeCredit(scale=False))
    probability = model.string_probabilities().detach()
    rows = model.trajectories()
    value = torch.tensor([reward[text] for text in model.strings()]).double()
    log_prob = model.score(rows).log_prob
    parts = [
        torch.autograd.grad((probability * value * log_prob[:, k]).sum(), model.logits, retain_graph=True)[0]
        for k in (0, 1)
    ]
    expected = 0.5 * (2 / 6 * parts[0] + 4 / 6 * parts[1])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_a_planted_credit_that_compares_all_leaves_at_every_step_is_not():
    model = markov(symbols=2, length=2, end=False, seed=4)
    reward = {text: float(value) for text, value in zip(model.strings(), Rng(5).normal(4).tolist(), strict=True)}
    right = gradient_of_tree(model, reward, TreeCredit(scale=False))

    class Flat(TreeCredit):
        def __call__(self, batch):
            return GroupCredit("mean")(batch)[:, None] * batch.mask

    assert float((gradient_of_tree(model, reward, Flat()) - right).abs().max()) > 1e-3


# several judgements of one step


def pooled(rewards, sources, **settings):
    """Two children of one state, each judged by as many ends as there are sources."""
    children = len(rewards) // sources
    node = [[0, 1 + i % children, 10 + i] for i in range(len(rewards))]
    mask = [[False, True, False]] * len(rewards)
    source = [i // children for i in range(len(rewards))]
    return batch(rewards, node, mask, source=source)


def test_judgements_of_a_shared_step_are_standardised_apart_and_added():
    found = Pooled(GroupCredit("mean", keys=("prompt", "origin", "source")))(pooled([1.0, 3.0, 20.0, 10.0], 2))
    assert found.tolist() == [4.0, -4.0, 4.0, -4.0]  # -1 + 5 and 1 - 5


def test_pooling_one_judgement_is_the_credit_itself():
    plain = GroupCredit("mean", "std", keys=("prompt", "origin", "source"))
    rows = pooled([1.0, 3.0, 7.0], 1)
    torch.testing.assert_close(Pooled(plain)(rows), plain(rows), rtol=0, atol=0)


def test_a_shared_step_is_trained_once_by_the_sum_of_its_judgements():
    rows = pooled([1.0, 3.0, 20.0, 10.0], 2)
    weight = Reduction("edge")(rows)
    assert weight[:, 1].tolist() == [0.25] * 4  # two steps, each shared by two rows
    credit = Pooled(GroupCredit("mean", keys=("prompt", "origin", "source")))(rows)
    assert (weight[:, 1] * credit)[[0, 2]].sum() == 0.5 * 4.0


# the best and the worst of a branch


def test_only_the_best_and_the_worst_branch_of_a_state_count():
    """And only beyond the thresholds."""
    node = [[0, 1 + i] for i in range(3)] + [[10, 11 + i] for i in range(3)]
    mask = [[False, True]] * 6
    reward = [4.0, 0.0, -4.0, 0.5, 0.0, 0.1]
    found = BranchExtremes()(batch(reward, node, mask))
    values = torch.tensor(reward, dtype=torch.float64)
    z = (values - values.mean()) / (values.std() + 1e-4)
    assert z[0] > 0.7 > z[3]
    assert z[2] < -0.7
    expected = torch.stack([z[0], z[1] * 0, z[2], *([z[0] * 0] * 3)])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_extremes_of_each_branch_are_kept_and_bounded():
    node = [[0, 1 + i] for i in range(2)] + [[10, 11 + i] for i in range(2)]
    part = BranchExtremes(positive=0.0, negative=0.0, bound=1.0)
    found = part(batch([5.0, -5.0, 1.0, -1.0], node, [[False, True]] * 4))
    deviation = math.sqrt((25 + 25 + 1 + 1) / 3) + 1e-4
    assert found.tolist() == pytest.approx([1.0, -1.0, 1 / deviation, -1 / deviation], abs=1e-12)


def test_branches_of_other_prompts_are_other_branches_even_at_the_root():
    mask = [[True, True]] * 4
    part = BranchExtremes(positive=0.0, negative=0.0)
    node = [[2 * i, 2 * i + 1] for i in range(4)]
    found = part(batch([5.0, 1.0, 3.0, -3.0], node, mask, prompt=[0, 0, 1, 1]))
    assert (found != 0).tolist() == [True] * 4


def test_origins_are_the_nodes_before_the_first_trained_step():
    rows = batch([0.0] * 3, [[0, 1, 2], [0, 3, 4], [0, 5, 6]], [[0, 1, 0], [0, 0, 1], [1, 0, 0]])
    assert rows.origin.tolist() == [0, 3, -1]
    with pytest.raises(InputError, match="was not filled in"):
        rows.field("old_mean")


def test_no_credit_depends_on_the_order_of_rows():
    node = [[0, 1 + leaf // 4, 3 + leaf // 2, 7 + leaf] for leaf in range(8)]
    reward = Rng(2).normal(8, dtype=torch.float64).tolist()
    mask = [[False, True, True, True]] * 8
    order = [3, 1, 7, 0, 2, 6, 5, 4]
    for part in (TreeCredit(), Pooled(GroupCredit("mean")), BranchExtremes(0.0, 0.0)):
        straight = part(batch(reward, node, mask))
        mixed = part(batch([reward[i] for i in order], [node[i] for i in order], mask))
        torch.testing.assert_close(mixed, straight[order], rtol=0, atol=1e-14)
