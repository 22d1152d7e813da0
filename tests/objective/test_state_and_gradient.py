"""Coefficients that change between updates, transforms of gradients, and sums of terms, needs and metrics."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stepwell.batch import Batch, Read
from stepwell.credit.shaping import Outcome
from stepwell.credit.traces import GeneralisedAdvantage
from stepwell.errors import InputError, MissingAbility, UnknownName
from stepwell.objective.gates.step import HighEntropy
from stepwell.objective.gradient import ClipByNorm, SkipAbove, global_norm
from stepwell.objective.policy import Policy
from stepwell.objective.reduction import Reduction
from stepwell.objective.regularise import Divergence, Entropy, Regulariser, entropy_bonus
from stepwell.objective.state import AdaptiveCoefficient, Coefficient, LogPartition, Multiplier, RunningMean, value_of
from stepwell.objective.surrogate import Score
from stepwell.objective.term import Objective, Term
from stepwell.objective.value import ValueLoss
from stepwell.parts import Part
from stepwell.process.base import Scores
from stepwell.process.exact.table import markov
from stepwell.recipe.recipe import Recipe
from stepwell.rng import Rng
from stepwell.trajectories import count
from stepwell.writing import describe

# states


@pytest.mark.parametrize(
    ("metric", "expected"),
    [(0.1, 2.0), (0.11, 2.0 * 1.01), (0.5, 2.0 * 1.02), (0.09, 2.0 * 0.99), (0.0, 2.0 * 0.98)],
)
def test_an_adaptive_coefficient_follows_its_metric_within_a_fifth(metric, expected):
    state = AdaptiveCoefficient("beta", 2.0, metric="kl", target=0.1, rate=0.1)
    assert state.update(2.0, {"kl": metric}) == pytest.approx(expected, rel=1e-12)


def test_an_adaptive_coefficient_settles_where_its_metric_is_on_target():
    state, value = AdaptiveCoefficient("beta", 1.0, target=0.1, rate=0.5), 1.0
    for _ in range(200):
        value = state.update(value, {"kl": 0.3 / value})  # a divergence that falls as the penalty grows
    assert value == pytest.approx(3.0, rel=1e-6)


@given(st.floats(0, 10), st.floats(-5, 5), st.floats(-5, 5))
def test_a_multiplier_rises_while_its_constraint_is_broken(value, threshold, metric):
    """It is never negative."""
    state = Multiplier("mu", metric="length", threshold=threshold, rate=0.1)
    found = state.update(value, {"length": metric})
    assert found == max(0.0, value + 0.1 * (threshold - metric))


def test_a_running_mean_forgets_geometrically():
    state, value = RunningMean("mean", decay=0.9), 0.0
    for metric in (1.0, 2.0, 3.0):
        value = state.update(value, {"reward": metric})
    assert value == pytest.approx(0.1 * (0.81 * 1 + 0.9 * 2 + 3), rel=1e-12)


def test_the_log_partition_takes_a_gradient_step():
    """On half the square of its residual."""
    z, other, rate = 0.7, -1.9, 0.3
    slope = (0.5 * (z + 1e-6 + other) ** 2 - 0.5 * (z - 1e-6 + other) ** 2) / 2e-6
    assert LogPartition("z", rate=rate).update(z, {"residual": z + other}) == pytest.approx(z - rate * slope, abs=1e-8)


@pytest.mark.parametrize("kind", [AdaptiveCoefficient, Multiplier, RunningMean, LogPartition])
def test_a_state_that_follows_a_metric_nobody_reports_says_so(kind):
    with pytest.raises(UnknownName, match="metric for a coefficient to follow 'rewrd'; did you mean 'reward'"):
        kind("state", metric="rewrd").update(1.0, {"reward": 1.0})


def test_a_plain_state_stays(batch_of):
    state = Coefficient("fixed", 3.0)
    assert state.update(3.0, {"anything": 1.0}) == 3.0
    assert value_of(0.5, batch_of(torch.zeros(1, 1))) == 0.5


def regularised(batch, coefficient):
    objective = Objective((Regulariser(Divergence("k2"), coefficient, Reduction("sum")),))
    return float(objective.loss(batch, objective.plan(batch)).value)


def test_a_term_reads_the_present_value_of_its_coefficient(batch_of):
    state = AdaptiveCoefficient("beta", 2.0)
    present = torch.ones(2, 1, dtype=torch.float64)
    fields = {"reference_log_prob": torch.zeros(2, 1, dtype=torch.float64)}
    assert regularised(batch_of(present, **fields), state) == 2.0  # its initial value, where the loop keeps none yet
    assert regularised(batch_of(present, states={"beta": 0.25}, **fields), state) == 0.25


def test_an_objective_lists_the_states_inside_its_terms():
    beta, mu = AdaptiveCoefficient("beta"), Multiplier("mu")
    objective = Policy(coefficient=mu) + Regulariser(Divergence("k2"), beta)
    assert objective.states == {"mu": mu, "beta": beta}
    with pytest.raises(TypeError, match="got the coefficient 'mu'"):
        2 * objective


# gradients


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=6), st.floats(0.01, 50))
def test_clipping_by_norm_keeps_the_direction_and_bounds_the_norm(values, maximum):
    gradients = [torch.tensor(values[:1], dtype=torch.float64), torch.tensor(values[1:], dtype=torch.float64)]
    norm = float(global_norm(gradients))
    assert norm == pytest.approx(sum(value**2 for value in values) ** 0.5, rel=1e-12)
    clipped = ClipByNorm(maximum)(gradients)
    scale = min(1.0, maximum / (norm + 1e-6))
    assert torch.allclose(torch.cat(clipped), scale * torch.cat(gradients), rtol=1e-12, atol=0)
    assert float(global_norm(clipped)) <= maximum
    assert torch.cat(gradients).tolist() == values  # pure


def test_an_update_whose_norm_is_too_large_or_no_number_is_dropped():
    small, large, broken = torch.tensor([0.3]), torch.tensor([3.0]), torch.tensor([float("nan")])
    assert torch.equal(SkipAbove(1.0)([small])[0], small)
    assert not bool(torch.cat(SkipAbove(1.0)([small, large])).any())
    for gradient in (broken, torch.tensor([float("inf")])):
        assert not bool(torch.cat(SkipAbove()([small, gradient])).any())
    assert torch.equal(SkipAbove()([large])[0], large)
    assert SkipAbove()([]) == ClipByNorm()([]) == []


# needs


@dataclass(frozen=True)
class Undeclared(Part):
    """The mistake of reading a score that was not asked for."""

    def __call__(self, batch):
        return batch.present("entropy")


def test_a_part_that_reads_what_it_did_not_declare_is_told_what_to_declare():
    process = markov(symbols=3, length=2)
    rows = process.trajectories()
    for quantity, works in ((Undeclared(), False), (Entropy(), True)):
        objective = Objective((Regulariser(quantity),))
        batch = Batch(rows, count(rows), process.score(rows, objective.needs))
        if works:
            assert bool(objective.loss(batch, objective.plan(batch)).value.isfinite())
            continue
        with pytest.raises(MissingAbility, match=r"'entropy' was not computed.*declare needs=frozenset\(\{'entropy'\}"):
            objective.loss(batch, objective.plan(batch))


def test_reading_scores_or_fields_before_they_are_there_is_told(batch_of):
    batch = batch_of(torch.zeros(1, 1))
    with pytest.raises(InputError, match=r"Batch\.scores must have 'log_prob' before a part reads it, got None"):
        _ = dataclasses.replace(batch, scores=None).log_prob
    with pytest.raises(InputError, match="'reference_log_prob' of the rows, which was not filled in; declare it"):
        _ = batch.reference


def test_declarations_are_collected_from_every_depth():
    objective = Policy(gates=(HighEntropy(),)) + Regulariser(Divergence("k3")) + entropy_bonus() + ValueLoss()
    assert objective.needs == {"entropy", "value"}
    assert objective.reads == {Read("reference", "log_prob"), Read("policy", "value")}
    assert objective.present == {"entropy"}
    assert objective.plans_on_scores
    assert not Objective((Policy(),)).plans_on_scores
    assert GeneralisedAdvantage(kl=0.1).reads == {Read("policy", "value"), Read("reference", "log_prob")}


# the algebra


def example(batch_of, seed=0):
    present, reference = (Rng(seed + i).normal(4, 3, dtype=torch.float64) for i in range(2))
    prompt = torch.tensor([0, 0, 1, 1])
    return batch_of(
        present.requires_grad_(), reference_log_prob=reference, reward=Rng(5).normal(4).double(), prompt=prompt
    )


def run(objective, batch):
    objective = Objective((objective,)) if isinstance(objective, Term) else objective
    loss = objective.loss(batch, objective.plan(batch))
    return float(loss.value.detach()), torch.autograd.grad(loss.value, batch.log_prob)[0], loss.metrics


def test_objectives_add_and_scale(batch_of):
    batch = example(batch_of)
    a, b = Policy(surrogate=Score()), Regulariser(Divergence("k2"), 0.3)
    (first, slope, some), (second, other, more) = run(a, batch), run(b, batch)
    for built, factor in ((a + b, 1), (2 * (a + b), 2), ((a + b) * 2, 2), (2 * a + 2 * b, 2), (b + a, 1)):
        value, gradient, metrics = run(built, batch)
        assert value == pytest.approx(factor * (first + second), rel=1e-12)
        assert torch.allclose(gradient, factor * (slope + other), rtol=0, atol=1e-14)
        assert set(metrics) == set(some) | set(more)
        assert float(metrics["kl"]) == float(more["kl"])  # what is logged is the divergence, not its penalty
    assert (a + b) + a == a + (b + a) == Objective((a, b, a))


def test_metrics_of_one_name_add_up(batch_of):
    batch = example(batch_of)
    k1, k2 = (Regulariser(Divergence(name), 0.3) for name in ("k1", "k2"))
    each = [float(run(term, batch)[2]["kl"]) for term in (k1, k2)]
    assert float(run(k1 + k2, batch)[2]["kl"]) == pytest.approx(sum(each), rel=1e-12)
    named = run(k1 + dataclasses.replace(k2, name="kl_squared"), batch)[2]
    assert [float(named["kl"]), float(named["kl_squared"])] == pytest.approx(each, rel=1e-12)


def test_parts_add_and_multiply_rows_with_steps(batch_of):
    batch = example(batch_of)
    reward, steps = batch.reward, Divergence("k2")(batch)
    assert torch.equal((Outcome() + Outcome())(batch), 2 * reward)
    assert torch.equal((3 * Outcome() - Outcome())(batch), 3 * reward - reward)
    assert torch.equal((Outcome() + Divergence("k2"))(batch), reward[:, None] + steps)
    assert torch.equal((Outcome() * Divergence("k2"))(batch), reward[:, None] * steps)
    assert (Outcome() + Divergence("k2")).parts[1].reads == {Read("reference", "log_prob")}


def test_a_factor_of_a_part_is_not_rounded(batch_of):
    batch = example(batch_of)
    assert torch.equal((0.1 * Outcome())(batch), 0.1 * batch.reward)  # in float32 it would be off by 1e-8


def test_parts_are_described_by_what_differs_from_their_defaults():
    assert describe(Policy(surrogate=Score(maximum=5.0))) == "Policy(surrogate=Score(maximum=5.0))"
    assert describe((Policy(), 2)) == "(Policy(), 2)"
    assert Recipe(2 * Policy()).parts()[0] == "Policy(coefficient=2.0)"
    assert "SkipAbove(maximum=3.0)" in Recipe(Policy(), transforms=(SkipAbove(3.0),)).parts()


def test_a_recipe_is_replaced_in_part_and_counts_are_at_least_one():
    recipe = Recipe(Policy() + entropy_bonus(), epochs=2)
    changed = recipe.replace(surrogate=Score(), epochs=3)
    assert changed.objective == Policy(surrogate=Score()) + entropy_bonus()
    assert changed.epochs == 3
    assert "epochs=3" in changed.parts()
    with pytest.raises(InputError, match=r"Recipe\.epochs must be a whole number, at least 1, got 0"):
        recipe.replace(epochs=0)


# the critic


@pytest.mark.parametrize("clip", [None, 0.2])
def test_the_value_loss_is_half_the_larger_square(batch_of, clip):
    mask = torch.tensor([[True, True, False], [True, False, True]])
    value, old, returns = (Rng(i).normal(2, 3, dtype=torch.float64) for i in range(3))
    term = ValueLoss(clip=clip, coefficient=0.7)
    batch = batch_of(value, mask=mask, extra={"value": value}, value=old, reward=torch.zeros(2))
    objective = Objective((term,))
    targets = objective.plan(batch)
    assert torch.allclose(
        targets["0"]["returns"], (GeneralisedAdvantage()(batch) + old) * batch.mask, rtol=0, atol=1e-14
    )
    loss = term.loss(batch, {**targets["0"], "returns": returns}).value
    squares = []
    for v, o, g in zip(value[mask].tolist(), old[mask].tolist(), returns[mask].tolist(), strict=True):
        near = v if clip is None else o + min(max(v - o, -clip), clip)
        squares.append(0.5 * max((v - g) ** 2, (near - g) ** 2))
    assert float(loss) == pytest.approx(0.7 * sum(squares) / len(squares), rel=1e-12)


# planted


@dataclass(frozen=True)
class Forgetful(AdaptiveCoefficient):
    """The mistake of an error that is not bounded."""

    def update(self, value, metrics):
        return value * (1 + (metrics[self.metric] / self.target - 1) * self.rate)


def test_planted_states_and_transforms_are_caught():
    with pytest.raises(AssertionError):
        assert Forgetful("beta", 2.0).update(2.0, {"kl": 0.5}) == pytest.approx(2.0 * 1.02)
    each = [gradient / gradient.norm() for gradient in (torch.tensor([3.0]), torch.tensor([0.0, 4.0]))]
    assert float(global_norm(each)) > 1.0  # clipping tensor by tensor: the direction changes and the bound fails


def test_scores_are_picked_by_row():
    scores = Scores(torch.arange(6.0).reshape(3, 2), {"entropy": torch.arange(6.0).reshape(3, 2) + 10})
    picked = scores.rows(torch.tensor([2, 0]))
    assert picked.log_prob.tolist() == [[4.0, 5.0], [0.0, 1.0]]
    assert picked["entropy"].tolist() == [[14.0, 15.0], [10.0, 11.0]]
