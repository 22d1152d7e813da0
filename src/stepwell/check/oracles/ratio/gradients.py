"""Oracles of methods that differ in the ratio, its clip, and the steps that train."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from stepwell.batch import Batch, Read
from stepwell.check.oracles.expected import all_groups, expected_gradient, policy_gradient
from stepwell.check.oracles.provable import Provable, deviation, policy_of
from stepwell.check.oracles.ratio.rows import HORIZON, seen
from stepwell.check.oracles.ratio.slopes import stated
from stepwell.check.oracles.registry import register
from stepwell.credit.group import GroupCredit
from stepwell.objective.gates.minibatch import EntropyChange, HiddenReward
from stepwell.objective.policy import Policy
from stepwell.objective.ratio import Ratio, runs
from stepwell.objective.reduction import Reduction
from stepwell.objective.surrogate import Score
from stepwell.objective.term import Objective, Term
from stepwell.process.base import Scores
from stepwell.process.exact.table import TabularLanguage, markov
from stepwell.rng import Rng
from stepwell.sampling.request import Completion, Prompt, Request
from stepwell.sampling.rollout import rollout
from stepwell.trajectories import Trajectories, count

NEEDS = ("entropy", "hidden", "logits")


def stale(far: float = 0.5) -> tuple[TabularLanguage, Trajectories]:
    """Rows that an earlier policy drew, with a hole as a tool's words leave it, and a process that is far from them.

    Every third step of a row is not the policy's own; the last rows of two prompts are of source 1, and one of those
    prompts has no success.
    """
    process = markov(symbols=4, length=HORIZON, prompts=3, seed=21)
    process.module.get_parameter("value").data.copy_(Rng(22).normal(3, process.contexts, dtype=torch.float64))
    rows = rollout(process, [Request(Prompt(p, p), size) for p, size in enumerate((5, 4, 4))], Rng(27)).trajectories
    mask = rows.mask & (torch.arange(rows.mask.shape[1]) % 4 != 2)
    rng = Rng(24)
    reward = rng.normal(len(rows), dtype=torch.float64)
    rows = rows.replace(
        mask=mask,
        reward=torch.where(rows.prompt == 2, -reward.abs(), reward),
        source=torch.isin(torch.arange(len(rows)), torch.tensor([4, 12])).long(),
        segment=process.segments(rows),
    )
    with torch.no_grad():
        scores = process.score(rows, ("value",))
        noise = rng.normal(*mask.shape, dtype=torch.float64)
        rows = rows.replace(
            old_log_prob=scores.log_prob,
            value=scores["value"],
            log_prob=(scores.log_prob - (0.4 * noise).abs()) * mask,
            reference_log_prob=(scores.log_prob + 0.3 * noise.flip(0)) * mask,
        )
    process.logits.data.add_(far * rng.normal(*process.logits.shape, dtype=torch.float64))
    return process, rows


def slopes(objective: Term | Objective, process: TabularLanguage, rows: Trajectories) -> Tensor:
    """(N, T) d loss / d log pi of an update on these rows."""
    objective = Objective((objective,)) if isinstance(objective, Term) else objective
    counts = count(rows, process.horizon)
    scores = process.score(rows, sorted(objective.needs | objective.present | set(NEEDS))).detach()
    leaf = Scores(scores.log_prob.requires_grad_(), scores.extra)
    targets = objective.plan(Batch(rows, counts, scores))
    return torch.autograd.grad(objective.loss(Batch(rows, counts, leaf), targets).value, leaf.log_prob)[0]


WAYS: dict[str, tuple[dict[str, Any], ...]] = {
    "bnpo": ({"kl": 0.3},),
    "dual-clip": ({"c": 1.5},),
    "two-sided-clip": ({"delta": 1.5},),
    "gmpo": ({"low": 0.1, "high": 0.15},),
    "luspo": ({"low": 0.1, "high": 0.1},),
    "tis": ({"mask": True}, {"sequence": True, "cap": 3.0}, {"sequence": True, "mask": True}, {"floor": 1.2}),
    "turn-ppo": ({"product": True, "gamma": 0.9},),
    "clip-cov": ({"low": 0.1, "fraction": 1.0},),
    "kl-cov": ({"fraction": 0.2},),
    "m2po": ({"threshold": 0.2}, {"threshold": 1e9}),
    "steer": ({"exact": True},),
    "thr": ({"p": -0.5},),
    "topr": ({"baseline": 0.3, "maximum": 2.0},),
    "dppo": ({"low": 0.05, "high": 0.1},),
    "off-policy-masking": ({"threshold": -0.3},),
    "rec-one-side": ({"importance": True},),
    "rec-two-side": ({"importance": True},),
    "rec-ring": ({"importance": True}, {"far_low": 0.3, "far_high": 0.4}),
    "trl-grpo": tuple(
        {"loss_type": loss, "importance_sampling_level": level, "epsilon_high": 5.0 if loss == "cispo" else None}
        | ({} if loss in ("sapo", "vespo", "cispo") else {"epsilon": 0.1, "delta": 1.3})
        | way
        for loss in ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo")
        for level, way in (
            ("token", {"beta": 0.3, "off_policy_mask_threshold": -0.3}),
            ("sequence", {"beta": 0.3, "scale_rewards": "batch"}),
            ("token", {"vllm_importance_sampling_mode": "token_mask", "use_bias_correction_kl": False, "beta": 0.3}),
            ("sequence", {"vllm_importance_sampling_mode": "token_truncate", "scale_rewards": "none"}),
            ("token", {"top_entropy_quantile": 0.4, "entropy_coef": 0.1}),
            ("sequence", {"top_entropy_quantile": 0.4}),
        )
    ),
    "hpt": ({"gate": -1.0}, {"gate": 1.0}, {"gate": 0.5, "success": -0.5}),
}
"""Options that the slopes are held at besides the defaults."""


@register
def stated_slopes(card: Provable) -> float:
    """d loss / d log pi of every step, on rows of an older policy, is the one that `slopes` writes out by hand."""
    process, rows = stale()
    scores = process.score(rows, NEEDS).detach()
    plain = seen(rows, scores, runs(rows.mask))
    worst = 0.0
    for way in ({"fraction": 1.0} if card.id == "clip-cov" else {}, *WAYS.get(card.id, ())):
        objective = card.recipe(**way).whole
        found = slopes(
            objective, process, rows if Read("rows", "segment") in objective.reads else rows.replace(segment=None)
        )
        expected = torch.zeros_like(found)
        for place, value in stated()[card.id](plain, {**card.options, **way}).items():
            expected[place] = value
        worst = max(worst, deviation(found, expected))
    return worst


def _model(seed: int = 1) -> tuple[TabularLanguage, Tensor, dict[str, Tensor]]:
    """Strings of one to three symbols, real rewards, and the sentences they are made of."""
    process = markov(symbols=3, length=3, order=None, seed=seed)
    reward = Rng(2).normal(len(process.strings()), dtype=torch.float64)
    return process, reward, {"segment": process.segments(process.trajectories())}


@register
def leave_one_out_gradient(card: Provable) -> float:
    """At the old policy, with leave-one-out credit summed over steps, the expected gradient is the policy gradient."""
    process, reward, fields = _model()
    recipe = card.recipe().replace(credit_of=GroupCredit("leave-one-out"), reduction=Reduction("row-sum"))
    exact = policy_gradient(process, reward)
    found = (expected_gradient(process, recipe.whole, size, reward, fields=fields) for size in (2, 3))
    return max(deviation(gradient, exact) for gradient in found)


@register
def sampler_correction(card: Provable) -> float:
    """With a stale sampler mu the expected gradient is sum_y mu(y) (R - E_mu R) sum_t w_t d log pi_t, w by enumeration.

    w is the bounded ratio of each token or of the string; the whole string's without a bound is the policy gradient.
    """
    process, reward, _ = _model()
    sampler, _, _ = _model(seed=3)
    chance = sampler.string_probabilities().detach()
    centre = reward - (chance * reward).sum()
    strings, scores = process.trajectories(), process.score(process.trajectories()).log_prob
    rho = ((scores - sampler.score(strings).log_prob) * strings.mask).exp().detach()
    worst = 0.0
    for way in ({}, {"mask": True}, {"sequence": True}, {"sequence": True, "mask": True, "floor": 0.3}, None):
        options = {"sequence": True, "cap": math.inf} if way is None else way
        whole = rho.prod(1, keepdim=True).expand_as(rho) if options.get("sequence") else rho
        low, high = options.get("floor", 0.0), options.get("cap", 2.0)
        weight = whole * ((whole >= low) & (whole <= high)) if options.get("mask") else whole.clamp(low, high)
        loss = (chance * centre * (weight * scores).sum(1)).sum()
        expected = torch.autograd.grad(loss, process.logits, retain_graph=True)[0]
        if way is None:
            expected = policy_gradient(process, reward)
        recipe = card.recipe(**options).replace(
            credit_of=GroupCredit("leave-one-out"), surrogate=Score(), reduction=Reduction("row-sum")
        )
        found = expected_gradient(process, recipe.whole, 2, reward, behaviour=sampler)
        worst = max(worst, deviation(found, expected))
    return worst


@register
def segment_limits(card: Provable) -> float:
    """Segments, or turns, of one token are the token's ratio; one that is the whole row is the sequence's."""
    process, rows = stale()
    steps = torch.arange(rows.mask.shape[1]).expand(rows.mask.shape).contiguous()
    policy, worst = policy_of(card), 0.0
    for segment, level in ((steps, "token"), (torch.zeros_like(steps), "sequence")):
        parted = rows.replace(segment=segment)
        twin = Policy(policy.credit_of, Ratio(level), policy.surrogate, policy.gates, policy.reduction)  # type: ignore[arg-type]
        worst = max(worst, deviation(slopes(policy, process, parted), slopes(twin, process, parted)))
    return worst


@register
def tapered_gradient(card: Provable) -> float:
    """On strings of a stale policy mu the gradient is sum_y mu(y) w(y) R(y) d log pi(y).

    w is 1 where R >= 0 and min(maximum, pi / mu) elsewhere; without a maximum that is importance sampling.
    """
    process, reward, _ = _model()
    sampler, _, _ = _model(seed=3)
    rows, probability = all_groups(process, 1, reward, sampler)
    rows = rows.replace(old_log_prob=rows.log_prob)  # mu is the old policy
    log_pi, chance = process.string_log_probabilities(), sampler.string_probabilities().detach()
    worst = 0.0
    for maximum in (1.0, 2.0, math.inf):
        ratio = (log_pi.detach().exp() / chance).clamp(max=maximum)
        weight = torch.where(reward >= 0, 1.0, ratio)
        expected = torch.autograd.grad((chance * weight * reward * log_pi).sum(), process.logits, retain_graph=True)[0]
        slope = slopes(card.recipe(maximum=maximum).whole, process, rows) * probability[:, None] * len(rows)
        found = -torch.autograd.grad((slope * process.score(rows).log_prob).sum(), process.logits)[0]
        worst = max(worst, deviation(found, expected))
    return worst


@register
def shifted_gradient(card: Provable) -> float:
    """On policy the gradient is 1 - 1/G times the exact one at any shift; off policy -shift d E_mu log pi is added."""
    process, reward, _ = _model()
    sampler, _, _ = _model(seed=3)
    worst = 0.0
    for shift in (-0.5, 0.2):
        policy = policy_of(card, shift=shift)
        worst = max(
            worst, deviation(expected_gradient(process, policy, 2, reward), policy_gradient(process, reward) / 2)
        )
        stale_, plain = (
            expected_gradient(process, term, 2, reward, behaviour=sampler)
            for term in (policy, policy_of(card, shift=0.0))
        )
        likelihood = (sampler.string_probabilities().detach() * process.string_log_probabilities()).sum()
        added = torch.autograd.grad(-shift * likelihood, process.logits)[0]
        worst = max(worst, deviation(stale_ - plain, added))
    return worst


@register
def entropy_change(card: Provable) -> float:
    """With `exact`, O is minus the derivative of a step's entropy along r A (e_a - pi), by autograd on its logits."""
    process, rows = stale()
    (gate,) = policy_of(card, exact=True).gates
    assert isinstance(gate, EntropyChange)
    scores = process.score(rows, NEEDS).detach()
    advantage = Rng(5).normal(*rows.mask.shape, dtype=torch.float64)
    found = gate.change(Batch(rows, count(rows), scores), advantage)
    logits = scores["logits"].clone().requires_grad_()
    log_probs = logits.log_softmax(-1)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    slope = torch.autograd.grad(entropy.sum(), logits)[0]
    error = torch.nn.functional.one_hot(rows.action, log_probs.shape[-1]) - log_probs.detach().exp()
    step = (scores.log_prob - rows.old_log_prob).exp() * advantage * rows.mask  # type: ignore[operator]
    return deviation(-found, step * (slope * error).sum(-1))


