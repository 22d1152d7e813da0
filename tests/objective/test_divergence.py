"""Estimates of a divergence: the mean of each, and the divergence whose gradient it follows."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import pytest
import torch

from stepwell.batch import Batch, Read
from stepwell.check.oracles.expected import expected_gradient, policy_gradient
from stepwell.check.oracles.provable import deviation
from stepwell.credit.group import GroupCredit
from stepwell.credit.shaping import DivergencePenalty, Outcome
from stepwell.credit.traces import GeneralisedAdvantage
from stepwell.errors import InputError, UnknownName
from stepwell.objective.policy import Policy
from stepwell.objective.reduction import Reduction
from stepwell.objective.regularise import Divergence, Entropy, Regulariser, entropy_bonus
from stepwell.objective.surrogate import Score
from stepwell.objective.term import Objective
from stepwell.parts import Part
from stepwell.process.base import Scores
from stepwell.process.exact.table import markov
from stepwell.rng import Rng
from stepwell.trajectories import count

EXACT = 1e-10
UNBIASED = ("k1", "k3", "k3-weighted", "k1+", "k3+")
REVERSE = ("k2", "k3-weighted", "k1+", "k3+", "exact")
SAMPLED = ("k1", "k2", "k3", "abs", "k3-weighted", "k1+", "k3+")


def distributions(seed, number=5):
    """Log-probabilities of the policy, the old policy and the reference over `number` actions, (number, 1) each."""
    return [Rng(seed).split(i).normal(number, 1, dtype=torch.float64).log_softmax(0) for i in range(3)]


def mean_value(batch_of, estimate, seed, drawn_from_old=False, **options):
    """The expectation of an estimate over one step, and the divergence of its distribution from the reference's."""
    present, old, reference = distributions(seed)
    old = old if drawn_from_old else present
    batch = batch_of(present, behaviour=old, reference_log_prob=reference)
    divergence = (present.exp() * (present - reference)).sum()
    return float((old.exp() * Divergence(estimate, **options)(batch)).sum()), float(divergence)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("estimate", UNBIASED)
def test_an_unbiased_estimate_is_the_divergence_on_average(batch_of, estimate, seed):
    found, exact = mean_value(batch_of, estimate, seed)
    assert abs(found - exact) < EXACT


@pytest.mark.parametrize("estimate", ["k2", "abs"])
def test_the_square_and_the_absolute_value_are_biased(batch_of, estimate):
    found, exact = mean_value(batch_of, estimate, 0)
    assert abs(found - exact) > 0.05


@pytest.mark.parametrize("seed", range(3))
def test_only_the_weighted_estimate_is_unbiased_for_rows_of_the_old_policy(batch_of, seed):
    found, exact = mean_value(batch_of, "k3-weighted", seed, drawn_from_old=True)
    assert abs(found - exact) < EXACT
    assert all(abs(mean_value(batch_of, e, seed, drawn_from_old=True)[0] - exact) > 1e-3 for e in ("k1", "k3"))


@pytest.mark.parametrize("seed", range(3))
def test_the_logged_divergence_from_the_old_policy_is_unbiased(batch_of, seed):
    """For rows that the old policy drew."""
    present, old, _ = distributions(seed)
    batch = batch_of(present, behaviour=old, reward=torch.zeros(len(present)))
    weight = (old.exp() * len(old))[:, 0]  # the token mean of the log, with every action as often as it is drawn
    policy = Policy(GroupCredit("none"))
    found = 0.0
    for row, times in enumerate(weight.tolist()):
        one = Batch(batch.rows[[row]], batch.counts, Scores(batch.log_prob[[row]]))
        found += times * float(
            policy.loss(one, policy.credit(one) | policy.plan(one, policy.credit(one))).metrics["old_kl"]
        )
    assert found == pytest.approx(float((old.exp() * (old - present)).sum()), abs=EXACT)


