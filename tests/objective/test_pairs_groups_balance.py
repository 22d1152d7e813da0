"""Losses that couple rows: their fixed points, their gradients on policy, and that no cut of a batch changes them."""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass

import pytest
import torch

from stepwell.check.oracles.registry import deviation, expected_gradient
from stepwell.errors import UnknownName
from stepwell.objective.balance import SubTrajectoryBalance, TrajectoryBalance
from stepwell.objective.groups import Consistency, GroupFunction, GroupLoss, PosteriorMatching
from stepwell.objective.policy import Policy
from stepwell.objective.preference.pairs import Hinge, Logistic, Pairing, Pairs, SequenceScore, Square, pairs_of
from stepwell.objective.regularise import Divergence, Regulariser, entropy_bonus
from stepwell.objective.state import LogPartition
from stepwell.objective.term import Coupling, Loss, Objective, Term
from stepwell.objective.value import ValueLoss
from stepwell.parts import Batch
from stepwell.process.exact.table import markov
from stepwell.rng import Rng
from stepwell.training.update import accumulate, cut
from stepwell.trajectories import count

EXACT = 1e-10
FLAT = 1e-13  # a gradient of a few hundred float64 terms of order one that cancel
BETA = 0.7
OWN = SequenceScore(against="none")


@functools.cache
def models():
    """A policy, its reference, rewards of all strings, and the reference tilted by exp(R / BETA)."""
    process, reference = (markov(symbols=3, length=3, order=None, seed=seed) for seed in (5, 6))
    reward = Rng(2).normal(len(process.strings()), dtype=torch.float64)
    by_string = dict(zip(process.strings(), reward.tolist(), strict=True))
    return process, reference, reward, reference.tilted(lambda text: by_string[text] / BETA)


def some_rows(number=40, groups=8, seed=3):
    """Arbitrary strings in arbitrary groups, with reference and made-up sampler log-probabilities."""
    process, reference, reward, _ = models()
    chosen = (Rng(seed).uniform(number) * len(reward)).long()
    rows = reference.trajectories()[chosen]
    return rows.replace(
        prompt=torch.arange(number) % groups,
        reward=reward[chosen],
        reference_log_prob=rows.log_prob,
        log_prob=Rng(seed + 1).normal(*rows.mask.shape, dtype=torch.float64) * rows.mask,
        old_log_prob=process.score(rows).log_prob.detach(),
    )


def loss_on(process, term, rows, states=None):
    """The loss of a term on these rows, and its gradient in the logits."""
    objective = Objective((term,))
    counts = count(rows, process.horizon)
    with torch.no_grad():
        scored = process.score(rows, objective.needs).detach()
    targets = objective.plan(Batch(rows, counts, scored, states or {}))
    loss = objective.loss(Batch(rows, counts, process.score(rows, objective.needs), states or {}), targets)
    return float(loss.value.detach()), torch.autograd.grad(loss.value, process.logits)[0], loss.metrics


# pairs


def test_dpo_is_flat_at_the_tilted_reference_for_any_law_of_the_pairs():
    process, reference, reward, target = models()
    rows = reference.trajectories().replace(reference_log_prob=reference.trajectories().log_prob)
    law = Rng(8).uniform(len(reward), dtype=torch.float64)
    first, second = (i.reshape(-1) for i in torch.meshgrid(*[torch.arange(len(reward))] * 2, indexing="ij"))
    weight = law[first] * law[second] * torch.sigmoid(reward[first] - reward[second])  # Bradley-Terry labels

    def steepness(policy, beta):
        score = SequenceScore()(Batch(rows, count(rows), policy.score(rows)))
        loss = (weight * Logistic(beta)(score[first], score[second])).sum() / weight.sum()
        return float(torch.autograd.grad(loss, policy.logits)[0].norm())

    assert steepness(target, BETA) < FLAT
    assert steepness(target, 2 * BETA) > 0.01
    assert steepness(process, BETA) > 0.01


