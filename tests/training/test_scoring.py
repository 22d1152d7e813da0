"""Reads of a method are filled by the model they are of; those of the rows are left alone."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

import stepwell as sw
from stepwell.batch import Batch, Read
from stepwell.columns import Columns
from stepwell.errors import InputError, MissingAbility
from stepwell.objective.policy import Policy
from stepwell.objective.surrogate import Score
from stepwell.parts import Part
from stepwell.planning.groups import Groups
from stepwell.process.exact.table import markov
from stepwell.process.models import Models
from stepwell.rng import Rng
from stepwell.training.distribute import World
from stepwell.training.scoring import fill, score_everywhere, score_in_pieces
from stepwell.trajectories import count

SEEDS = {"policy": 1, "reference": 2, "teacher": 3}


@pytest.fixture
def models():
    return Models(*(markov(symbols=3, length=3, seed=seed).with_value_head() for seed in SEEDS.values()))


@pytest.fixture
def rows():
    return markov(symbols=3, length=3, seed=1).trajectories()


@pytest.mark.parametrize(
    ("read", "name"),
    [
        (Read("policy", "log_prob"), "old_log_prob"),
        (Read("policy", "value"), "value"),
        (Read("policy", "entropy"), "entropy"),
        (Read("policy", "final_value"), "final_value"),
        (Read("policy", "sum_of_squares"), "old_sum_of_squares"),
        (Read("reference", "log_prob"), "reference_log_prob"),
        (Read("reference", "value"), "reference_value"),
        (Read("teacher", "logits"), "teacher_logits"),
    ],
)
def test_a_read_is_the_score_of_its_model_under_its_name(models, rows, read, name):
    """A field of the rows where they have one of the name, else an entry of `info`."""
    assert read.name == name
    cut = rows.replace(truncated=torch.ones(len(rows)).bool())  # so that every row has a final value
    batch = Batch(fill(models, cut, {read}, tokens=5), count(rows))
    need = {read.need} - {"log_prob"}
    expected = models.of(read.of).score(rows, need)[read.need].detach()
    assert torch.equal(batch.read(read), expected)
    assert torch.equal(batch.field(name), expected)


def test_each_model_scores_the_rows_once(models, rows):
    reads = {Read(of, need) for of in SEEDS for need in ("log_prob", "logits", "entropy")}
    fill(models, rows, reads, tokens=None)
    for of in SEEDS:
        assert models.of(of).meter.spent.forward == int(rows.mask.sum())


def test_reads_of_the_rows_are_left_alone(models, rows):
    """A planner's note or a column of the data is there or it is missed, by name, by the part that reads it."""
    read = Read("rows", "greedy")
    bare = fill(models, rows, {read}, tokens=None)
    assert bare is rows
    assert models.policy.meter.spent.forward == 0
    with pytest.raises(InputError, match="reads 'greedy' of the rows, which was not filled in; declare it in `reads`"):
        Batch(bare, count(rows)).read(read)
    noted = rows.replace(info=Columns({"greedy": torch.ones(len(rows))}))
    assert bool(Batch(fill(models, noted, {read}, tokens=None), count(rows)).read(read).all())


def test_segments_are_asked_of_the_process_where_the_rows_have_none(models, rows):
    read = Read("rows", "segment")
    filled = fill(models, rows, {read, Read("policy", "log_prob")}, tokens=None)
    assert torch.equal(filled.segment, models.policy.segments(rows))
    own = rows.replace(segment=torch.zeros_like(rows.action))
    assert torch.equal(fill(models, own, {read}, tokens=None).segment, own.segment)


def test_entries_that_a_term_drew_are_not_scored_again(models, rows):
    drawn = rows.replace(points=Columns({"teacher_ids": torch.ones(len(rows))}))
    assert fill(models, drawn, {Read("teacher", "ids")}, tokens=None) is drawn


def test_what_was_in_info_stays_there(models, rows):
    noted = rows.replace(info=Columns({"greedy": torch.ones(len(rows))}))
    filled = fill(models, noted, {Read("teacher", "log_prob")}, tokens=None)
    assert set(filled.info.keys()) == {"greedy", "teacher_log_prob"}


@pytest.mark.parametrize("of", ["reference", "teacher"])
def test_a_model_that_is_missing_is_named(models, rows, of):
    with pytest.raises(MissingAbility, match=of):
        fill(Models(models.policy), rows, {Read(of, "log_prob")}, tokens=None)


def test_scores_do_not_depend_on_how_they_are_cut(models, rows):
    rows = rows[Rng(1).permutation(len(rows))]
    needs = ["entropy", "kl"]
    whole = score_in_pieces(models, rows, needs, None)
    for tokens in (1, 4, 1000):
        pieces = score_in_pieces(models, rows, needs, tokens)
        for need in ("log_prob", *needs):
            assert torch.allclose(pieces[need], whole[need], rtol=0, atol=1e-14)
    everywhere = score_everywhere(models, rows, {"log_prob", *needs}, None, World())
    assert all(torch.equal(everywhere[need], whole[need]) for need in ("log_prob", *needs))


def test_a_part_that_reads_a_note_without_declaring_it_is_told_so():
    """In a run as in a check; a note that is declared is read."""

    @dataclass
    class Noting(Groups):
        def note(self, so_far):
            return {"standing": torch.ones(len(so_far), dtype=so_far.log_prob.dtype)}

    @dataclass(frozen=True)
    class Silent(Part):
        def __call__(self, batch):
            return batch.reward - batch.field("standing")

    class Said(Silent):
        reads = frozenset({Read("rows", "standing")})

    def run(credit):
        recipe = sw.Recipe(Policy(credit, surrogate=Score()), Noting(prompts=1, size=2))
        return sw.train(sw.exact.markov(symbols=2, length=2), [{"prompt": 0}], len_of, recipe, steps=1)

    assert run(Said()).steps == 1
    with pytest.raises(InputError, match="A part reads 'standing' of the rows, which was not filled in; declare it"):
        run(Silent())


def len_of(completions):
    return [float(len(text)) for text in completions]
