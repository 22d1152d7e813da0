"""Rows that do not start at their prompt: completions written elsewhere, and rows of an earlier rollout that go on."""

import pytest
import torch

from stepwell.errors import InputError, MissingAbility
from stepwell.meter import Meter
from stepwell.process.base import Process
from stepwell.process.exact.table import markov
from stepwell.rng import Rng
from stepwell.sampling.request import Completion, Continuation, Prompt, Request
from stepwell.sampling.rollout import rollout
from stepwell.trajectories import pad_steps

MODEL = markov(symbols=3, length=4, prompts=2, end=False, seed=1)
FIRST, SECOND = Prompt(0, 0), Prompt(1, 1)


# completions


def test_nothing_is_drawn_for_a_completion_of_log_probability_zero():
    drawn = rollout(MODEL, [Request(FIRST, 2, start=Completion((1, 2, 0, 2)))], Rng(0))
    rows = drawn.trajectories
    assert rows.action.tolist() == [[1, 2, 0, 2]] * 2
    assert rows.mask.all()
    assert not rows.log_prob.any()
    assert not rows.truncated.any()
    assert drawn.samples.values == [(1, 2, 0, 2)] * 2


def test_a_mask_says_which_steps_of_a_completion_are_trained():
    given = Completion((1, 2, 0, 2), mask=[True, False, False, True])
    requests = [Request(FIRST, 1, start=given), Request(FIRST, 2), Request(SECOND, 1, start=Completion((0, 1)))]
    rows = rollout(MODEL, requests, Rng(0)).trajectories
    trained = [True, False, False, True]
    assert rows.mask.tolist() == [trained, *[[True] * 4] * 2, [True, True, False, False]]
    assert rows.length.tolist() == [4, 4, 4, 2]
    assert bool((rows.node[0] >= 0).all()), "steps that are not trained happened all the same"
    assert bool(MODEL.score(rows).log_prob[0, 1:3].eq(0).all())


def test_segments_of_a_completion_reach_the_rows():
    rows = rollout(MODEL, [Request(FIRST, 2, start=Completion((1, 1, 0, 2), segments=[0, 0, 1, 2]))], Rng(0))
    assert rows.trajectories.segment.tolist() == [[0, 0, 1, 2]] * 2


def test_rows_beside_completions_have_the_segments_of_the_process():
    given, plain = Completion((1, 1, 0, 2), segments=[0, 0, 0, 7]), Completion((2, 1, 0))
    requests = [Request(FIRST, 3), Request(FIRST, 1, start=given), Request(SECOND, 1, start=plain)]
    rows = rollout(MODEL, requests, Rng(0)).trajectories
    assert rows.segment[3].tolist() == [0, 0, 0, 7]
    others = torch.tensor([0, 1, 2, 4])
    happened = rows.node[others] >= 0
    assert torch.equal(rows.segment[others][happened], MODEL.segments(rows[others])[happened])
    assert not torch.equal(rows.segment[3], MODEL.segments(rows[3:4])[0]), "the process would have said otherwise"


@pytest.mark.parametrize("name", ["mask", "segments"])
@pytest.mark.parametrize("entries", [[1], [1, 1, 1, 1]])
def test_a_mask_and_segments_have_one_entry_a_step(name, entries):
    start = Completion((1, 2, 0), **{name: entries})
    said = rf"Completion.{name} must have 3 entries, .* got {len(entries)} \(prompt 1\)"
    with pytest.raises(InputError, match=said):
        rollout(MODEL, [Request(SECOND, 1, start=start)], Rng(0))


class Mute(Process):
    """Draws what the table draws, and can neither read completions nor tell segments."""

    def __init__(self):
        self.module, self.meter = MODEL.module, Meter()
        self.start, self.propose, self.advance = MODEL.start, MODEL.propose, MODEL.advance
        self.finish, self.condition = MODEL.finish, MODEL.condition

    start = propose = advance = finish = score = lambda self, *given: None


def test_a_process_that_cannot_read_completions_is_named():
    with pytest.raises(MissingAbility, match=r"A completion that is given needs .* encode_completion; Mute has none"):
        rollout(Mute(), [Request(FIRST, 1, start=Completion((1, 2)))], Rng(0))


# continuations


def earlier(**changes):
    rows = rollout(MODEL, [Request(FIRST, 2, horizon=2)], Rng(0)).trajectories
    return rows.replace(condition=None, **changes)


def test_a_continuation_goes_on_from_the_row_and_keeps_its_record():
    row = earlier()[1:2]
    rows = rollout(MODEL, [Request(FIRST, 3, start=row)], Rng(1)).trajectories
    assert rows.length.tolist() == [4] * 3
    assert torch.equal(rows.action[:, :2], row.action[:, :2].expand(3, 2))
    torch.testing.assert_close(MODEL.score(rows).log_prob.detach(), rows.log_prob, rtol=0, atol=1e-14)


def test_rows_of_different_widths_begin_side_by_side():
    row = earlier()[:1]
    requests = [Request(FIRST, 1, start=Continuation(pad_steps(row, width))) for width in (2, 3, 4)]
    rows = rollout(MODEL, requests, Rng(1), rows_at_once=3).trajectories
    assert rows.length.tolist() == [4] * 3
    torch.testing.assert_close(MODEL.score(rows).log_prob.detach(), rows.log_prob, rtol=0, atol=1e-14)


@pytest.mark.parametrize("width", [2, 3, 4])
def test_the_segments_of_a_row_that_went_on_are_not_those_of_its_beginning(width):
    """However wide the row was padded: its padding says nothing of the steps that took its place."""
    row = pad_steps(earlier(segment=torch.tensor([[0, 5], [0, 5]]))[:1], width)
    assert rollout(MODEL, [Request(FIRST, 1, start=row, horizon=width + 2)], Rng(1)).trajectories.segment is None
    whole = rollout(MODEL, [Request(FIRST, 1, start=row, horizon=2)], Rng(1)).trajectories
    assert whole.segment.tolist() == [[0, 5]], "a row that did not go on keeps its own"


def test_weighted_rows_are_not_gone_through_again():
    row = earlier(weight=torch.ones(2, dtype=torch.float64))[:1]
    with pytest.raises(InputError, match="continue a Snapshot"):
        rollout(MODEL, [Request(FIRST, 1, start=row)], Rng(1))