@pytest.mark.parametrize("x", [-3.0, -0.2, 0.0, 1.0, 4.0])
def test_links_are_their_formulas(x):
    chosen = torch.tensor([x + 0.5], dtype=torch.float64)
    rejected = torch.tensor([0.5], dtype=torch.float64)
    sigmoid = lambda z: 1 / (1 + math.exp(-z))  # noqa: E731
    smooth = -0.8 * math.log(sigmoid(0.3 * x - 0.4)) - 0.2 * math.log(sigmoid(0.4 - 0.3 * x))
    for link, expected in (
        (Logistic(0.3), -math.log(sigmoid(0.3 * x))),
        (Logistic(0.3, 0.2, 0.4), smooth),
        (Square(0.3), (x - 1 / 0.6) ** 2),
        (Hinge(0.3), max(0.0, 1 - 0.3 * x)),
    ):
        assert float(link(chosen, rejected)) == pytest.approx(expected, rel=1e-12)


def test_scores_are_sums_or_means_against_what_was_named(batch_of):
    mask = torch.tensor([[True, False, True], [True, True, True]])
    present, reference, old = (Rng(i).normal(2, 3, dtype=torch.float64) for i in range(3))
    batch = batch_of(present, behaviour=old, reference_log_prob=reference, mask=mask)
    for against, other in (("reference", reference), ("old", old), ("none", torch.zeros(2, 3).double())):
        for mean in (False, True):
            found = SequenceScore(mean, against)(batch)
            for row in range(2):
                kept = (present - other)[row][mask[row]]
                assert float(found[row]) == pytest.approx(float(kept.mean() if mean else kept.sum()), abs=1e-13)


PROMPT = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2])
REWARD = torch.tensor([1.0, 3.0, 0.0, 3.0, 2.0, 2.0, 5.0, 4.0])


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("extremes", {(1, 2), (6, 7)}),
        ("mean", {(1, 0), (1, 2), (3, 0), (3, 2), (6, 7)}),
        ("all", {(0, 2), (1, 0), (1, 2), (3, 0), (3, 2), (6, 7)}),
    ],
)
def test_pairs_are_those_of_their_kind_and_ties_give_none(batch_of, kind, expected):
    batch = batch_of(torch.zeros(8, 1), prompt=PROMPT, reward=REWARD)
    chosen, rejected = pairs_of(REWARD, PROMPT, Pairing(kind)(batch))
    assert set(zip(chosen.tolist(), rejected.tolist(), strict=True)) == expected
    assert len(chosen) == len(expected)


def test_the_loss_of_pairs_is_the_mean_over_all_pairs(batch_of):
    present = Rng(1).normal(8, 1, dtype=torch.float64)
    batch = batch_of(present, prompt=PROMPT, reward=REWARD.double())
    term = Pairs(Logistic(0.5), OWN, Pairing("all"))
    objective = Objective((term,))
    loss = objective.loss(batch, objective.plan(batch))
    pairs = [(i, j) for i, j in itertools.permutations(range(8), 2) if PROMPT[i] == PROMPT[j] and REWARD[i] > REWARD[j]]
    gaps = [float(present[i, 0] - present[j, 0]) for i, j in pairs]
    assert float(loss.value) == pytest.approx(sum(math.log1p(math.exp(-0.5 * x)) for x in gaps) / len(gaps))
    assert float(loss.metrics["pair_accuracy"]) == pytest.approx(sum(x > 0 for x in gaps) / len(gaps))


def test_a_batch_of_ties_has_no_pair_and_no_gradient(batch_of):
    present = torch.zeros(4, 1, dtype=torch.float64, requires_grad=True)
    batch = batch_of(present, prompt=torch.tensor([0, 0, 1, 1]), reward=torch.tensor([1.0, 1.0, 2.0, 2.0]))
    objective = Objective((Pairs(score=OWN),))
    loss = objective.loss(batch, objective.plan(batch)).value
    assert float(loss.detach()) == 0
    assert not bool(torch.autograd.grad(loss, present)[0].any())


# groups


@pytest.mark.parametrize("seed", [3, 4])
@pytest.mark.parametrize("function", [Consistency(BETA), PosteriorMatching(BETA)], ids=["copg", "brain"])
def test_a_group_loss_is_flat_at_the_tilted_reference_for_any_samples(function, seed):
    process, _, _, target = models()
    rows = some_rows(seed=seed)
    assert float(loss_on(target, GroupLoss(function), rows)[1].norm()) < FLAT
    assert float(loss_on(process, GroupLoss(function), rows)[1].norm()) > 0.01


