"""Sums and products of parts and of surrogates; other nodes are refused where they are added."""

from __future__ import annotations

import itertools
import operator
from dataclasses import dataclass

import pytest
import torch

from stepwell.batch import Read
from stepwell.credit.contest import Beats
from stepwell.credit.group import GroupCredit
from stepwell.credit.shaping import DivergencePenalty, Outcome
from stepwell.errors import InputError, UnknownName
from stepwell.objective.gates.step import CompleteRows, Gate, OneSide
from stepwell.objective.groups import Consistency
from stepwell.objective.policy import Policy
from stepwell.objective.preference.pairs import Hinge, Logistic, Pairs
from stepwell.objective.preference.scores import ImplicitReward, LengthDesensitised, TokenGuided
from stepwell.objective.ratio import Hook, LogClip
from stepwell.objective.reduction import Reduction
from stepwell.objective.surrogate import Clip, Drift, Focused, Plain, Score, Surrogate, WeightedSum
from stepwell.objective.term import Objective
from stepwell.parts import Constant, Node, Part, declared
from stepwell.rng import Rng
from stepwell.writing import describe

EXACT = 1e-14


def example(batch_of):
    """Rows with log-ratios on both sides of the clip, and advantages of both signs."""
    present = (0.5 * Rng(1).normal(6, 5, dtype=torch.float64)).requires_grad_()
    old = torch.zeros(6, 5, dtype=torch.float64)
    return batch_of(present, behaviour=old, reward=Rng(2).normal(6, dtype=torch.float64)), Rng(3).normal(6, 5).double()


def slope(surrogate, batch, advantage):
    loss = surrogate(batch.log_prob - batch.old, advantage, batch)
    return torch.autograd.grad(loss.sum(), batch.log_prob)[0]


SUMS = {
    "half and half": (0.5 * Clip() + 0.5 * Plain(), [(0.5, Clip()), (0.5, Plain())]),
    "difference": (Clip() - 0.25 * Score(maximum=2.0), [(1.0, Clip()), (-0.25, Score(maximum=2.0))]),
    "nested": (2 * (0.5 * Drift() + Clip() * 0.25), [(1.0, Drift()), (0.5, Clip())]),
    "scaled": (3 * Plain(), [(3.0, Plain())]),
    "three": (Clip() + Plain() + Focused(), [(1.0, Clip()), (1.0, Plain()), (1.0, Focused())]),
}


@pytest.mark.parametrize("name", SUMS)
def test_a_weighted_sum_of_surrogates_is_a_surrogate(batch_of, name):
    """Its loss and its slope are the weighted sums of theirs, and it clips where any of them does."""
    batch, advantage = example(batch_of)
    built, parts = SUMS[name]
    assert isinstance(built, Surrogate)
    log_ratio = batch.log_prob - batch.old
    loss = sum(weight * part(log_ratio, advantage, batch) for weight, part in parts)
    assert torch.allclose(built(log_ratio, advantage, batch), loss, rtol=0, atol=EXACT)
    total = sum(weight * slope(part, batch, advantage) for weight, part in parts)
    assert torch.allclose(slope(built, batch, advantage), total, rtol=0, atol=EXACT)
    clipped = [part.clipped(log_ratio, advantage) for _, part in parts]
    assert torch.equal(built.clipped(log_ratio, advantage), torch.stack(clipped).any(0))


def test_slopes_at_the_old_policy_add_up(batch_of):
    """At r = 1 it is -A times the sum of the weights: weights that sum to 1 leave the policy gradient as it is."""
    present = torch.zeros(2, 1, dtype=torch.float64, requires_grad=True)
    batch, advantage = batch_of(present), torch.tensor([[1.5], [-0.5]]).double()
    for built, weight in ((0.5 * Clip() + 0.5 * Plain(), 1.0), (Clip() - 0.25 * Plain(), 0.75)):
        assert torch.allclose(slope(built, batch, advantage), -weight * advantage, rtol=0, atol=EXACT)
        assert torch.equal(built.slope(batch), torch.full_like(batch.log_prob, weight))


def test_a_policy_takes_a_sum_of_surrogates(batch_of):
    """The loss of a sum is the sum of losses, with the same credit."""
    batch, _ = example(batch_of)

    def loss(surrogate):
        objective = Objective((Policy(GroupCredit("none"), surrogate=surrogate, reduction=Reduction("sum")),))
        return float(objective.loss(batch, objective.plan(batch)).value.detach())

    assert loss(0.5 * Clip() + 0.5 * Plain()) == pytest.approx(0.5 * loss(Clip()) + 0.5 * loss(Plain()), rel=1e-13)


def test_weights_are_finite_numbers_and_one_each():
    for wrong in (lambda: WeightedSum((), ()), lambda: WeightedSum((Clip(),), ()), lambda: float("nan") * Clip()):
        with pytest.raises(InputError, match=r"WeightedSum\.weights must be one finite number for each surrogate"):
            wrong()


