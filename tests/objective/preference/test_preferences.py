"""Parts of preference, balance and distillation losses beside the pair: what they count, keep, remember and refuse."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from stepwell.batch import Batch, Read
from stepwell.check.replay import expectation
from stepwell.errors import InputError, MissingAbility, UnknownName
from stepwell.methods.catalogue import get
from stepwell.objective.distillation import (
    Distillation,
    Failing,
    TeacherAdvantage,
    TeacherDivergence,
    TeacherEstimate,
    generalised_divergence,
)
from stepwell.objective.groups import Discriminative, GroupLoss, OrderPreserving, TrustRegion, win_rates
from stepwell.objective.preference.links import Classifier, OddsRatio, link
from stepwell.objective.preference.pairs import ChosenLikelihood, Pairing, Pairs, SequenceScore, SortedPairs
from stepwell.objective.preference.scores import ImplicitReward, LengthDesensitised, MeanRatio, OnPolicyWeight, Parting
from stepwell.objective.preference.unpaired import Prospect, RejectionPairs, accepted
from stepwell.objective.state import RunningMean
from stepwell.objective.term import Objective
from stepwell.process.exact.table import markov
from stepwell.process.models import Models
from stepwell.reward.mixing import Rewards
from stepwell.rng import Rng
from stepwell.sampling.request import Prompt
from stepwell.training.loop import train
from stepwell.training.scoring import fill
from stepwell.training.settings import Settings
from stepwell.trajectories import count

EXACT = 1e-12
OWN = SequenceScore(against="none")


def loss_of(term, batch):
    objective = term if isinstance(term, Objective) else Objective((term,))
    return objective.loss(batch, objective.plan(replace(batch, scores=batch.scores.detach())))


def slope_of(term, batch):
    leaf = batch.scores.log_prob.detach().requires_grad_()
    batch = replace(batch, scores=replace(batch.scores, log_prob=leaf))
    return torch.autograd.grad(loss_of(term, batch).value, leaf)[0]


# links and scores


def test_odds_lose_no_digits_near_probability_one_nor_near_zero():
    s = torch.tensor([-1e-9, -1e-3, -math.log(2), -0.7, -5.0, -80.0], dtype=torch.float64, requires_grad=True)
    found = OddsRatio()(s, torch.full_like(s, -math.log(2)))  # the odds of a half are 1
    exact = [math.log1p(math.exp(-(x - (math.log(-math.expm1(x)))))) if x > -40 else -x for x in s.tolist()]
    assert found.tolist() == pytest.approx(exact, rel=1e-12)
    assert bool(torch.autograd.grad(found.sum(), s)[0].isfinite().all())


def test_the_classifiers_shift_is_the_running_mean_of_scores(batch_of):
    """It is kept from update to update."""
    shift = RunningMean("score_shift", metric="pair_score", decay=0.9)
    batch = batch_of(
        torch.tensor([[2.0], [-1.0]]).double(), prompt=torch.zeros(2).long(), reward=torch.tensor([1.0, 0.0])
    )
    term = Pairs(Classifier(0.5, shift), OWN)
    assert Objective((term,)).states == {"score_shift": shift}
    loss = loss_of(term, batch)
    assert float(loss.metrics["pair_score"]) == pytest.approx(0.5)
    assert shift.update(0.0, {"pair_score": 0.5}) == pytest.approx(0.05)
    moved = float(loss_of(term, replace(batch, states={"score_shift": 0.05})).value)
    assert moved == pytest.approx(math.log1p(math.exp(-0.5 * 1.95)) + math.log1p(math.exp(0.5 * -1.05)))


def test_the_discovered_loss_prefers_the_rejected_row_at_equal_scores():
    x = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    for name, slope in (("discopop", (1 - math.log(2)) / (4 * 0.05) - 0.75), ("sigmoid", -0.5)):
        found = torch.autograd.grad(link(name, 1.0)(x, torch.zeros_like(x)).sum(), x)[0]
        assert float(found) == pytest.approx(slope, abs=EXACT)
    assert (1 - math.log(2)) / 0.2 - 0.75 == pytest.approx(0.784, abs=5e-4)


def test_the_robust_loss_falls_without_bound():
    """At a known slope."""
    x = torch.tensor([1e4], dtype=torch.float64, requires_grad=True)
    slope = torch.autograd.grad(link("robust", 0.1, 0.2)(x, torch.zeros_like(x)).sum(), x)[0]
    assert float(slope) == pytest.approx(-0.1 * 0.2 / (1 - 0.4), rel=EXACT)


def test_order_preserving_rows_of_two_are_a_logistic_pair():
    """The sizes of the rewards are not read."""
    score, reward = Rng(1).normal(2, dtype=torch.float64), torch.tensor([3.0, 1.0])
    found = float(OrderPreserving()(score, reward, score))
    assert found == pytest.approx(float(link("sigmoid", 1.0)(score[:1], score[1:])), rel=EXACT)
    assert found == float(OrderPreserving()(score, 100 * reward, score))
    assert float(OrderPreserving()(score, torch.ones(2), score)) == 0.0


@pytest.mark.parametrize(("name", "beta", "smoothing"), [("sigmoid", 0.3, 0.1), ("aot", 0.3, 0.1), ("ipo", 0.3, 0.0)])
def test_links_by_name_are_made_with_what_they_read(name, beta, smoothing):
    found = link(name, beta, smoothing)
    assert found.beta == beta
    assert getattr(found, "smoothing", 0.0) == smoothing


@pytest.mark.parametrize("divergence", ["forward-kl", "js", "alpha"])
def test_other_divergences_agree_with_the_log_ratio_to_first_order(batch_of, divergence):
    present = 1e-5 * Rng(1).normal(3, 2, dtype=torch.float64)
    batch = batch_of(present, reference_log_prob=torch.zeros(3, 2).double())
    found, plain = ImplicitReward(divergence=divergence)(batch), SequenceScore()(batch)
    factor = 0.5 if divergence == "js" else 1.0
    assert torch.allclose(found, factor * plain, rtol=1e-4, atol=0)
    assert torch.equal(ImplicitReward(divergence="alpha", alpha=1.0)(batch), plain)


def test_a_row_longer_than_its_counterpart_counts_less_beyond_it(batch_of):
    mask = torch.tensor([[True, False, True, True], [True, True, False, False], [True] * 4])
    present = torch.tensor([[1.0, 9.0, 2.0, 4.0], [0.5, 0.25, 9.0, 9.0], [1.0, 2.0, 4.0, 8.0]]).double()
    batch = batch_of(present, mask=mask)
    first, second = torch.tensor([0, 1, 2]), torch.tensor([1, 2, 0])
    won, lost = LengthDesensitised(0.25, "none").sides(batch, first, second)
    assert won.tolist() == [1 + 2 + 0.25 * 4, 0.75, 1 + 2 + 4 + 0.25 * 8]
    assert lost.tolist() == [0.75, 1 + 2 + 0.25 * (4 + 8), 7.0]


def test_rows_are_scored_from_where_they_part_to_the_end_of_that_step(batch_of):
    action = torch.tensor([[1, 2, 3, 3, 1], [1, 2, 4, 3, 1], [1, 2, 3, 0, 0]])
    segment = torch.tensor([[0, 0, 1, 1, 2], [0, 0, 1, 2, 2], [0, 0, 1, 1, 1]])
    length = torch.tensor([5, 5, 3])
    mask = torch.arange(5) < length[:, None]
    present = 2.0 ** torch.arange(5).expand(3, 5).double()
    batch = batch_of(present, mask=mask, segment=segment, length=length)
    batch = replace(batch, rows=batch.rows.replace(action=action))
    won, lost = Parting("none").sides(batch, torch.tensor([0, 0]), torch.tensor([1, 2]))
    assert won.tolist() == [4 + 8, 8]  # the second pair part where row 2 has ended
    assert lost.tolist() == [4, 0]


def test_the_mean_ratio_and_the_weight_of_being_ones_own(batch_of):
    mask = torch.tensor([[True, False, True], [True, True, True]])
    present, old = (Rng(i).normal(2, 3, dtype=torch.float64) for i in range(2))
    squares = 0.3 * mask.double()
    batch = batch_of(present, behaviour=old, mask=mask, extra={"sum_of_squares": squares})
    for row in range(2):
        ratio = (present - old)[row][mask[row]].exp().mean()
        assert float(MeanRatio()(batch)[row]) == pytest.approx(float(ratio), rel=EXACT)
        own = (present[row][mask[row]].mean() - math.log(0.3)).exp()
        assert float(OnPolicyWeight()(batch)[row]) == pytest.approx(float(own), rel=EXACT)


# terms

PROMPT = torch.tensor([0, 0, 0, 1, 1])
REWARD = torch.tensor([3.0, 1.0, 2.0, 5.0, 5.0]).double()


def test_a_chosen_row_counts_once_for_each_pair_it_wins(batch_of):
    batch = batch_of(
        torch.zeros(5, 2).double(),
        prompt=PROMPT,
        reward=REWARD,
        mask=torch.tensor([[True, True]] * 3 + [[True, False]] * 2),
    )
    assert slope_of(ChosenLikelihood(Pairing("all")), batch)[:, 0].tolist() == pytest.approx([-2 / 6, 0, -1 / 6, 0, 0])
    assert slope_of(ChosenLikelihood(), batch)[:, 0].tolist() == pytest.approx([-1 / 2, 0, 0, 0, 0])
    assert not bool(slope_of(ChosenLikelihood(), replace(batch, rows=batch.rows.replace(reward=0 * REWARD))).any())


def test_sorted_pairs_of_one_pair_are_the_pair_and_of_more_are_not(batch_of):
    present, reference = (Rng(i).normal(8, 3, dtype=torch.float64) for i in range(2))
    reward, prompt = torch.tensor([1.0, 0.0]).double().repeat(4), torch.arange(8) // 2
    one = batch_of(present[:2], prompt=prompt[:2], reward=reward[:2], reference_log_prob=reference[:2])
    two = batch_of(present, prompt=prompt, reward=reward, reference_log_prob=reference)
    for paired in (True, False):
        assert torch.allclose(slope_of(SortedPairs(paired=paired), one), slope_of(Pairs(), one), atol=EXACT)
        assert not torch.allclose(slope_of(SortedPairs(paired=paired), two), slope_of(Pairs(), two), atol=1e-4)


@pytest.mark.parametrize("limit", [-0.2, 5.0])
def test_a_trust_region_is_half_its_squared_excess(batch_of, limit):
    """However the minibatch is cut."""
    present, old = (0.3 * Rng(i).normal(6, 3, dtype=torch.float64) for i in range(2))
    batch = batch_of(present.requires_grad_(), behaviour=old, reward=torch.zeros(6).double())
    objective = Objective((TrustRegion(limit, 7.0),))
    plan = objective.plan(batch)
    excess = torch.relu((old - present).mean() - limit)
    expected = 3.5 * excess**2
    pieces = [torch.tensor([0, 4]), torch.tensor([1, 2, 3, 5])]
    parts = [
        objective.loss(replace(batch, rows=batch.rows[i], scores=batch.scores.rows(i)), plan[i]).value for i in pieces
    ]
    assert float(sum(parts).detach()) == pytest.approx(float(expected.detach()), abs=EXACT)
    slopes = [torch.autograd.grad(value, present, retain_graph=True)[0] for value in (sum(parts), expected)]
    assert torch.allclose(*slopes, atol=EXACT)
    assert (float(slopes[0].norm()) > 0) == (limit < 0)


def test_discrimination_without_temperature_is_a_difference_of_means():
    """It is the limit of high temperatures."""
    score, reward = Rng(1).normal(5, dtype=torch.float64), torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0])
    plain = float(Discriminative(None)(score, reward, score))
    assert plain == pytest.approx(float(score[[1, 2, 4]].mean() - score[[0, 3]].mean()), abs=EXACT)
    assert float(Discriminative(1e7)(score, reward, score)) == pytest.approx(plain, abs=1e-6)  # variance / 2 tau
    for same in (torch.zeros(5), torch.ones(5)):
        assert float(Discriminative()(score, same, score)) == 0.0


def test_win_rates_add_up_to_a_half_a_row_and_a_row_alone_has_none():
    rate = win_rates(Rng(1).normal(6, dtype=torch.float64))
    assert float(rate.mean()) == pytest.approx(0.5, abs=EXACT)
    assert win_rates(torch.ones(1).double()).tolist() == [0.0]


def test_a_prospect_without_a_point_is_centred_at_zero(batch_of):
    batch = batch_of(torch.tensor([[2.0], [1.0]]).double(), reward=torch.tensor([1.0, 0.0]).double())
    found = float(loss_of(Prospect(0.5, centred=False, score=OWN), batch).value)
    assert found == pytest.approx((1 / (1 + math.exp(1.0)) + 1 / (1 + math.exp(-0.5))) / 2, rel=EXACT)
    assert Prospect().present == {"log_prob"}
    assert Prospect(centred=False).present == frozenset()


# rejection sampling


def test_rejection_sampling_accepts_the_best_for_certain():
    """And everything in the end."""
    assert accepted([1.0, 3.0, 2.0], 1e-3, 1, Rng(0)) == [1]
    assert accepted([1.0, 3.0, 2.0], 1e-3, 3, Rng(0)) == [1, 2, 0]  # the best of those left, pass by pass
    assert sorted(accepted([1.0, 3.0, 2.0], 5.0, 9, Rng(0))) == [0, 1, 2]
    assert accepted([], 1.0, 2, Rng(0)) == []


def test_rejection_sampling_in_one_pass_tilts_by_the_reward():
    """By its exponential."""
    reward, beta = [0.3, 1.1, -0.6], 0.7
    first = expectation(lambda rng: torch.tensor([0 in accepted([r, 1.1], beta, 1, rng) for r in reward]).double())
    expected = torch.tensor([math.exp((r - 1.1) / beta) for r in reward], dtype=torch.float64)
    assert torch.allclose(first, expected, atol=EXACT)


def test_rejection_pairs_are_among_the_kept_rows_only(batch_of):
    rows = batch_of(
        torch.zeros(6, 1).double(), prompt=torch.tensor([0, 0, 0, 0, 1, 1]), reward=torch.arange(6.0).double()
    ).rows
    term = RejectionPairs(temperature=0.5, keep=2)
    drawn = term.draw(rows, None, Rng(3))["kept"]
    assert [int(drawn[rows.prompt == key].sum()) for key in (0, 1)] == [2, 2]
    rows = Objective((term,)).draw(rows, None, Rng(3))
    assert torch.equal(term.credit(Batch(rows, count(rows)))["sides"], rows.points["kept"][:, None].expand(-1, 2))


# teachers


def test_a_teacher_is_asked_for_its_scores_and_missed_where_there_is_none():
    process = markov(symbols=3, length=3, prompts=1, seed=1)
    rows = process.trajectories()
    with pytest.raises(MissingAbility, match="give `teacher=`, a process of the same vocabulary"):
        fill(Models(process), rows, {Read("teacher", "log_prob")}, tokens=None)
    reference, teacher = (markov(symbols=3, length=3, prompts=1, seed=seed) for seed in (3, 2))
    reads = {Read("teacher", "log_prob"), Read("teacher", "logits")}
    reads |= {Read("reference", "log_prob"), Read("policy", "log_prob")}
    filled = fill(Models(process, reference, teacher), rows, reads, tokens=7)
    for found, model in (
        (filled.info["teacher_log_prob"], teacher),
        (filled.reference_log_prob, reference),
        (filled.old_log_prob, process),
    ):
        assert torch.equal(found, model.score(rows).log_prob.detach())
    assert torch.equal(filled.info["teacher_logits"], teacher.score(rows, {"logits"})["logits"].detach())


@pytest.mark.parametrize("options", [{}, {"top": 2}])
def test_a_run_without_a_teacher_stops_before_it_draws(options):
    """A run with one pays for its scores."""

    def run(name, process, teacher=None, **options):
        settings = Settings(steps=1, prompts_per_step=1, group_size=2, progress=False)
        reward = Rewards(lambda completions: [0.0, 0.0])
        return train(process, get(name).recipe(**options), [Prompt(0, 0)], reward, settings, teacher=teacher)

    alone, taught = markov(symbols=3, length=3, seed=1), markov(symbols=3, length=3, seed=1)
    with pytest.raises(MissingAbility, match="give `teacher=`, a process of the same vocabulary"):
        run("gkd", alone, **options)
    assert alone.meter.spent.forward == 0
    teacher = markov(symbols=3, length=3, seed=2)
    made = run("gkd", taught, teacher, **options)
    assert "teacher_divergence" in made.history[0]
    assert teacher.meter.spent.forward == 0  # what it spends is the run's; the model that was given is not written on
    assert made.cost.forward > run("reinforce", alone).cost.forward  # of the same draws


def test_front_loaded_advantages_weigh_the_first_step_most(batch_of):
    """And the last least."""
    teacher = torch.tensor([[1.0, -2.0, 5.0, 1.0]]).double()
    mask = torch.tensor([[True, True, False, True]])
    batch = batch_of(torch.zeros(1, 4).double(), mask=mask, info={"teacher_log_prob": teacher})
    found = TeacherAdvantage(front=0.5)(batch)[0].tolist()
    assert found == pytest.approx([1.5, -2 * (1 + 0.5 * (1 - 1 / 4)), 0.0, 1 + 0.5 * (1 - 3 / 4)])
    assert TeacherAdvantage(to_go=True)(batch)[0, [0, 1, 3]].tolist() == [0.0, -1.0, 1.0]


def test_divergences_with_impossible_actions_are_finite_or_infinite():
    """Each as its definition has it."""
    student = torch.tensor([0.5, 0.5, 0.0]).double().log()
    teacher = torch.tensor([0.25, 0.5, 0.25]).double().log()
    assert float(generalised_divergence(student, teacher, 1.0)) == pytest.approx(0.5 * math.log(2))
    assert float(generalised_divergence(student, teacher, 0.0)) == math.inf
    middle = [0.375, 0.5, 0.125]
    by_hand = 0.5 * sum(p * math.log(p / m) for p, m in zip([0.25, 0.5, 0.25], middle, strict=True))
    by_hand += 0.5 * sum(p * math.log(p / m) for p, m in zip([0.5, 0.5], middle[:2], strict=True))
    assert float(generalised_divergence(student, teacher, 0.5)) == pytest.approx(by_hand, rel=EXACT)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_a_divergence_of_the_likeliest_actions_grows_to_the_exact_one(beta):
    process, teacher = (markov(symbols=5, length=3, seed=seed) for seed in (1, 2))
    rows = process.trajectories()

    def value(top, models=Models(process, None, teacher)):  # noqa: B008
        objective = Objective((Distillation(TeacherDivergence(beta, top=top)),))
        seen = fill(models, objective.draw(rows, models, Rng(0)), objective.reads, tokens=None)
        batch = Batch(seen, count(rows), process.score(rows, objective.needs))
        loss = objective.loss(batch, objective.plan(replace(batch, scores=batch.scores.detach()))).value
        return float(loss.detach()), torch.autograd.grad(loss, process.logits)[0]

    values = [value(top) for top in (1, 2, 3, 4, 5, 0)]
    sizes = [size for size, _ in values]
    assert sizes[:3] == sorted(sizes[:3])  # to tell more apart never lowers a divergence
    assert sizes[0] > 0
    for size, slope in values[3:]:  # four of five and the rest is everything
        assert size == pytest.approx(sizes[-1], rel=EXACT)
        assert torch.allclose(slope, values[-1][1], atol=EXACT)
    with pytest.raises(MissingAbility, match="give `teacher=`, a process of the same vocabulary"):
        value(2, Models(process))


def test_a_teacher_is_heard_where_the_student_fails(batch_of):
    batch = batch_of(torch.zeros(3, 2).double(), reward=torch.tensor([1.0, 0.0, -1.0]).double())
    assert Failing()(batch, None, torch.zeros(3, 2))[:, 0].tolist() == [0, 1, 1]


def test_names_and_numbers_that_are_none_are_refused():
    for wrong in (
        lambda: LengthDesensitised(1.2),
        lambda: TeacherDivergence(-0.1),
        lambda: TeacherDivergence(top=-1),
        lambda: link("hinge", 0.1, 0.2),
        lambda: get("on-policy-distillation").recipe(to_go=True, front=0.5),
        lambda: get("ipo").recipe(semantics="verl"),
    ):
        with pytest.raises(InputError):
            wrong()
    for wrong in (lambda: TeacherEstimate("k1"), lambda: ImplicitReward(divergence="kl"), lambda: link("dpo", 0.1)):
        with pytest.raises(UnknownName):
            wrong()


def test_a_group_loss_of_a_single_kind_of_rows_teaches_nothing(batch_of):
    batch = batch_of(torch.zeros(3, 2).double(), prompt=torch.zeros(3).long(), reward=torch.ones(3).double())
    assert not bool(slope_of(GroupLoss(Discriminative(), OWN), batch).any())
