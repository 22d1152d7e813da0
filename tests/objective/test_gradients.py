"""The expected gradients of compositions, by enumeration: exact, or biased by a known amount."""

from __future__ import annotations

import itertools
import math
import statistics
from dataclasses import dataclass

import pytest
import torch

from stepwell.check.oracles.expected import expected_gradient, policy_gradient
from stepwell.check.oracles.policy_gradient import standard_deviation_factor
from stepwell.check.oracles.provable import deviation
from stepwell.credit.group import GroupCredit
from stepwell.objective.gates.step import SamplerCorrection
from stepwell.objective.policy import Policy
from stepwell.objective.ratio import Ratio
from stepwell.objective.reduction import Reduction
from stepwell.objective.surrogate import Clip, Drift, Plain, Score, Taper
from stepwell.parts import Part
from stepwell.process.exact.table import markov
from stepwell.rng import Rng

EXACT = 1e-10  # sums of ten thousand float64 terms of order one
UNBOUNDED = float("inf")


def uneven(seed=2):
    """Strings of one to three symbols with real rewards."""
    process = markov(symbols=3, length=3, order=None, seed=seed)
    return process, Rng(2).normal(len(process.strings()), dtype=torch.float64)


def stale(process):
    """The sampler: the policy as it was before its logits moved by 0.7 each."""
    before = process.frozen()
    before.logits.data.add_(0.7 * Rng(3).normal(*process.logits.shape, dtype=torch.float64))
    return before


def policy(credit="leave-one-out", *, gates=(), ratio=None, surrogate=None, reduction="row-sum"):
    credit = GroupCredit(credit) if isinstance(credit, str) else credit
    return Policy(credit, ratio or Ratio(), surrogate or Score(), gates, Reduction(reduction))


def distance(term, size, *, seed=2, off_policy=False, factor=1.0):
    process, reward = uneven(seed)
    behaviour = stale(process) if off_policy else None
    return deviation(
        expected_gradient(process, term, size, reward, behaviour), factor * policy_gradient(process, reward)
    )


@pytest.mark.parametrize("size", [1, 2, 3])
def test_reinforce_is_exact(size):
    assert distance(policy("none"), size) < EXACT


@pytest.mark.parametrize("size", [2, 3])
def test_leave_one_out_is_exact(size):
    assert distance(policy(), size) < EXACT


SURROGATES = [Plain(), Clip(), Clip(dual=3.0), Clip(delta=4.0), Score(maximum=5.0), Taper(), Drift()]


@pytest.mark.parametrize("surrogate", SURROGATES, ids=str)
def test_every_surrogate_is_exact_at_the_old_policy(surrogate):
    assert distance(policy(surrogate=surrogate), 2) < EXACT


@pytest.mark.parametrize(
    ("ratio", "reduction"),
    [(Ratio("sequence", "product"), "row"), (Ratio("sequence"), "row-sum"), (Ratio("sequence_token"), "row-sum")],
)
def test_a_sequence_ratio_is_exact_with_the_reduction_that_fits_it(ratio, reduction):
    assert distance(policy(ratio=ratio, surrogate=Clip(), reduction=reduction), 2) < EXACT


def test_a_summed_product_ratio_multiplies_rows_by_their_length():
    """It is copied to every step of the row."""
    process, reward = uneven()
    trap = policy(ratio=Ratio("sequence", "product"), surrogate=Clip())
    found = expected_gradient(process, trap, 2, reward)
    lengths = process.trajectories().length.double()
    log_probability = process.string_log_probabilities()
    probability = log_probability.detach().exp()
    centred = reward - (probability * reward).sum()
    weighted = torch.autograd.grad((probability * centred * lengths * log_probability).sum(), process.logits)[0]
    assert deviation(found, weighted) < EXACT
    assert deviation(found, policy_gradient(process, reward)) > 1