@register
def hidden_influence(card: Provable) -> float:
    """THR_k is A_k times the inner product of d log pi_k and d sum_t log pi_t of the good rows, in the logits."""
    process, rows = stale()
    (gate,) = policy_of(card).gates
    assert isinstance(gate, HiddenReward)
    advantage = Rng(6).normal(len(rows), dtype=torch.float64)[:, None].expand(rows.mask.shape)
    batch = Batch(rows, count(rows), process.score(rows, NEEDS).detach())
    found, worst = gate.influence(batch, advantage), 0.0
    slope = functools.partial(torch.autograd.grad, inputs=process.logits, retain_graph=True)
    log_prob = process.score(rows).log_prob
    for prompt in rows.prompt.unique():
        here = rows.prompt == prompt
        good = slope(log_prob[here & (advantage[:, 0] > 0)].sum())[0]
        for i, t in (rows.mask & here[:, None]).nonzero().tolist():
            exact = advantage[i, t] * (slope(log_prob[i, t])[0] * good).sum()
            worst = max(worst, float((found[i, t] - exact).abs()))
    return worst


@register
def mixture_ratio(card: Provable) -> float:
    """On a demonstration, as it comes from the data, the ratio is 4 pi / (1 + 3 old); on own rows it is pi / old."""
    process = markov(symbols=3, length=3, seed=7)
    drawn = rollout(
        process,
        [Request(Prompt(0, 0), 3), Request(Prompt(0, 0), 1, start=Completion((1, 2, 0)), source=1)],
        Rng(8),
    )
    with torch.no_grad():
        rows = drawn.trajectories.replace(old_log_prob=process.score(drawn.trajectories).log_prob)
        process.logits.add_(0.5 * Rng(9).normal(*process.logits.shape, dtype=torch.float64))
        batch = Batch(rows, count(rows), process.score(rows))
        pi, old = batch.log_prob.exp(), batch.old.exp()
        expected = torch.where((rows.source > 0)[:, None], 4 * pi / (1 + 3 * old), pi / old)
        found = policy_of(card).ratio(batch).exp()
    return float(((found - expected) * batch.mask).abs().max())


@register
def either_half(card: Provable) -> float:
    """If all prompts succeed the demonstrations might be away; if none does the gradient is imitation's alone."""
    process, rows = stale()
    learns, copies = (slopes(card.recipe(gate=gate).whole, process, rows) for gate in (-1.0, 1.0))
    own = rows.source == 0
    worst = deviation(learns[own], slopes(card.recipe(gate=-1.0).whole, process, rows[own]))
    others = rows[~own]
    log_prob = process.score(others).log_prob.detach().requires_grad_()
    likelihood = ((log_prob * others.mask).sum(1) / others.mask.sum(1)).sum() / len(rows.prompt.unique())
    worst = max(worst, deviation(copies[~own], torch.autograd.grad(-likelihood, log_prob)[0]))
    return worst + float(learns[~own].abs().max() + copies[own].abs().max())