def test_a_divergence_from_the_old_policy_reads_no_reference(batch_of):
    present, old, _ = distributions(1)
    found = Divergence("k3", other="old")(batch_of(present, behaviour=old))
    assert torch.allclose(found, torch.exp(old - present) - 1 + present - old, rtol=0, atol=1e-14)
    assert Divergence("k3", other="old").reads == frozenset()
    assert Divergence("exact").reads == frozenset()
    assert Divergence("k3").reads == {Read("reference", "log_prob")}


@functools.cache
def models():
    """A policy, its reference, and for every string the log-probabilities of its steps under the reference."""
    process, reference = (markov(symbols=3, length=3, order=None, seed=seed) for seed in (5, 6))
    rows = process.trajectories()
    return process, rows, reference.score(rows).log_prob.detach(), reference.frozen()


def slope(value, process):
    return torch.autograd.grad(value, process.logits)[0]


@functools.cache
def targets():
    """Gradients of the KL of whole sequences, and of the reverse and forward KL of each state with visits frozen."""
    process, rows, reference, frozen = models()
    log_prob = process.score(rows).log_prob
    probability = log_prob.sum(1).exp()
    sequence = slope((probability * (log_prob - reference).sum(1)).sum(), process)
    visits = process.string_probabilities().detach()[:, None] * rows.mask
    other = frozen.score(rows, {"logits"})["logits"].detach()
    gradients = [sequence]
    for forward in (False, True):
        own = process.score(rows, {"logits"})["logits"]
        p, q = (other, own) if forward else (own, other)
        gradients.append(slope((visits[..., None] * p.exp() * (p - q)).sum(), process))
    return dict(zip(("sequence", "reverse", "forward"), gradients, strict=True))


def expected(quantity, reduction="row-sum"):
    """The expected gradient of a quantity as a loss per step, on policy."""
    process, rows, reference, frozen = models()
    if quantity == Divergence("exact"):
        batch = Batch(rows, count(rows), process.score(rows, quantity.needs, reference=frozen))
        weight = process.string_probabilities().detach()[:, None] * rows.mask
        return slope((weight * quantity(batch)).sum(), process)
    term = Regulariser(quantity, 1.0, Reduction(reduction))
    nothing = torch.zeros(len(rows), dtype=torch.float64)
    return -expected_gradient(process, term, 1, nothing, fields={"reference_log_prob": reference})


def test_the_difference_of_log_probabilities_has_no_expected_gradient():
    assert float(expected(Divergence("k1")).norm()) < EXACT


@pytest.mark.parametrize("estimate", REVERSE)
def test_these_estimates_have_the_gradient_of_the_reverse_divergence(estimate):
    """That of each state, with visits frozen."""
    assert deviation(expected(Divergence(estimate)), targets()["reverse"]) < EXACT


def test_k3_has_the_gradient_of_the_forward_divergence():
    """That of each state, with visits frozen."""
    found = expected(Divergence("k3"))
    assert deviation(found, targets()["forward"]) < EXACT
    assert deviation(found, targets()["reverse"]) > 0.1


def test_the_expected_gradient_of_the_absolute_difference_is_neither():
    assert all(deviation(expected(Divergence("abs")), target) > 0.1 for target in targets().values())


@pytest.mark.parametrize("estimate", [*SAMPLED, "exact"])
def test_no_estimate_per_step_has_the_gradient_for_whole_sequences(estimate):
    """The divergence of sequences also moves which states are visited."""
    assert deviation(expected(Divergence(estimate)), targets()["sequence"]) > 0.1


def test_k2_of_the_sequence_has_the_gradient_for_whole_sequences():
    """That of the divergence of sequences."""
    assert deviation(expected(Divergence("k2", level="sequence")), targets()["sequence"]) < EXACT
    assert deviation(expected(Divergence("k2", level="sequence"), "row"), targets()["sequence"]) > 0.1


