"""Methods are checked on rows that their own planner drew: its notes are there, and missing ones are refused."""

from dataclasses import dataclass

import pytest
import torch

from stepwell import methods
from stepwell.batch import Read
from stepwell.check.benches import LENGTH, SIZES, bench
from stepwell.check.methods import check_method
from stepwell.errors import InputError, LawBroken
from stepwell.objective.policy import Policy
from stepwell.parts import Part
from stepwell.planning.base import Planner
from stepwell.planning.groups import Groups
from stepwell.recipe.card import Card
from stepwell.recipe.recipe import Recipe
from stepwell.sampling.request import Request


def card(recipe, processes=("language",)):
    return Card("mine", "A method of one's own", lambda: recipe, processes=processes)


@dataclass
class Ranked(Groups):
    """Groups that note each row's rank among all rows of the rollout."""

    def note(self, so_far):
        return {"standing": so_far.reward.argsort().argsort().double() / len(so_far)}


class Fixed(Planner):
    """A planner of one's own, without numbers to set: three samples of each of two prompts."""

    def plan(self, step, so_far, prompts):
        return [] if so_far is not None else [Request(prompt, 3) for prompt in prompts.take(2)]

    def note(self, so_far):
        return {"standing": so_far.reward.argsort().argsort().double() / len(so_far)}


@dataclass(frozen=True)
class Standing(Part):
    """A credit that reads the planner's note."""

    reads = frozenset({Read("rows", "standing")})

    def __call__(self, batch):
        return batch.read(Read("rows", "standing")) - 0.4


@dataclass(frozen=True)
class LastColumn(Standing):
    """The mistake of a credit by the width of the batch."""

    def __call__(self, batch):
        return super().__call__(batch) * batch.mask.shape[1]


@pytest.mark.parametrize("planner", [Ranked(), Fixed()])
def test_a_planner_with_a_note_of_its_own_is_checked(planner):
    report = check_method(card(Recipe(Policy(Standing()), planner)))
    assert max(report.values()) < 1e-12
    with pytest.raises(LawBroken, match="breaks the law 'padding'"):
        check_method(card(Recipe(Policy(LastColumn()), planner)))


def test_a_note_that_nobody_makes_is_refused():
    with pytest.raises(
        InputError, match="reads 'standing' of the rows, which nobody makes: the planner Groups notes no"
    ):
        check_method(card(Recipe(Policy(Standing()))))
    vines = methods.get("vineppo").recipe().planner
    with pytest.raises(InputError, match="the planner Vines notes ends, value_after, value_before"):
        check_method(card(Recipe(Policy(Standing()), vines)))


def test_a_note_that_is_not_declared_is_refused():
    @dataclass(frozen=True)
    class Silent(Part):
        def __call__(self, batch):
            return batch.field("standing")

    with pytest.raises(InputError, match="reads 'standing' of the rows"):
        check_method(card(Recipe(Policy(Silent()))))


def test_a_kind_of_process_without_a_bench_is_refused():
    with pytest.raises(InputError, match="kind must be one of language, flow, got 'walk'"):
        check_method(card(Recipe(Policy()), ("walk",)))


def test_groups_are_ragged_rewards_differ_and_some_rows_are_long():
    models, rows = bench(methods.get("grpo").recipe())
    assert rows.prompt.bincount().tolist() == list(SIZES)
    assert len(rows.reward.unique()) == len(rows)
    assert int(rows.length.max()) == LENGTH > 16
    assert len(rows.length.unique()) > 5
    ratio = (models.score(rows).log_prob - rows.old_log_prob)[rows.mask].exp()
    assert bool((ratio > 1.3).any())
    assert bool((ratio < 0.7).any())


def test_planners_of_methods_draw_what_they_are_for():
    _, rows = bench(methods.get("luffy").recipe())
    assert int((rows.source == 1).sum()) == len(SIZES)
    _, rows = bench(methods.get("guide").recipe())
    assert 0 < int((rows.source == 1).sum()) < len(rows) / 2
    _, rows = bench(methods.get("treepo").recipe())
    assert len(rows.node[:, 0].unique()) < len(rows)
    _, rows = bench(methods.get("vineppo").recipe())
    assert len(rows.info["value_after"][rows.length.argmax()].unique()) == 2
    assert torch.equal(rows.info["ends"].sum(1) > 0, torch.ones(len(rows), dtype=torch.bool))