def test_consistency_is_the_mean_over_pairs_of_half_the_square():
    score, reward = (Rng(i).normal(4, dtype=torch.float64) for i in range(2))
    x = (reward - 0.3 * score).tolist()
    pairs = [0.5 * (a - b) ** 2 for a, b in itertools.combinations(x, 2)]
    found = Consistency(0.3)(score, reward, torch.zeros(4))
    assert float(found) == pytest.approx(sum(pairs) / len(pairs), rel=1e-12)
    assert float(Consistency(0.3)(score[:1], reward[:1], torch.zeros(1))) == 0


@pytest.mark.parametrize("size", [2, 3])
def test_the_gradient_of_consistency_on_policy_is_that_of_the_regularised_reward(size):
    process, reference, reward, _ = models()
    fields = {"reference_log_prob": reference.trajectories().log_prob}
    found = -expected_gradient(process, GroupLoss(Consistency(BETA)), size, reward, fields=fields)
    log_probability = process.string_log_probabilities()
    gap = log_probability - reference.string_log_probabilities().detach()
    value = (log_probability.exp() * (reward - BETA * gap)).sum()
    assert deviation(found, -2 * BETA * torch.autograd.grad(value, process.logits)[0]) < EXACT


def test_posterior_matching_weighs_rows_by_the_two_self_normalised_laws():
    process, _, _, _ = models()
    rows = some_rows(number=4, groups=1)
    with torch.no_grad():
        present = process.score(rows).log_prob.sum(1)
    proposal, reference = rows.log_prob.sum(1), rows.reference_log_prob.sum(1)
    weight = (reference + rows.reward / BETA - proposal).softmax(0) - (present - proposal).softmax(0)
    expected = torch.autograd.grad(-(weight * process.score(rows).log_prob.sum(1)).sum(), process.logits)[0]
    found = loss_on(process, GroupLoss(PosteriorMatching(BETA)), rows)[1]
    assert deviation(found, expected) < EXACT


@dataclass(frozen=True)
class WithoutTheReference(GroupFunction):
    """The mistake of a consistency whose scores are not times beta."""

    def __call__(self, score, reward, proposal):
        return (reward - score).var()


def test_a_planted_consistency_is_not_flat_at_the_target():
    _, _, _, target = models()
    assert float(loss_on(target, GroupLoss(WithoutTheReference()), some_rows())[1].norm()) > 0.01


# balance


@functools.cache
def balanced():
    """The law P = R / Z with log R given, log Z, and exact log flows as its value table."""
    process, _, log_reward, _ = models()
    by_string = dict(zip(process.strings(), log_reward.tolist(), strict=True))
    probability = dict(zip(process.strings(), process.string_log_probabilities().tolist(), strict=True))
    target = process.tilted(lambda text: by_string[text] - probability[text])
    rows = target.trajectories().replace(reward=log_reward)
    contexts, flow = target._contexts(rows.action), torch.zeros(target.contexts, dtype=torch.float64)
    for step in range(target.length):
        here = rows.mask[:, step]
        flow.index_add_(0, contexts[here, step], log_reward[here].exp())
    target.module.get_parameter("value").data.copy_(flow.clamp(min=1e-300).log()[None])
    return target, rows, float(log_reward.logsumexp(0))


def balance(partition="learned", log_partition=0.0):
    return TrajectoryBalance(score=OWN, partition=partition, log_partition=LogPartition("log_partition", log_partition))


def test_trajectory_balance_is_zero_at_the_normalised_reward():
    target, rows, log_partition = balanced()
    assert loss_on(target, balance(log_partition=log_partition), rows)[0] < 1e-25
    assert loss_on(target, balance("group"), rows.replace(prompt=torch.arange(len(rows)) % 3))[0] < 1e-25
    assert loss_on(target, balance(log_partition=log_partition + 1), rows)[0] == pytest.approx(0.5)
    assert loss_on(models()[0], balance(log_partition=log_partition), rows)[0] > 0.1


@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0, 3.0])
def test_sub_trajectory_and_detailed_balance_are_zero_at_exact_flows(lam):
    target, rows, _ = balanced()
    assert loss_on(target, SubTrajectoryBalance(lam, against="none"), rows)[0] < 1e-25
    assert loss_on(target, SubTrajectoryBalance(lam, against="none"), rows.replace(reward=2 * rows.reward))[0] > 0.1


