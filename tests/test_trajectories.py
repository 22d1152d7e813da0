"""The batch that everything passes around: padding, joining, shared steps and counts."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stepwell.columns import Columns
from stepwell.errors import InputError
from stepwell.process.exact.table import markov
from stepwell.rng import Rng
from stepwell.sampling.request import Prompt, Request
from stepwell.sampling.rollout import rollout
from stepwell.trajectories import STEP_FIELDS, concatenate, count, edges, make, pad_steps, to_tensors


def rows(lengths, seed=0, **fields):
    rng, steps = Rng(seed), max(lengths)
    mask = torch.arange(steps) < torch.tensor(lengths)[:, None]
    action = rng.categorical(torch.ones(len(lengths) * steps, 5)).reshape(mask.shape) * mask
    return make(action, rng.normal(*mask.shape, dtype=torch.float64) * mask, mask, **fields)


def test_by_default_each_row_is_a_complete_prompt_of_its_own():
    batch = rows([2, 3])
    assert batch.length.tolist() == [2, 3]
    assert batch.prompt.tolist() == [0, 1]
    assert batch.node.tolist() == [[0, 1, -1], [3, 4, 5]]
    assert batch.outcome.all()
    assert not batch.truncated.any()
    assert not batch.weight.any()


def test_length_counts_deterministic_steps_between_random_ones():
    batch = make(torch.zeros(1, 4), torch.zeros(1, 4), torch.tensor([[True, False, True, False]]))
    assert batch.length.tolist() == [3]
    assert batch.node.tolist() == [[0, 1, 2, -1]]


def test_rows_without_steps_are_trajectories_too():
    batch = make(torch.zeros(2, 0, dtype=torch.long), torch.zeros(2, 0), torch.zeros(2, 0))
    assert batch.length.tolist() == [0, 0]
    assert len(edges(batch).count) == 0


def full(lengths):
    """Rows with every field filled."""
    batch = rows(lengths)
    shape = batch.mask.shape
    steps = {name: torch.rand(shape) for name in STEP_FIELDS if getattr(batch, name) is None}
    info = {"row": torch.rand(shape[0]), "step": torch.rand(shape), "wide": torch.rand(*shape, 3)}
    return batch.replace(
        **steps,
        reward=torch.rand(shape[0]),
        rewards=torch.rand(shape[0], 2),
        condition=Columns({"tokens": torch.rand(shape[0], 4), "class": torch.arange(shape[0])}),
        info=Columns(info, shape[0]),
    )


def same(one, two):
    left, right = to_tensors(one), to_tensors(two)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(0, 3))
def test_padding_adds_steps_that_never_happened_and_changes_no_other(lengths, extra):
    batch = full(lengths)
    steps = batch.mask.shape[1]
    wide = pad_steps(batch, steps + extra)
    for name in STEP_FIELDS:
        before, after = getattr(batch, name), getattr(wide, name)
        assert torch.equal(after[:, :steps], before)
        assert (after[:, steps:] == (-1 if name == "node" else 0)).all()
    assert torch.equal(wide.info["step"][:, :steps], batch.info["step"])
    assert wide.info["wide"].shape == (len(lengths), steps + extra, 3)
    assert torch.equal(wide.info["row"], batch.info["row"])
    for name in ("length", "prompt", "reward", "rewards"):
        assert torch.equal(getattr(wide, name), getattr(batch, name))


def test_padding_keeps_the_type_of_every_field():
    batch = rows([2, 1])
    wide = pad_steps(batch, 5)
    for name in ("action", "log_prob", "mask", "node"):
        assert getattr(wide, name).dtype == getattr(batch, name).dtype


def test_padding_to_fewer_steps_is_refused():
    with pytest.raises(InputError, match="steps must be at least the 3"):
        pad_steps(rows([3]), 2)


def test_joined_rows_are_the_parts_one_after_another():
    parts = [full([1, 3]), full([2]), full([3, 4, 1])]
    joined = concatenate(parts, renumber=True)
    assert len(joined) == 6
    place = 0
    for part in parts:
        here = joined[place : place + len(part)]
        steps = part.mask.shape[1]
        for name in set(STEP_FIELDS) - {"node"}:
            assert torch.equal(getattr(here, name)[:, :steps], getattr(part, name))
        assert torch.equal(here.rewards, part.rewards)
        place += len(part)
    assert joined.mask.shape == (6, 4)


def test_parts_of_unequal_width_join_whatever_fields_they_lack():
    joined = concatenate([rows([2]), rows([5]), rows([1])])
    assert joined.mask.sum(1).tolist() == [2, 5, 1]
    assert joined.reward is None


def test_conditions_are_aligned_on_the_left_and_steps_on_the_right():
    def one(width, steps):
        condition = Columns({"tokens": torch.ones(1, width), "class": torch.ones(1)})
        return rows([steps]).replace(condition=condition)

    joined = concatenate([one(1, 3), one(3, 1)])
    assert joined.condition["tokens"].tolist() == [[0, 0, 1], [1, 1, 1]]
    assert joined.condition["class"].tolist() == [1, 1]
    assert joined.mask.tolist() == [[True, True, True], [True, False, False]]


def test_parts_that_know_nothing_of_each_other_share_no_node_once_renumbered():
    parts = [rows([2, 2]), rows([2]), rows([1, 3])]
    joined = concatenate(parts, renumber=True)
    assert edges(joined).count.tolist() == [1] * 10
    assert len(edges(concatenate(parts)).count) < 10  # as parts of one rollout they share what has the same number


def test_parts_of_which_only_some_were_scored_are_refused_by_name():
    with pytest.raises(InputError, match="reward"):
        concatenate([rows([1]), rows([1]).replace(reward=torch.ones(1))])
    info = [rows([1]).replace(info=Columns({name: torch.ones(1)})) for name in "ab"]
    with pytest.raises(InputError, match=r"info\['a'\], info\['b'\]"):
        concatenate(info)


def branched():
    """Two rows of a prompt, and two that branch off the first after its first two steps."""
    model, prompt = markov(symbols=3, length=4, end=False), Prompt(0, 0)
    first = rollout(model, [Request(prompt, 2)], Rng(0))
    more = rollout(model, [Request(prompt, 2, start=(0, 2))], Rng(1), so_far=first.trajectories)
    return (first + more).trajectories


def test_a_shared_step_is_listed_once_with_the_number_of_its_rows():
    batch = branched()
    found = edges(batch)
    assert len(found.count) == 2 * 4 + 2 * 2  # eight steps of the first rows, two new ones of each branch
    assert found.count.sum() == batch.mask.sum()
    assert sorted(found.count.tolist()) == [1] * 10 + [3, 3]
    shared = (found.count == 3).nonzero()[:, 0]
    assert found.row[shared].tolist() == [0, 0]
    assert sorted(found.step[shared].tolist()) == [0, 1]


def test_every_step_leads_to_the_edge_where_it_is_found_first():
    batch = branched()
    found = edges(batch)
    for row in range(len(batch)):
        for step in range(int(batch.length[row])):
            edge = int(found.index[row, step])
            origin = int(found.row[edge]), int(found.step[edge])
            assert origin[1] == step
            assert batch.node[origin] == batch.node[row, step]
            assert batch.action[origin] == batch.action[row, step]
            assert origin <= (row, step)
    assert (found.index == -1).eq(batch.node == -1).all()


def test_a_node_shared_by_mistake_would_be_counted_as_shared():
    batch = rows([2, 2])
    wrong = batch.replace(node=batch.node.clone().fill_(7))
    assert edges(wrong).count.tolist() == [4]


def test_counts_are_those_of_the_whole_batch():
    batch = rows([1, 3, 2], prompt=torch.tensor([0, 0, 4]))
    whole = count(batch)
    assert (whole.steps, whole.rows, whole.groups, whole.length, whole.pairs) == (6.0, 3.0, 2.0, 3.0, 0.0)
    assert count(pad_steps(batch, 9), length=3.0) == whole
    assert count(batch.replace(mask=torch.zeros_like(batch.mask))).steps == 1.0  # nothing is divided by zero
