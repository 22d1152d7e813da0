"""Reductions equal their plain definitions, and shares of a batch add up to the whole whatever the cut."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stepwell.batch import Batch
from stepwell.errors import UnknownName
from stepwell.objective.policy import Policy
from stepwell.objective.reduction import PerPrompt, Reduction, total
from stepwell.objective.surrogate import Score
from stepwell.objective.term import Objective
from stepwell.rng import Rng
from stepwell.trajectories import Counts, count

MODES = ("token", "row", "row-sum", "group", "fixed", "sum")
STEPS = 5


def plain(mode, losses, prompts, length):
    """The loss of a batch from the losses of each row's trained steps, lists of different lengths."""
    flat = [loss for row in losses for loss in row]
    mean = lambda values: sum(values) / max(len(values), 1)  # noqa: E731
    if mode == "token":
        return sum(flat) / max(len(flat), 1)
    if mode == "row":
        return mean([mean(row) for row in losses])
    if mode == "row-sum":
        return mean([sum(row) for row in losses])
    if mode == "group":
        groups = [[loss for row, p in zip(losses, prompts, strict=True) if p == key for loss in row] for key in prompts]
        return mean([mean(group) for group in dict(zip(prompts, groups, strict=True)).values()])
    if mode == "fixed":
        return sum(flat) / (len(losses) * length)
    return sum(flat)


@st.composite
def batches(draw):
    """Rows with holes, some of them empty, in ragged groups."""
    rows = draw(st.integers(1, 6))
    mask = draw(st.lists(st.lists(st.booleans(), min_size=STEPS, max_size=STEPS), min_size=rows, max_size=rows))
    prompts = draw(st.lists(st.integers(0, 2), min_size=rows, max_size=rows))
    return torch.tensor(mask), prompts, draw(st.integers(0, 99))


def made(batch_of, drawn):
    mask, prompts, seed = drawn
    values = Rng(seed).normal(*mask.shape, dtype=torch.float64)
    return batch_of(values, mask=mask, prompt=torch.tensor(prompts), reward=values[:, 0].clone())


@pytest.mark.parametrize("mode", MODES)
@given(drawn=batches())
@settings(deadline=None, max_examples=25)
def test_every_mode_equals_its_plain_definition(batch_of, mode, drawn):
    batch = made(batch_of, drawn)
    losses = [row[kept].tolist() for row, kept in zip(batch.log_prob, batch.rows.mask, strict=True)]
    found = float(total(batch.log_prob, Reduction(mode, 7)(batch)))
    assert found == pytest.approx(plain(mode, losses, drawn[1], 7), abs=1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_what_is_divided_by_are_the_counts_given_not_those_of_the_rows(batch_of, mode):
    batch = batch_of(torch.ones(4, STEPS, dtype=torch.float64), prompt=torch.tensor([0, 0, 1, 1]))
    larger = Batch(batch.rows, Counts(steps=60.0, rows=12.0, groups=6.0, length=STEPS))
    share = 1.0 if mode == "sum" else 1 / 3
    assert torch.allclose(Reduction(mode)(larger), share * Reduction(mode)(batch), rtol=0, atol=1e-15)


def test_a_fixed_length_defaults_to_the_horizon(batch_of):
    batch = batch_of(torch.ones(3, STEPS, dtype=torch.float64))
    longer = Batch(batch.rows, count(batch.rows, length=20))
    assert float(Reduction("fixed")(batch).sum()) == pytest.approx(1.0)
    assert float(Reduction("fixed")(longer).sum()) == pytest.approx(STEPS / 20)


@dataclass(frozen=True)
class LocalCount(Policy):
    """The mistake of dividing by the steps of whatever rows are at hand."""

    def loss(self, batch, targets):
        return super().loss(batch, {**targets, "weight": batch.mask / batch.mask.sum().clamp(min=1)})


def shares(batch, policy, cuts):
    """The loss of the batch, and the sum of the losses of its parts."""
    objective = Objective((policy,))
    targets = objective.plan(batch)
    whole = float(objective.loss(batch, targets).value)
    parts = torch.arange(len(batch)).tensor_split(cuts)
    losses = [
        objective.loss(Batch(batch.rows[i], batch.counts, batch.scores.rows(i)), targets[i]).value
        for i in parts
        if len(i)
    ]
    return whole, float(torch.stack(losses).sum())


@pytest.mark.parametrize("mode", MODES)
@given(drawn=batches(), cuts=st.lists(st.integers(0, 6), max_size=3).map(sorted))
@settings(deadline=None, max_examples=25)
def test_the_shares_of_any_parts_add_up_to_the_whole(batch_of, mode, drawn, cuts):
    whole, added = shares(made(batch_of, drawn), Policy(surrogate=Score(), reduction=Reduction(mode)), cuts)
    assert added == pytest.approx(whole, abs=1e-12)


def test_local_counts_do_not_add_up(batch_of):
    mask = torch.tensor([[True] * 5, [True, False, False, False, False], [True, True, False, False, False]])
    batch = made(batch_of, (mask, [0, 0, 0], 1))
    good, planted = (
        shares(batch, kind(surrogate=Score(), reduction=Reduction("token")), [1, 2]) for kind in (Policy, LocalCount)
    )
    assert good[0] == pytest.approx(good[1], abs=1e-12)
    assert planted[0] == pytest.approx(good[0], abs=1e-12)  # right, as long as nothing is cut
    assert abs(planted[1] - planted[0]) > 0.01


def test_a_step_of_weight_zero_counts_nothing_whatever_its_value():
    values = torch.tensor([[1.0, float("inf"), float("nan")]])
    assert float(total(values, torch.tensor([[2.0, 0.0, 0.0]]))) == 2.0


def test_an_unknown_mode_is_refused():
    with pytest.raises(UnknownName, match="did you mean 'token'"):
        Reduction("tokens")


def test_own_rows_and_others_weigh_alike_in_their_prompt(batch_of):
    mask = torch.tensor([[True, True], [True, False], [True, True], [True, True], [True, False]])
    fields = {"prompt": torch.tensor([0, 0, 0, 1, 1]), "source": torch.tensor([0, 0, 1, 0, 2])}
    batch = batch_of(torch.zeros(5, 2, dtype=torch.float64), mask=mask, **fields)
    expected = [[1 / 8, 1 / 8], [1 / 4, 0], [1 / 4, 1 / 4], [1 / 4, 1 / 4], [1 / 2, 0]]  # two prompts
    assert PerPrompt()(batch).tolist() == expected
