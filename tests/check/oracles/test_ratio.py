"""The oracles of off-policy rules: each catches a planted mistake, and the figures in the cards are measured."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import statistics

import pytest
import torch

from stepwell import methods
from stepwell.check.oracles.expected import expected_gradient, policy_gradient
from stepwell.check.oracles.provable import deviation
from stepwell.check.oracles.ratio import gradients as oracles
from stepwell.check.oracles.ratio.slopes import stated
from stepwell.credit.group import GroupCredit
from stepwell.methods.language import demonstrations, off_policy, ratio, tokens, trl
from stepwell.objective.gates.minibatch import (
    DropCovariance,
    EntropyChange,
    HiddenReward,
    SecondMoment,
    TopCovariance,
)
from stepwell.objective.gates.step import HighEntropy, OneSide, Ring, SamplerCorrection, SuccessRate
from stepwell.objective.ratio import LogClip, MixtureDenominator, PerSource, Ratio
from stepwell.objective.reduction import Reduction
from stepwell.objective.surrogate import BySource, Clip, Drift, Focused, GammaScore, Plain, Score, SignedScore, Taper
from stepwell.parts import Constant
from stepwell.rng import Rng

FILES = tuple(module.__name__ for module in (ratio, off_policy, tokens, demonstrations, trl))
CREDIT = {"d3s", "guide"}  # their credit is new and their ratio is not
OURS = sorted({name for name in methods.names() if methods.get(name).build.__module__ in FILES} - CREDIT)
CAUGHT = 1e-3


def planted(name, **changes):
    """The method with other parts, under its own name and options."""
    card = methods.get(name)

    @functools.wraps(card.build)
    def build(**options):
        return card.build(**options).replace(
            **{k: v(options) if inspect.isfunction(v) else v for k, v in changes.items()}
        )

    return dataclasses.replace(card, build=build)


def test_every_method_of_the_files_has_its_slopes_written_out():
    assert set(stated()) == set(OURS)
    assert all("stated_slopes" in methods.get(name).proof for name in OURS)


def test_every_option_is_tried_away_from_its_default_or_is_a_plain_number():
    for name in OURS:
        for option, default in methods.get(name).options.items():
            assert not isinstance(default, bool) or any(option in way for way in oracles.WAYS[name]), (name, option)


class Both(LogClip):
    """The mistake of clipping on both sides whatever the advantage."""

    def __call__(self, difference, advantage):
        return difference.clamp(-self.low, self.high)


class Local(SecondMoment):
    """The mistake of a threshold for each step in place of one for their mean."""

    def __call__(self, batch, log_ratio, advantage):
        return (log_ratio**2 <= self.threshold).to(batch.mask.dtype)


class Unsigned(HiddenReward):
    """The mistake of the likeness alone, without the step's own advantage."""

    def influence(self, batch, advantage):
        return super().influence(batch, advantage) * advantage.sign()


class Unbounded(Ring):
    """The mistake of a ring that asks for no sign."""

    def __call__(self, batch, log_ratio, advantage):
        ratio = log_ratio.exp()
        return ((ratio <= 1 + self.high) | (ratio >= 1 + self.far_high)).to(batch.mask.dtype)


MISTAKES = {
    "bnpo": {"reduction": Reduction("row")},
    "dual-clip": {"surrogate": lambda o: Clip(0.2, 0.2)},
    "two-sided-clip": {"surrogate": lambda o: Clip(0.2, 0.2)},
    "gmpo": {"ratio": lambda o: Ratio("sequence", hook=Both(o.get("low", 0.4), o.get("high", 0.4)))},
    "luspo": {"reduction": Reduction("row")},
    "sspo": {"ratio": Ratio("sequence")},
    "turn-ppo": {"ratio": Ratio("sequence")},
    "discovered-po": {"surrogate": Drift(0.6, 2.0)},
    "sapo": {"surrogate": Taper(1.05, 1.0)},
    "vespo": {"surrogate": GammaScore((3.0, 2.0), (2.0, 3.0))},
    "tis": {"gates": (SamplerCorrection("token", 0.0, 1.05),)},
    "m2po": {"gates": (Local(0.2),)},
    "clip-cov": {"gates": (DropCovariance(1.0, -9.0, 9.0),)},
    "kl-cov": {"surrogate": Clip()},
    "high-entropy": {"gates": (HighEntropy(0.3),)},
    "steer": {"gates": (EntropyChange(0.7),)},
    "thr": {"gates": (Unsigned(0.1),)},
    "topr": {"ratio": Ratio("sequence")},
    "asymre": {"credit_of": lambda o: GroupCredit("mean") + Constant(o.get("shift", -0.1))},
    "opmd": {"coefficient": 1.0},
    "dppo": {"gates": (OneSide(0.15, 0.15),)},
    "off-policy-masking": {"gates": ()},
    "luffy": {"surrogate": BySource(Clip(), Plain())},
    "rec-one-side": {"gates": (OneSide(0.2, 0.4),)},
    "rec-two-side": {"gates": (OneSide(0.2, 0.2),)},
    "rec-ring": {"gates": (Unbounded(),)},
    "rl-plus": {"surrogate": BySource(Clip(), Focused(1.0))},
    "hpt": {"gates": (SuccessRate(),)},
    "trl-grpo": {"reduction": Reduction("row")},
}