def sub_balance_by_hand(log_prob, flow, log_reward, lam):
    """One row: every pair i < j of the states of its trained steps, weighted and normalised."""
    states = [*flow, log_reward]
    total, weights = 0.0, 0.0
    for i, j in itertools.combinations(range(len(states)), 2):
        weight = lam ** (j - i - 1)
        total += weight * (states[i] + sum(log_prob[i:j]) - states[j]) ** 2
        weights += weight
    return total / weights


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0, 2.0])
def test_sub_trajectory_balance_is_its_definition_and_skips_steps_that_are_not_trained(batch_of, lam):
    mask = torch.tensor([[True, False, True, True, False], [False, True, False, False, False], [True] * 5])
    present, flow = (Rng(i).normal(3, 5, dtype=torch.float64) for i in range(2))
    log_reward = Rng(2).normal(3, dtype=torch.float64)
    objective = Objective((SubTrajectoryBalance(lam, against="none"),))
    batch = batch_of(present, mask=mask, extra={"value": flow}, reward=log_reward)
    found = float(objective.loss(batch, objective.plan(batch)).value)
    by_hand = [
        sub_balance_by_hand(p[m].tolist(), f[m].tolist(), float(r), lam)
        for p, f, m, r in zip(present, flow, mask, log_reward, strict=True)
    ]
    assert found == pytest.approx(sum(by_hand) / 3, rel=1e-12)


def test_the_limits_of_sub_trajectory_balance_are_detailed_and_trajectory_balance(batch_of):
    present, flow = (Rng(i).normal(1, 4, dtype=torch.float64) for i in range(2))
    log_reward = torch.tensor([2.3], dtype=torch.float64)
    batch = batch_of(present, extra={"value": flow}, reward=log_reward)

    def value(lam):
        objective = Objective((SubTrajectoryBalance(lam, against="none"),))
        return float(objective.loss(batch, objective.plan(batch)).value)

    states = torch.cat([flow[0], log_reward])
    detailed = ((states[:-1] + present[0] - states[1:]) ** 2).mean()
    whole = (flow[0, 0] + present.sum() - log_reward[0]) ** 2
    assert value(0.0) == pytest.approx(float(detailed), rel=1e-12)
    assert value(1e12) == pytest.approx(float(whole), rel=1e-9)


def test_the_gradient_of_vargrad_is_that_of_balance_with_the_mean_residual_held_fixed():
    process, _, _, _ = models()
    rows = some_rows(number=6, groups=1)
    with torch.no_grad():
        missing = rows.reward - process.score(rows).log_prob.sum(1)
    fixed = loss_on(process, balance(log_partition=float(missing.mean())), rows)
    assert deviation(loss_on(process, balance("group"), rows)[1], fixed[1]) < EXACT
    score = process.score(rows).log_prob.sum(1)
    through = 0.5 * ((rows.reward - score).mean() + score - rows.reward).pow(2).mean()
    assert deviation(fixed[1], torch.autograd.grad(through, process.logits)[0]) < EXACT


@pytest.mark.parametrize("error", [0.0, 3.0])
def test_the_gradient_of_balance_on_policy_is_that_of_the_divergence_from_the_target(error):
    process, _, log_reward, _ = models()
    _, _, log_partition = balanced()
    found = -expected_gradient(process, balance(log_partition=log_partition + error), 1, log_reward)
    log_probability = process.string_log_probabilities()
    divergence = (log_probability.exp() * (log_probability - log_reward)).sum()
    assert deviation(found, torch.autograd.grad(divergence, process.logits)[0]) < EXACT


def test_the_learned_partition_converges_to_that_of_the_target_and_to_a_bound_elsewhere():
    target, rows, log_partition = balanced()
    term = balance()
    found = 0.0
    for _ in range(60):
        found = term.log_partition.update(found, loss_on(target, term, rows, {"log_partition": found})[2])
    assert found == pytest.approx(log_partition * (1 - 0.9**60), rel=1e-9)
    process, _, log_reward, _ = models()
    probability = process.string_probabilities().detach()
    bound = float((probability * (log_reward - probability.log())).sum())
    assert bound < log_partition  # the evidence bound: what rows of another policy teach
    residual = float((probability * (bound + probability.log() - log_reward)).sum())
    assert term.log_partition.update(bound, {"residual": residual}) == pytest.approx(bound, abs=1e-12)


