"""Gates: each equals its plain definition, carries no gradient, and does not depend on how a minibatch is cut."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stepwell.batch import Read
from stepwell.check.methods import bench, gradient
from stepwell.errors import UnknownName
from stepwell.objective.gates.step import (
    CompleteRows,
    Gate,
    HighEntropy,
    OffPolicyRows,
    OneSide,
    ProbabilityShift,
    Ring,
    SamplerCorrection,
    Sources,
    SuccessRate,
    TwoSide,
)
from stepwell.objective.policy import Policy
from stepwell.objective.ratio import Ratio
from stepwell.objective.reduction import Reduction
from stepwell.objective.surrogate import Clip, Plain, Score
from stepwell.objective.term import Objective
from stepwell.recipe.recipe import Recipe
from stepwell.rng import Rng

SHAPE = (4, 5)


def example(batch_of, seed=0, **fields):
    mask = Rng(seed).uniform(*SHAPE) < 0.7
    behaviour, old, present = (Rng(seed + 1 + i).normal(*SHAPE, dtype=torch.float64) for i in range(3))
    return batch_of(present, behaviour=behaviour, old_log_prob=old, mask=mask, **fields)


@pytest.mark.parametrize("kind", ["truncate", "mask"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@given(seed=st.integers(0, 99), low=st.floats(0, 0.9), high=st.floats(1.1, 5))
@settings(deadline=None, max_examples=15)
def test_a_sampler_correction_is_the_bounded_ratio_to_the_sampler(batch_of, kind, level, seed, low, high):
    """That of the old policy."""
    batch = example(batch_of, seed)
    gate = SamplerCorrection(level, low, high, kind)
    found = (gate(batch, None, batch.mask) * batch.mask).tolist()
    for i in range(SHAPE[0]):
        trained = [t for t in range(SHAPE[1]) if batch.rows.mask[i, t]]
        ratios = {t: float((batch.old - batch.behaviour)[i, t].exp()) for t in trained}
        for t in trained:
            rho = ratios[t] if level == "token" else math.prod(ratios.values())
            inside = low <= rho <= high
            expected = rho if inside else 0.0 if kind == "mask" else min(max(rho, low), high)
            assert found[i][t] == pytest.approx(expected, rel=1e-12)


def test_a_sampler_that_is_the_policy_needs_no_correction(batch_of):
    batch = batch_of(torch.zeros(SHAPE, dtype=torch.float64))
    for level in ("token", "sequence"):
        for kind in ("truncate", "mask"):
            assert bool((SamplerCorrection(level, kind=kind)(batch, None, batch.mask) == 1).all())
    assert SamplerCorrection().reads == {Read("policy", "log_prob")}


def test_a_correction_multiplies_the_loss_and_leaves_the_count(batch_of):
    batch = example(batch_of, 3, reward=torch.zeros(SHAPE[0]))
    objective = Objective((Policy(surrogate=Score(), gates=(SamplerCorrection(kind="mask"),)),))
    weight = objective.plan(batch)["0"]["weight"]
    rho = (batch.old - batch.behaviour).exp()
    assert torch.allclose(weight, batch.mask * rho * (rho <= 2) / batch.counts.steps, rtol=0, atol=1e-14)


def test_rows_cut_at_the_horizon_do_not_train_but_count(batch_of):
    truncated = torch.tensor([False, True, False, True])
    batch = example(batch_of, truncated=truncated, prompt=torch.zeros(4).long(), reward=torch.arange(4.0))
    objective = Objective((Policy(gates=(CompleteRows(),)),))
    targets = objective.plan(batch)["0"]
    expected = batch.mask * ~truncated[:, None] / batch.counts.steps
    assert torch.equal(targets["weight"], expected)
    assert torch.equal(targets["advantage"], (torch.arange(4.0).double() - 1.5)[:, None] * batch.mask)


@pytest.mark.parametrize("top", [0.2, 0.5, 1.0])
def test_the_high_entropy_gate_keeps_the_share_it_names(batch_of, top):
    entropy = Rng(4).normal(*SHAPE, dtype=torch.float64).exp()
    mask = torch.ones(SHAPE, dtype=torch.bool)
    mask[1, 2:] = False
    batch = batch_of(torch.zeros(SHAPE, dtype=torch.float64), mask=mask, extra={"entropy": entropy})
    kept = HighEntropy(top)(batch, None, batch.mask)
    number = int(mask.sum())
    ranked = entropy[mask].sort().values
    threshold = float(ranked[math.ceil((1 - top) * (number - 1) - 1e-9)])  # linear quantiles lie at or below it
    assert torch.equal(kept, ((entropy >= threshold) & mask).double())
    assert int(kept.sum()) == number - math.ceil((1 - top) * (number - 1) - 1e-9)


@dataclass(frozen=True)
class LocalQuantile(HighEntropy):
    """The mistake of a quantile over whatever rows are at hand."""

    when = "step"
    needs = frozenset({"entropy"})


def test_the_quantile_of_a_minibatch_does_not_depend_on_its_cut():
    good, planted = (Recipe(Policy(gates=(gate,))) for gate in (HighEntropy(0.4), LocalQuantile(0.4)))
    for recipe, same in ((good, True), (planted, False)):
        process, rows = bench(recipe)
        whole, cut = (gradient(process, recipe, rows, tokens=tokens) for tokens in (None, 1))
        assert torch.allclose(whole, cut, rtol=0, atol=1e-12) == same


def test_the_quantile_is_that_of_the_present_policy_not_of_the_rollout():
    recipe = Recipe(Policy(gates=(HighEntropy(0.4),)))
    models, rows = bench(recipe)
    process, before = models.policy, gradient(models, recipe, rows)
    moved = process.score(rows, {"entropy"})["entropy"]
    process.logits.data.mul_(3.0)
    assert not torch.allclose(process.score(rows, {"entropy"})["entropy"], moved)
    assert not torch.allclose(gradient(models, recipe, rows), before)
    assert recipe.whole.plans_on_scores


RATIOS = st.lists(st.floats(0.1, 5), min_size=4, max_size=4)


@given(RATIOS, st.lists(st.sampled_from([-1.5, 0.0, 0.7]), min_size=4, max_size=4), st.floats(0.01, 0.9))
@settings(deadline=None)
def test_one_side_is_the_gate_of_the_clip(batch_of, ratios, advantages, low):
    """The gradient of the unclipped ratio, gated, is that of the clip."""
    advantage = torch.tensor([advantages], dtype=torch.float64)
    old = torch.zeros(1, 4, dtype=torch.float64)
    slopes = []
    for surrogate, gates in ((Clip(low, 0.3), ()), (Plain(), (OneSide(low, 0.3),))):
        present = torch.tensor([ratios], dtype=torch.float64).log().requires_grad_()
        batch = batch_of(present, behaviour=old)
        policy = Policy(surrogate=surrogate, gates=gates)
        targets = {"advantage": advantage, "weight": batch.mask}
        slopes.append(torch.autograd.grad(policy.loss(batch, targets).value, present)[0])
    assert torch.allclose(*slopes, rtol=0, atol=1e-12)


def test_rows_that_drifted_too_far_train_only_on_what_was_good(batch_of):
    behaviour = torch.zeros(4, 3, dtype=torch.float64)
    present = torch.tensor([[-2.0, -2.0, -2.0], [-2.0, -2.0, -2.0], [-0.5, -0.5, 99.0], [-3.0, -3.0, 99.0]]).double()
    mask = torch.tensor([[True] * 3, [True] * 3, [True, True, False], [True, True, False]])
    advantage = torch.tensor([-1.0, 0.0, -1.0, -0.1], dtype=torch.float64)[:, None].expand(4, 3)
    batch = batch_of(present, behaviour=behaviour, mask=mask)
    kept = OffPolicyRows(1.0)(batch, None, advantage)
    assert kept.tolist() == [[0.0] * 3, [1.0] * 3, [1.0] * 3, [0.0] * 3]
    at_the_threshold = OffPolicyRows(2.0)(batch, None, advantage)
    assert at_the_threshold.tolist() == [[1.0] * 3, [1.0] * 3, [1.0] * 3, [0.0] * 3]


def test_a_gate_of_the_present_policy_carries_no_gradient(batch_of):
    present = torch.full((1, 3), 0.1, dtype=torch.float64, requires_grad=True)
    batch = batch_of(present, behaviour=torch.zeros(1, 3, dtype=torch.float64))

    @dataclass(frozen=True)
    class Weighs(Gate):
        when = "step"

        def __call__(self, batch, log_ratio, advantage):
            return log_ratio.exp()

    policy = Policy(surrogate=Plain(), gates=(Weighs(),), reduction=Reduction("sum"), ratio=Ratio())
    loss = policy.loss(batch, {"advantage": batch.mask, "weight": batch.mask}).value
    found = torch.autograd.grad(loss, present)[0]
    assert torch.allclose(found, -(present.detach().exp() ** 2), rtol=0, atol=1e-14)  # not -2 exp(2 x)


def test_names_that_are_none_are_refused():
    with pytest.raises(UnknownName, match="did you mean 'sequence'"):
        SamplerCorrection("sequences")
    with pytest.raises(UnknownName, match="did you mean 'truncate'"):
        SamplerCorrection(kind="truncated")


@pytest.mark.parametrize(
    ("gate", "up", "down"),
    [
        (OneSide(), "111100", "001111"),
        (TwoSide(), "001100", "001100"),
        (Ring(), "101100", "001101"),
        (Ring(far_low=0.3, far_high=0.4), "111100", "001111"),
    ],
    ids=str,
)
def test_a_gate_lets_these_ratios_through(batch_of, gate, up, down):
    log_ratio = torch.tensor([[0.2, 0.6, 1.0, 1.1, 1.5, 3.5]], dtype=torch.float64).log()
    for sign, expected in ((1.0, up), (-1.0, down)):
        kept = gate(batch_of(log_ratio), log_ratio, torch.full_like(log_ratio, sign))
        assert "".join(str(int(flag)) for flag in kept[0]) == expected


def test_a_probability_that_moved_too_far_with_its_advantage_is_dropped(batch_of):
    before = torch.tensor([[0.01, 0.5, 0.5, 0.9, 0.3]], dtype=torch.float64)
    now = torch.tensor([[0.12, 0.7, 0.3, 0.7, 0.3]], dtype=torch.float64)  # a ratio of 12 may be no step at all
    batch = batch_of(now.log(), behaviour=before.log())
    for sign, expected in ((1.0, "10111"), (-1.0, "11001"), (0.0, "11111")):
        kept = ProbabilityShift()(batch, None, torch.full_like(now, sign))
        assert "".join(str(int(flag)) for flag in kept[0]) == expected


def test_sources_and_success_rates_part_the_rows(batch_of):
    """Prompt 0 succeeds once in two; prompt 1 never; prompt 2 has nothing but a demonstration."""
    fields = {
        "source": torch.tensor([0, 0, 1, 0, 0, 1, 2]),
        "prompt": torch.tensor([0, 0, 0, 1, 1, 1, 2]),
        "reward": torch.tensor([1.0, 0.0, 1.0, 0.0, -1.0, 1.0, 1.0]),
    }
    batch = batch_of(torch.zeros(7, 2, dtype=torch.float64), **fields)
    found = lambda gate: "".join(str(int(x)) for x in gate(batch, None, batch.mask)[:, 0])  # noqa: E731
    assert found(Sources()) == "1101100"
    assert found(Sources(own=False)) == "0010011"
    assert found(SuccessRate()) == "1110000"
    assert found(SuccessRate(above=False)) == "0001111"
    assert found(SuccessRate(0.5)) == "0000000"  # above, not at
    assert found(SuccessRate(0.5, threshold=-0.5)) == "1110000"