def test_declarations_inside_a_sum_are_found():
    @dataclass(frozen=True)
    class Sure(Surrogate):
        needs = frozenset({"entropy"})

        def __call__(self, log_ratio, advantage, batch):
            return -advantage * batch.present("entropy")

    objective = Objective((Policy(surrogate=0.5 * Clip() + 0.5 * Sure()),))
    assert objective.needs == {"entropy"}


@pytest.mark.parametrize(
    ("built", "words"),
    [
        (0.5 * Clip() + 0.5 * Plain(), "0.5 * Clip() + 0.5 * Plain()"),
        (Clip(high=0.3) - 2 * Plain(), "Clip(high=0.3) - 2.0 * Plain()"),
        (-1 * Plain() + Clip(), "-Plain() + Clip()"),
        (Outcome() + DivergencePenalty(0.1), "Outcome() + DivergencePenalty(beta=0.1)"),
        (GroupCredit() - Constant(-0.1), "GroupCredit() - Constant(value=-0.1)"),
        (10.0 * Outcome(), "10.0 * Outcome()"),
        (GroupCredit() * Constant(2.0), "GroupCredit() * Constant(value=2.0)"),
        (0.5 * (Outcome() + Constant()) * Outcome(), "0.5 * (Outcome() + Constant()) * Outcome()"),
        (Outcome() - (Outcome() - Constant()), "Outcome() - (Outcome() - Constant())"),
        (Policy(surrogate=0.5 * Clip() + 0.5 * Plain()), "Policy(surrogate=0.5 * Clip() + 0.5 * Plain())"),
    ],
)
def test_sums_and_products_are_described_as_they_are_written(built, words):
    assert describe(built) == words


NODES = {
    "gate": OneSide(),
    "link": Hinge(),
    "hook": LogClip(),
    "group function": Consistency(),
    "score of pairs": LengthDesensitised(),
}


@pytest.mark.parametrize("name", NODES)
def test_nodes_of_other_kinds_are_not_added_or_scaled(name):
    """Refused where it is written, and not in the first loss."""
    node = NODES[name]
    assert not isinstance(node, Part)
    for operate, other in itertools.product((operator.add, operator.sub, operator.mul), (node, Outcome(), 0.5)):
        for pair in ((node, other), (other, node)):
            with pytest.raises(TypeError, match="unsupported operand"):
                operate(*pair)


def test_parts_and_surrogates_do_not_mix():
    for wrong in (
        lambda: Outcome() + Clip(),
        lambda: Clip() + Outcome(),
        lambda: Outcome() * Clip(),
        lambda: Clip() * Plain(),
        lambda: Outcome() + 1.0,
        lambda: Clip() - 1.0,
    ):
        with pytest.raises(TypeError, match="unsupported operand"):
            wrong()


def test_a_field_refuses_a_node_of_another_kind():
    for wrong, said in (
        (lambda: Policy(surrogate=GroupCredit()), "Policy.surrogate must be a Surrogate, got GroupCredit"),
        (lambda: Policy(credit_of=Clip()), "Policy.credit_of must be a Part, got Clip"),
        (lambda: Pairs(link=Outcome()), "Pairs.link must be a Link, got Outcome"),
        (lambda: Pairs(score=Logistic()), "Pairs.score must be a Part, or a PairScore, got Logistic"),
    ):
        with pytest.raises(InputError, match=said):
            wrong()


@pytest.mark.parametrize("kind", [Part, Surrogate, Gate, Hook, Beats])
def test_a_node_without_its_call_cannot_be_made(kind):
    @dataclass(frozen=True)
    class Empty(kind):
        pass

    with pytest.raises(TypeError, match="abstract"):
        Empty()


def test_declarations_have_defaults_and_are_read_of_nodes_only():
    @dataclass(frozen=True)
    class Bare(Node):
        inner: object

    read = Read("reference", "log_prob")
    assert Bare(None).needs == Bare(None).reads == Bare(None).present == frozenset()
    assert (Bare(None).compares, Bare(None).when) == (False, "rows")
    assert declared(Bare((DivergencePenalty(0.1), CompleteRows())), lambda node: node.reads) == {read}
    assert declared([object(), 3, "text"], lambda node: node.reads) == frozenset()


def test_a_score_of_pairs_does_not_score_single_rows(batch_of):
    batch = batch_of(torch.zeros(2, 1).double(), reference_log_prob=torch.zeros(2, 1).double())
    with pytest.raises(InputError, match="must be a Part where rows are scored one by one, got TokenGuided"):
        ImplicitReward(TokenGuided())(batch)


def test_a_read_that_is_a_text_is_refused():
    """As is one of a model that a run does not have."""

    @dataclass(frozen=True)
    class Old(Constant):
        reads = frozenset({"reference_log_prob"})

    with pytest.raises(InputError, match=r"Old\.reads must hold reads, such as .*, got 'reference_log_prob'"):
        Old()
    with pytest.raises(UnknownName, match=r"Read\.of must be one of policy, reference, rows, teacher; got 'techer'"):
        Read("techer", "log_prob")