# coupled rows in micro-batches


@dataclass(frozen=True)
class Sorted(Term):
    """Couples all rows of the batch (AOT): scores are sorted against rewards; it also reads a second score."""

    coefficient: float = 1.0
    coupling: Coupling = "batch"
    needs = frozenset({"entropy"})

    def loss(self, batch, targets):
        score = batch.row_sum(batch.log_prob + batch.present("entropy"))[:, 0]
        value = (score.sort().values - batch.reward.sort().values).pow(2).sum() / batch.counts.rows
        return Loss(value, {"sorted": value.detach()})


COUPLED = {
    "pairs": Pairs(Logistic(0.5), pairing=Pairing("all")),
    "copg": GroupLoss(Consistency(0.5)),
    "brain": GroupLoss(PosteriorMatching(0.5)),
    "vargrad": TrajectoryBalance(partition="group"),
    "batch": Sorted(),
    "mixed": Pairs() + 0.3 * Policy() + Regulariser(Divergence("exact"), 0.1) + entropy_bonus(0.2),
    "critic": GroupLoss() + ValueLoss(),
}


def update(term, tokens):
    """The gradients in all parameters, and the metrics, of one accumulation."""
    process, reference, _, _ = models()
    process = process.frozen()
    process.module.requires_grad_(True)
    process.reference = reference
    rows = some_rows(number=17, groups=4)
    rows = rows.replace(value=Rng(9).normal(*rows.mask.shape, dtype=torch.float64) * rows.mask)
    objective = term if isinstance(term, Objective) else Objective((term,))
    counts = count(rows, process.horizon)
    with torch.no_grad():
        targets = objective.plan(Batch(rows, counts, process.score(rows, objective.needs).detach()))
    metrics = accumulate(process, objective, rows, targets, counts, {}, tokens)
    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in process.module.parameters()]
    return torch.cat([gradient.reshape(-1) for gradient in gradients]), metrics


@pytest.mark.parametrize("tokens", [1, 7, 30])
@pytest.mark.parametrize("name", COUPLED)
def test_a_coupled_loss_is_the_same_however_its_batch_is_cut(name, tokens):
    whole, cut_up = update(COUPLED[name], None), update(COUPLED[name], tokens)
    assert float(whole[0].norm()) > 0.01
    assert torch.allclose(cut_up[0], whole[0], rtol=0, atol=1e-12)
    assert cut_up[1] == pytest.approx(whole[1], abs=1e-12)


@pytest.mark.parametrize("name", ["pairs", "copg", "brain", "batch"])
def test_cutting_coupled_rows_without_their_scores_gives_another_gradient(name, monkeypatch):
    whole = update(COUPLED[name], None)[0]
    plain = cut
    loose = lambda rows, coupling, tokens: plain(rows, "rows", tokens)  # noqa: E731
    monkeypatch.setitem(accumulate.__globals__, "cut", loose)
    assert deviation(update(COUPLED[name], 1)[0], whole) > 0.01


def test_whole_groups_that_fit_are_taken_together():
    rows = some_rows(number=12, groups=4)
    pieces = cut(rows, "groups", 20)
    assert pieces is not None
    assert sorted(torch.cat(pieces).tolist()) == list(range(12))
    for piece in pieces:
        assert len(piece) * int(rows.length[piece].max()) <= 20
        assert all(set((rows.prompt == p).nonzero()[:, 0].tolist()) <= set(piece.tolist()) for p in rows.prompt[piece])
    assert cut(rows, "groups", 5) is None
    assert cut(rows, "batch", 20) is None


def test_names_that_are_none_are_refused():
    for wrong, said in (
        (lambda: Pairing("extreme"), "extremes"),
        (lambda: SequenceScore(against="references"), "reference"),
        (lambda: TrajectoryBalance(partition="groups"), "group"),
        (lambda: SubTrajectoryBalance(against="nome"), "none"),
    ):
        with pytest.raises(UnknownName, match=f"did you mean '{said}'"):
            wrong()