@pytest.mark.parametrize("name", OURS)
def test_a_mistake_in_any_rule_is_seen_in_its_slopes(name):
    assert oracles.stated_slopes(methods.get(name)) < 1e-12
    assert oracles.stated_slopes(planted(name, **MISTAKES[name])) > CAUGHT


def test_a_surrogate_of_another_slope_at_the_old_policy_fails_the_gradient():
    wrong = planted("luspo", ratio=Ratio("sequence", "product"))  # a row counts by its length
    assert oracles.leave_one_out_gradient(methods.get("luspo")) < 1e-12
    assert oracles.leave_one_out_gradient(wrong) > CAUGHT


class Inverse(SamplerCorrection):
    """The mistake of the sampler's probability over the policy's."""

    def __call__(self, batch, log_ratio, advantage):
        return super().__call__(batch, log_ratio, advantage).clamp(min=1e-6) ** -1


def inverse(options):
    level = "sequence" if options.get("sequence") else "token"
    kind = "mask" if options.get("mask") else "truncate"
    return (Inverse(level, options.get("floor", 0.0), options.get("cap", 2.0), kind),)


def test_a_correction_the_wrong_way_round_fails_its_oracle():
    assert oracles.sampler_correction(methods.get("tis")) < 1e-12
    assert oracles.sampler_correction(planted("tis", gates=inverse)) > CAUGHT


@pytest.mark.parametrize(("name", "level"), [("sspo", "segment"), ("turn-ppo", "turn")])
def test_a_product_over_a_segment_is_not_the_sequences_ratio(name, level):
    assert oracles.segment_limits(methods.get(name)) < 1e-12
    assert oracles.segment_limits(planted(name, ratio=Ratio(level, "product"))) > CAUGHT


def test_a_taper_by_the_token_fails_its_oracle():
    assert oracles.tapered_gradient(methods.get("topr")) < 1e-12
    assert oracles.tapered_gradient(planted("topr", ratio=Ratio("token"))) > CAUGHT


def test_a_shift_the_wrong_way_fails_its_oracle():
    wrong = planted("asymre", credit_of=lambda o: GroupCredit("mean") + Constant(o.get("shift", -0.1)))
    assert oracles.shifted_gradient(methods.get("asymre")) < 1e-12
    assert oracles.shifted_gradient(wrong) > CAUGHT


def test_an_estimate_is_not_the_change_of_entropy():
    assert oracles.entropy_change(methods.get("steer")) < 1e-12
    assert oracles.entropy_change(planted("steer", gates=lambda o: (EntropyChange(0.8, False),))) > CAUGHT


class Blind(HiddenReward):
    """The mistake of errors alone, as if all hidden states were the same."""

    def influence(self, batch, advantage):
        hidden = torch.ones_like(batch.present("hidden"))
        scores = dataclasses.replace(batch.scores, extra={**batch.scores.extra, "hidden": hidden})
        return super().influence(dataclasses.replace(batch, scores=scores), advantage)


def test_an_influence_without_hidden_states_fails_its_oracle():
    assert oracles.hidden_influence(methods.get("thr")) < 1e-12
    assert oracles.hidden_influence(planted("thr", gates=(Blind(),))) > CAUGHT


def test_another_mixture_fails_its_oracle():
    wrong = Ratio(denominator=PerSource(MixtureDenominator((("old", 0.5), ("behaviour", 0.5)))))
    assert oracles.mixture_ratio(methods.get("rl-plus")) < 1e-12
    assert oracles.mixture_ratio(planted("rl-plus", ratio=wrong)) > CAUGHT


def test_demonstrations_in_the_statistics_fail_the_oracle_of_halves():
    assert oracles.either_half(methods.get("hpt")) < 1e-12
    assert oracles.either_half(planted("hpt", credit_of=GroupCredit("mean", "std"))) > CAUGHT
    assert oracles.either_half(planted("hpt", reduction=Reduction("row"))) > CAUGHT


