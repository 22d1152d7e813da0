"""Measured values of prefixes: the value after a step is that of the row with it, and the outcome where it ends."""

from __future__ import annotations

import torch

from stepwell.batch import Batch
from stepwell.columns import Columns
from stepwell.credit.prefixes import PrefixValues, StepValues
from stepwell.rng import Rng
from stepwell.trajectories import count, make


def measured():
    """Three rows with holes, whose last two steps are the segment that they end with."""
    rng, mask = Rng(1), torch.tensor([[1, 1, 1, 0], [1, 0, 1, 1], [0, 0, 0, 0]]).bool()
    before, after = (rng.normal(3, 4, dtype=torch.float64) for _ in range(2))
    ends = torch.tensor([[0.0, 0.0, 1.0, 1.0]]).expand(3, 4).contiguous()
    info = Columns({"value_before": before, "value_after": after, "ends": ends}, 3)
    reward = torch.tensor([2.0, -1.0, 7.0], dtype=torch.float64)
    rows = make(torch.zeros(3, 4).long(), torch.zeros(3, 4).double(), mask, reward=reward, info=info)
    return Batch(rows, count(rows)), before, after


def test_a_step_is_worth_the_value_after_it_and_the_outcome_at_the_end():
    batch, _, after = measured()
    expected = torch.stack([after[:, 0], after[:, 1], batch.reward, batch.reward], 1) * batch.mask
    assert torch.equal(StepValues()(batch), expected)


def test_an_advantage_is_what_a_step_adds_to_the_value_before_it():
    batch, before, _ = measured()
    assert torch.equal(PrefixValues()(batch), (StepValues()(batch) - before) * batch.mask)