@pytest.mark.parametrize(("credit", "size"), [("none", 1), ("leave-one-out", 2), ("leave-one-out", 3)])
def test_an_unbounded_sequence_correction_of_a_stale_sampler_is_exact(credit, size):
    gate = SamplerCorrection("sequence", high=UNBOUNDED)
    assert distance(policy(credit, gates=(gate,)), size, off_policy=True) < EXACT


@pytest.mark.parametrize(("credit", "size"), [("none", 1), ("leave-one-out", 2)])
def test_a_plain_sequence_ratio_against_the_behaviour_is_exact(credit, size):
    ratio = Ratio("sequence", "product", "behaviour")
    term = policy(credit, ratio=ratio, surrogate=Plain(), reduction="row")
    assert distance(term, size, off_policy=True) < EXACT
    forgets = policy(credit, ratio=Ratio("sequence", "product"), surrogate=Plain(), reduction="row")
    assert distance(forgets, size, off_policy=True) > 0.1  # the ratio to `old` says nothing of the sampler


def test_bounded_corrections_of_a_stale_sampler_are_biased():
    """So are those of single tokens; the order of their biases is known."""

    def off(*gates):
        return distance(policy(gates=gates), 2, off_policy=True)

    none, token = off(), off(SamplerCorrection("token", high=UNBOUNDED))
    mask = off(SamplerCorrection("sequence", high=3.0, kind="mask"))
    truncated = off(SamplerCorrection("sequence", high=3.0))
    assert none > mask > token > truncated > 0.05
    assert abs(off(SamplerCorrection("token", high=3.0)) - token) < 0.01  # token ratios are seldom above 3


def test_a_token_correction_may_be_worse_than_none():
    token = policy(gates=(SamplerCorrection("token", high=UNBOUNDED),))
    assert distance(token, 2, seed=6, off_policy=True) > distance(policy(), 2, seed=6, off_policy=True)


@pytest.mark.parametrize("seed", range(1, 7))
def test_truncating_a_sequence_ratio_loses_less_than_masking_it(seed):
    gates = [SamplerCorrection("sequence", high=3.0, kind=kind) for kind in ("truncate", "mask")]
    truncated, masked = (distance(policy(gates=(gate,)), 2, seed=seed, off_policy=True) for gate in gates)
    assert truncated < masked


@pytest.mark.parametrize("size", [2, 3])
def test_a_mean_that_includes_the_row_shrinks_the_gradient(size):
    """By one over the size of the group."""
    assert distance(policy("mean", surrogate=Clip()), size, factor=1 - 1 / size) < EXACT
    assert distance(policy("mean", surrogate=Clip()), size) == pytest.approx(1 / size)


@pytest.mark.parametrize("ratio", [Ratio(), Ratio("sequence")], ids=["grpo", "gspo"])
def test_the_mean_of_row_means_weighs_each_row_by_one_over_its_length(ratio):
    process, reward = uneven()
    found = expected_gradient(process, policy(ratio=ratio, surrogate=Clip(), reduction="row"), 2, reward)
    log_probability = process.string_log_probabilities()
    probability, length = log_probability.detach().exp(), process.trajectories().length.double()
    centred = (reward - (probability * reward).sum()) / length
    short = torch.autograd.grad((probability * centred * log_probability).sum(), process.logits)[0]
    assert deviation(found, short) < EXACT
    assert deviation(found, policy_gradient(process, reward)) > 0.5


def by_tuples(rate, size, advantage):
    """E[mean_i A_i d log P(r_i) / dp], over all tuples of `size` binary rewards: the factor on the gradient of p."""
    total, mass = 0.0, 0.0
    for rewards in itertools.product((0, 1), repeat=size):
        probability = math.prod(rate if reward else 1 - rate for reward in rewards)
        given = advantage(rewards)
        if given is None:
            continue
        mass += probability
        slopes = [1 / rate if reward else -1 / (1 - rate) for reward in rewards]
        total += probability * sum(a * slope for a, slope in zip(given, slopes, strict=True)) / size
    return total / mass


def standardised(rewards):
    spread = statistics.stdev(rewards)
    return [(reward - statistics.mean(rewards)) / spread if spread else 0.0 for reward in rewards]


