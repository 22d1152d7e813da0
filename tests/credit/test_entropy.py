"""Credit by the entropy of turns: small cases by hand, and what turns, holes and padding may and may not change."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from stepwell.batch import Batch
from stepwell.credit.entropy import EntropyModulated
from stepwell.credit.group import GroupCredit
from stepwell.errors import InputError
from stepwell.parts import Constant
from stepwell.process.exact.table import markov
from stepwell.process.models import Models
from stepwell.rng import Rng
from stepwell.training.scoring import fill
from stepwell.trajectories import count, make, pad_steps

ROUNDING = 1e-14  # sums of some tens of terms of order one
SHAPE = (5, 6)


def batch_of(entropy, segment, mask=None, **fields):
    """Rows with these entropies (N, T) and turns; all steps trained unless said."""
    entropy, segment = torch.tensor(entropy, dtype=torch.float64), torch.tensor(segment)
    mask = torch.ones_like(segment, dtype=torch.bool) if mask is None else torch.tensor(mask).bool()
    rows = make(torch.zeros_like(segment), torch.zeros_like(entropy), mask, entropy=entropy, segment=segment, **fields)
    return Batch(rows, count(rows))


def some(seed=1):
    """Rows with holes, turns with gaps in their numbers, rewards and entropies."""
    rng = Rng(seed)
    mask = rng.uniform(*SHAPE) < 0.7
    mask[1, 2:4], mask[3] = False, False
    segment = torch.tensor([[0, 0, 1, 1, 4, 4], [2, 2, 5, 5, 9, 9], [0, 1, 2, 3, 4, 5], [0] * 6, [3] * 6])
    fields = {"reward": rng.normal(SHAPE[0], dtype=torch.float64), "prompt": torch.tensor([0, 0, 1, 1, 1])}
    entropy = rng.uniform(*SHAPE, dtype=torch.float64)
    return batch_of(entropy.tolist(), segment.tolist(), mask.tolist(), **fields)


CREDIT = EntropyModulated(GroupCredit("mean", "std"), 0.7, 1.3, 0.4)


def test_two_turns_of_one_row_by_hand():
    """The first turn is the least sure, the second the surest: h = 1 and 0 but for 1e-8 in 2."""
    batch = batch_of([[1.0, 3.0, 0.0]], [[0, 0, 1]])
    h = 2 / (2 + 1e-8)
    gain = [math.exp(-0.7 * h), 1.0]
    mean = (gain[0] + gain[1]) / 2
    values = [gain[0] / mean + 0.4 * 1.0, gain[1] / mean]
    centre = (values[0] + values[1]) / 2
    found = dataclasses.replace(CREDIT, credit=Constant())(batch)[0].tolist()
    assert found == pytest.approx([values[0] - centre] * 2 + [values[1] - centre], abs=ROUNDING)


def test_the_last_turn_has_no_bonus():
    """Where all turns are equally sure, the others have zeta."""
    batch = batch_of([[0.5] * 4, [0.5] * 4], [[0, 1, 1, 7], [2, 2, 2, 2]])
    found = EntropyModulated(Constant(), zeta=0.3)(batch)
    mean = 2 * 0.3 / 4  # two of four turns are followed by another
    expected = [[0.3 - mean] * 3 + [-mean], [-mean] * 4]
    assert torch.allclose(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=ROUNDING)


def test_steps_of_a_turn_share_their_credit_whose_mean_over_turns_is_zero():
    batch = some()
    found, total, turns = CREDIT(batch), 0.0, 0
    for row, trained in enumerate(batch.rows.mask):
        for number in batch.rows.segment[row][trained].unique():
            own = found[row][trained & (batch.rows.segment[row] == number)]
            assert bool((own == own[0]).all())
            total, turns = total + float(own[0]), turns + 1
    assert turns == 3 + 2 + 1 + int(batch.rows.mask[2].sum())
    assert abs(total) < ROUNDING * turns
    assert not bool((found * ~batch.rows.mask).any())


def test_the_numbers_of_turns_count_by_their_order_only():
    batch = some()
    for numbers in (3 * batch.rows.segment + 100, batch.rows.segment - 50):
        moved = dataclasses.replace(batch, rows=batch.rows.replace(segment=numbers))
        assert torch.equal(CREDIT(moved), CREDIT(batch))


def test_what_stands_in_holes_and_padding_never_matters():
    batch = some()
    found, rows = CREDIT(batch), batch.rows
    holes = rows.replace(entropy=torch.where(rows.mask, rows.entropy, torch.nan))
    assert torch.equal(CREDIT(Batch(holes, batch.counts)), found)
    renamed = rows.replace(segment=torch.where(rows.mask, rows.segment, 99))
    assert torch.equal(CREDIT(Batch(renamed, batch.counts)), found)
    padded = CREDIT(Batch(pad_steps(rows, SHAPE[1] + 2), batch.counts))
    assert torch.equal(padded[:, : SHAPE[1]], found)
    assert not bool(padded[:, SHAPE[1] :].any())


def test_a_turn_is_judged_by_the_mean_of_a_credit_of_steps():
    batch = some()
    steps = Rng(5).normal(*SHAPE, dtype=torch.float64)

    @dataclasses.dataclass(frozen=True)
    class BySteps(Constant):
        def __call__(self, batch):
            return steps

    part = EntropyModulated(BySteps(), k=0.0, zeta=0.0)
    found, rows, means = part(batch), batch.rows, {}
    for row, trained in enumerate(rows.mask):
        for number in rows.segment[row][trained].tolist():
            means[row, number] = float(steps[row][trained & (rows.segment[row] == number)].mean())
    centre = sum(means.values()) / len(means)
    for row, step in rows.mask.nonzero().tolist():
        wanted = means[row, int(rows.segment[row, step])] - centre
        assert float(found[row, step]) == pytest.approx(wanted, abs=ROUNDING)


@pytest.mark.parametrize("steps", [0, 3])
def test_rows_without_a_trained_step_have_credit_zero(steps):
    """Even where no row has one."""
    nothing = [[0.5] * steps] * 2
    batch = batch_of(nothing, [[0] * steps] * 2, [[False] * steps] * 2, reward=torch.tensor([0.0, 4.0]).double())
    assert torch.equal(CREDIT(batch), torch.zeros(2, steps).double())


def test_turns_are_sentences_of_the_process_where_the_rows_have_none():
    process = markov(symbols=3, length=4, end=False, seed=2)
    rows = process.trajectories().replace(reward=torch.arange(81.0).double(), prompt=torch.zeros(81).long())
    with pytest.raises(InputError, match="segment"):
        CREDIT(Batch(rows, count(rows)))
    filled = fill(Models(process), rows, CREDIT.reads, tokens=None)
    assert torch.equal(filled.segment, process.segments(rows))
    assert bool(CREDIT(Batch(filled, count(filled))).isfinite().all())