def penalised(credit, beta=0.3):
    """The expected gradient with a penalty in the reward, and the gradient of E R - beta KL."""
    process, rows, reference, _ = models()
    reward = Rng(2).normal(len(rows), dtype=torch.float64)
    fields = {"reference_log_prob": reference, "value": torch.zeros_like(reference)}
    policy = Policy(credit, surrogate=Score(), reduction=Reduction("row-sum"))
    found = expected_gradient(process, policy, 1, reward, fields=fields)
    return found, policy_gradient(process, reward) - beta * targets()["sequence"]


@pytest.mark.parametrize(
    "credit",
    [
        GroupCredit("none", reward=Outcome() + DivergencePenalty(0.3)),
        GeneralisedAdvantage(1.0, 1.0, kl=0.3),
    ],
    ids=["whole", "reward-to-go"],
)
def test_a_penalty_in_the_reward_has_the_gradient_for_sequences(credit):
    """That of the divergence of whole sequences."""
    assert deviation(*penalised(credit)) < EXACT


@dataclass(frozen=True)
class OwnStep(Part):
    """A_t = -(log pi - log ref) of that step alone: on-policy distillation without reward-to-go."""

    def __call__(self, batch):
        return -(batch.old - batch.reference) * batch.mask


def test_a_penalty_of_single_steps_has_the_reverse_gradient():
    """That of each state's divergence, with visits frozen."""
    process, rows, reference, _ = models()
    policy = Policy(OwnStep(), surrogate=Score(), reduction=Reduction("row-sum"))
    nothing = torch.zeros(len(rows), dtype=torch.float64)
    found = expected_gradient(process, policy, 1, nothing, fields={"reference_log_prob": reference})
    assert deviation(-found, targets()["reverse"]) < EXACT
    assert deviation(-found, targets()["sequence"]) > 0.1


@dataclass(frozen=True)
class SwappedSign(Divergence):
    """The mistake of log ref - log pi in k3, which verl and TRL both had to mend."""

    def __call__(self, batch):
        d = batch.reference - batch.log_prob
        return torch.exp(-d) - 1 + d


def test_a_swapped_sign_is_caught_by_value_and_by_gradient(batch_of):
    present, _, reference = distributions(0)
    batch = batch_of(present, reference_log_prob=reference)
    exact = float((present.exp() * (present - reference)).sum())
    assert abs(float((present.exp() * SwappedSign()(batch)).sum()) - exact) > 0.05
    assert all(deviation(expected(SwappedSign()), target) > 0.1 for target in targets().values())


def test_a_regulariser_is_its_coefficient_times_the_weighted_sum(batch_of):
    present, _, reference = (each.T.contiguous() for each in distributions(3, 6))
    mask = torch.tensor([[True, True, False, True, False, True]])
    batch = batch_of(present, reference_log_prob=reference, mask=mask)
    objective = Objective((Regulariser(Divergence("k2"), 0.25),))
    loss = objective.loss(batch, objective.plan(batch))
    inside = 0.5 * (present - reference)[mask] ** 2
    assert float(loss.value) == pytest.approx(0.25 * float(inside.mean()), rel=1e-12)
    assert float(loss.metrics["kl"]) == pytest.approx(float(inside.mean()), rel=1e-12)


def test_the_entropy_bonus_rewards_entropy():
    process, rows, _, _ = models()
    objective = Objective((entropy_bonus(0.2),))
    assert objective.needs == Entropy().needs == {"entropy"}
    scores = process.score(rows, objective.needs)
    batch = Batch(rows, count(rows), scores)
    loss = objective.loss(batch, objective.plan(batch)).value.detach()
    logits = process.score(rows, {"logits"})["logits"].detach()
    entropy = -(logits.exp() * logits).sum(-1)[rows.mask].mean()
    assert float(loss) == pytest.approx(-0.2 * float(entropy), rel=1e-12)


def test_estimates_that_are_none_and_settings_without_effect_are_refused():
    with pytest.raises(UnknownName, match="did you mean 'k3'"):
        Divergence("k33")
    with pytest.raises(InputError, match="other must be reference and level must be token, got old and token"):
        Divergence("exact", other="old")
    with pytest.raises(InputError, match="got reference and sequence"):
        Divergence("exact", level="sequence")