def test_kl_covs_penalty_on_other_steps_is_seen():
    card = methods.get("kl-cov")

    @functools.wraps(card.build)
    def build(**options):
        recipe = card.build(**options)
        policy, held = recipe.whole.terms
        return recipe.replace(objective=policy + dataclasses.replace(held, credit_of=None))

    assert isinstance(card.recipe().whole.terms[1].gates[0], TopCovariance)
    assert oracles.stated_slopes(dataclasses.replace(card, build=build)) > CAUGHT


# the figures of the cards


def test_the_token_mean_of_micro_batches_depends_on_their_cut():
    """As the card says, and by how much."""
    process, rows = oracles.stale()
    ours = oracles.slopes(methods.get("bnpo").recipe().whole, process, rows)
    tokens = int(rows.mask.sum())

    def by_micro_batch(order, size):
        answer, parts = torch.zeros_like(ours), order.split(size)
        for part in parts:
            answer[part] = ours[part] * tokens / rows.mask[part].sum() / len(parts)
        return answer

    orders = [Rng(seed).permutation(len(rows)) for seed in range(200)]
    away = statistics.fmean(deviation(by_micro_batch(order, 2), ours) for order in orders)
    assert round(100 * away) == 34
    assert (int(rows.mask.sum(1).min()), int(rows.mask.sum(1).max())) == (1, 5)
    grpo = oracles.slopes(methods.get("grpo").recipe().whole, process, rows)
    assert deviation(by_micro_batch(orders[0], 1), grpo) < 1e-12
    assert "34 %" in methods.get("bnpo").note


def test_the_bias_of_bounded_corrections_is_what_the_card_says():
    process, reward, _ = oracles._model()
    sampler = process.frozen()
    sampler.logits.data.add_(0.3 * Rng(4).normal(*process.logits.shape, dtype=torch.float64))
    exact, card = policy_gradient(process, reward), methods.get("tis")

    def off(gates=None, **options):
        recipe = card.recipe(**options)
        recipe = recipe if gates is None else recipe.replace(gates=gates)
        recipe = recipe.replace(
            credit_of=GroupCredit("leave-one-out"), surrogate=Score(), reduction=Reduction("row-sum")
        )
        return round(100 * deviation(expected_gradient(process, recipe.whole, 2, reward, sampler), exact))

    found = [off(gates=()), off(sequence=True), off(sequence=True, mask=True), off()]
    assert found == [35, 6, 14, 34]
    assert all(f"{number} %" in card.note for number in found)
    assert off(sequence=True, cap=math.inf) == 0


def test_on_fixed_data_the_taper_stays_bounded_where_the_score_runs_away():
    """Three answers, one good; the data never change. The score pushes bad answers down for ever."""
    drawn, reward = (0.4, 0.3, 0.3), (1.0, -1.0, -1.0)

    def trained(weight):
        logits = [0.0, 0.0, 0.0]
        for _ in range(2000):
            total = sum(map(math.exp, logits))
            law = [math.exp(z) / total for z in logits]
            pulls = [drawn[y] * reward[y] * weight(law[y] / drawn[y], reward[y]) for y in range(3)]
            logits = [z + 0.1 * (pulls[v] - sum(pulls) * law[v]) for v, z in enumerate(logits)]
        return math.log(math.exp(logits[1]) / sum(map(math.exp, logits)))

    surrogate = methods.get("topr").recipe().whole.terms[0].surrogate
    assert surrogate == SignedScore((1.0, 1.0), (0.0, 1.0))

    def topr(ratio, reward):
        low, high = surrogate.positive if reward >= 0 else surrogate.negative
        return min(max(ratio, low), high)

    assert trained(lambda ratio, reward: 1.0) < -50
    assert trained(topr) > -10


@pytest.mark.parametrize(
    "name", [name for name in OURS if name not in ("asymre", "opmd", "discovered-po", "hpt", "kl-cov")]
)
def test_on_the_rows_of_the_oracle_a_rule_takes_something_away(name):
    """Its slopes differ from those without its gates and bounds, so that the oracle sees them at work."""
    process, rows = oracles.stale()
    bites = []
    for way in ({}, *oracles.WAYS.get(name, ())):
        recipe = methods.get(name).recipe(**way)
        policy = recipe.whole.terms[0]
        ratio = dataclasses.replace(policy.ratio, hook=None)
        free = Score() if isinstance(policy.surrogate, Score) else Clip(9.0, 9.0)
        bare = recipe.replace(gates=(), surrogate=free, ratio=ratio)
        found, expected = (oracles.slopes(each.whole, process, rows) for each in (bare, recipe))
        bites.append(deviation(found, expected))
    assert max(bites) > CAUGHT