@pytest.mark.parametrize("size", [2, 3, 4, 8])
@pytest.mark.parametrize("rate", [0.02, 0.1, 0.3, 0.5, 0.9])
def test_the_factor_of_the_group_deviation_is_that_of_all_tuples(size, rate):
    assert standard_deviation_factor(rate, size) == pytest.approx(by_tuples(rate, size, standardised), rel=1e-9)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_standardising_binary_rewards_multiplies_the_gradient(size):
    """By the factor in closed form."""
    process = markov(symbols=3, length=2, order=None, end=False, seed=3)
    reward = (Rng(4).uniform(9) < 0.4).double()
    rate = float((process.string_probabilities().detach() * reward).sum())
    credit = GroupCredit("mean", "std", epsilon=1e-30)
    found = expected_gradient(process, policy(credit, surrogate=Clip()), size, reward)
    factor = standard_deviation_factor(rate, size)
    assert deviation(found, factor * policy_gradient(process, reward)) < EXACT
    population = expected_gradient(process, policy(GroupCredit("mean", "std", epsilon=1e-30, ddof=0)), size, reward)
    larger = factor * math.sqrt(size / (size - 1))
    assert deviation(population, larger * policy_gradient(process, reward)) < EXACT


@pytest.mark.parametrize(("size", "constant"), [(2, 1 / math.sqrt(2)), (3, 2 / math.sqrt(3))])
@pytest.mark.parametrize("rate", [0.01, 0.2, 0.5, 0.99])
def test_groups_of_two_and_three_have_no_difficulty_bias(size, constant, rate):
    assert standard_deviation_factor(rate, size) == pytest.approx(constant, rel=1e-12)


@pytest.mark.parametrize(("size", "printed"), [(8, (2.41, 2.18, 1.84, 1.74)), (64, (5.82, 3.23, 2.14, 1.97))])
def test_the_factors_of_larger_groups_are_those_of_the_card(size, printed):
    found = [standard_deviation_factor(rate, size) for rate in (0.02, 0.1, 0.3, 0.5)]
    assert [round(value, 2) for value in found] == list(printed)
    assert standard_deviation_factor(0.5, 1000) == pytest.approx(2.0, abs=4 / 1000)  # 1 / sqrt(p q), less O(1/G)


@pytest.mark.parametrize(("rate", "printed"), [(0.02, "6.7"), (0.1, "1.76"), (0.5, "1.01")])
def test_refilling_groups_of_eight_multiplies_the_gradient(rate, printed):
    """By 1 / (1 - p^G - (1 - p)^G), p the success rate."""

    def leave_one_out(rewards):
        if len(set(rewards)) == 1:
            return None  # replaced by another group
        return [reward - (sum(rewards) - reward) / (len(rewards) - 1) for reward in rewards]

    found = by_tuples(rate, 8, leave_one_out)
    assert found == pytest.approx(1 / (1 - rate**8 - (1 - rate) ** 8), rel=1e-9)
    assert f"{found:.{len(printed.split('.')[1])}f}" == printed


@dataclass(frozen=True)
class BestOfOthers(Part):
    """The mistake of a baseline that sees the row it judges: the group's largest reward."""

    def __call__(self, batch):
        best = batch.reward.reshape(-1, 2).amax(1, keepdim=True).expand(-1, 2).reshape(-1)
        return batch.reward - best


@dataclass(frozen=True)
class OneTokenShort(SamplerCorrection):
    """The mistake of a product that leaves out the last step."""

    def __call__(self, batch, log_ratio, advantage):
        return ((batch.old - batch.behaviour) * batch.mask)[:, :-1].sum(1, keepdim=True).exp()


def test_planted_mistakes_are_not_exact():
    assert distance(policy(BestOfOthers()), 2) > 0.1
    assert distance(policy(gates=(OneTokenShort("sequence"),)), 2, off_policy=True) > 0.05
    assert distance(policy(GroupCredit("batch")), 2, factor=0.5) > 0.1
