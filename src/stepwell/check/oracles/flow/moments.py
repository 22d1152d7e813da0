"""Oracles of flow methods over all noise: expected gradients against the moment recursion of a Gaussian chain.

In one dimension, with an affine velocity and the reward -(x - c)^2, the mean m and the variance s of the state follow
m' = g m + h and s' = g^2 s + q^2, so E[r] = -((m - c)^2 + s) and its gradient through any subset of the steps are
exact; so is the expectation of a method's own gradient, over every outcome of its own rollout (`bench.Signs`).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from stepwell.check.oracles.flow.bench import affine_flow, both, drawn, every_outcome, loss_gradient, planned
from stepwell.check.oracles.flow.gradients import kind_by_hand
from stepwell.check.oracles.flow.steps import TARGET, Matrices, chain_by_hand, uniform_times
from stepwell.check.oracles.provable import Provable, deviation, known, variants
from stepwell.check.oracles.registry import register
from stepwell.credit.branches import BranchExtremes, Pooled, TreeCredit
from stepwell.credit.group import GroupCredit
from stepwell.credit.shaping import Bounded, DivergencePenalty, Outcome
from stepwell.objective.policy import Policy
from stepwell.parts import Part
from stepwell.process.models import Models
from stepwell.recipe.recipe import Recipe


@dataclass(frozen=True)
class Chain:
    """A rollout by hand: the kind of each step along its times, and the weight of each place's gradient.

    `trained`: the places of the steps through which the gradient passes; all other steps are frozen.
    """

    kinds: tuple[str, ...]
    times: tuple[float, ...]
    weights: dict[int, float]


def expected_reward_gradient(
    chain: Chain, level: float, numbers: Matrices, kl: float = 0.0, reference: Matrices | None = None
) -> Tensor:
    """The gradient of E[r] - kl KL(path || reference), each trained step's share times its weight.

    KL = sum over trained steps of E[(mu - mu_ref)^2] / (2 q^2).
    """
    slope, shift = (value.clone().requires_grad_() for value in (numbers.slope, numbers.shift))
    grid = len(numbers.shift)
    mean, variance, penalty = torch.zeros(()).double(), torch.ones(()).double(), torch.zeros(()).double()
    for step in chain_by_hand(chain.kinds, level, chain.times, grid):
        a, b = slope[step.place, 0, 0], shift[step.place, 0]
        if step.place not in chain.weights:
            a, b = a.detach(), b.detach()
        elif kl and reference is not None:
            da, db = a - reference.slope[step.place, 0, 0], b - reference.shift[step.place, 0]
            gap = da**2 * (variance + mean**2) + 2 * da * db * mean + db**2
            penalty = penalty + step.velocity**2 * gap / (2 * step.noise**2)
        gain = step.state + step.velocity * a
        mean, variance = gain * mean + step.velocity * b, gain**2 * variance + step.noise**2
    value = -((mean - TARGET) ** 2 + variance)
    parts = torch.autograd.grad(value - kl * penalty, (slope, shift))
    weight = torch.tensor([chain.weights.get(place, 0.0) for place in range(grid)], dtype=torch.float64)
    return torch.cat([parts[0].reshape(-1) * weight, parts[1].reshape(-1) * weight])


def unscaled(credit: Part) -> Part:
    """A credit without what is no polynomial in the noise: deviations, bounds and selections; the baseline stays."""
    if isinstance(credit, Bounded):
        return unscaled(credit.part)
    if isinstance(credit, Pooled):
        return Pooled(unscaled(credit.credit))
    if isinstance(credit, TreeCredit):
        return replace(credit, scale=False)
    if isinstance(credit, BranchExtremes):
        return GroupCredit("mean", keys=("prompt", "origin"))
    return replace(credit, scale="none") if isinstance(credit, GroupCredit) else credit


def _expected(card: Provable, recipe: Recipe, chains: Sequence[Chain], level: float, rollout: int = 0) -> float:
    """The deviation of the expectation of the method's gradient from the sum of the chains'."""
    models = affine_flow(recipe, dimension=1)
    policy = recipe.whole.terms[0]
    assert isinstance(policy, Policy)
    recipe = recipe.replace(credit_of=unscaled(policy.credit_of))
    rows = every_outcome(models, recipe, rollout)
    found, _ = loss_gradient(models, recipe, rows, names=int(rows.prompt.max()) + 1)
    numbers = Matrices.of(models.policy.module)
    exact = [expected_reward_gradient(chain, level, numbers) for chain in chains]
    return deviation(-found, torch.stack(exact).sum(0))


ROW_SUM = ("ddpo-sf", "loop", "ctrl")
LEAVE_ONE_OUT = ("loop", "ctrl")


def _windowed(card: Provable, kind: str, level: float, steps: int, window: tuple[int, int], size: int) -> Chain:
    """All rows of a group of `size` draw noise in the steps of a window, and follow the ODE in all others."""
    times = uniform_times(steps)
    kinds = [kind if window[0] <= k < window[1] else "ode" for k in range(steps)]
    weight = 1.0 if card.id in LEAVE_ONE_OUT else 1.0 - 1.0 / size
    weight /= 1 if card.id in ROW_SUM else window[1] - window[0]
    weights = dict.fromkeys(range(*window), weight)
    if card.id == "grpo-guard":
        chain = chain_by_hand(kinds, level, times, steps)
        weights = {k: weight * chain[k].noise / (chain[k].time - chain[k].target) for k in weights}
    return Chain(tuple(kinds), tuple(times), weights)


@register
def policy_moment_gradient(card: Provable) -> float:
    """The expected gradient is that of the expected reward through the random steps alone, times 1 - 1 / G.

    G is the size of the group that a row's baseline is the mean of; a baseline of the others' mean has no such factor.
    Averages over steps divide by their number. For windows in every position, and for a short ending by another
    solver too.
    """
    worst, steps = 0.0, 4
    moving = card.options.get("hold") is not None
    for options in variants(card):
        kind, level = kind_by_hand(card, options)
        everything = known(card, {"steps": steps, "hold": 1, "window": 2 if moving else 0})
        recipe = planned(card.recipe(**options | everything), size=2)
        for rollout, window in enumerate([(0, 2), (1, 3)] if moving else [(0, steps - 1)]):
            chain = _windowed(card, kind, level, steps, window, 2)
            worst = max(worst, _expected(card, recipe, [chain], level, rollout))
        if "flash" in card.options:  # four steps are left, of which int(0.6 * 4) are made, in equal parts
            recipe = planned(card.recipe(**options, steps=5, window=1, flash=0.6), size=2)
            tail = Chain((kind, "ode", "ode"), (1.0, 0.8, 0.4, 0.0), {0: 0.5})
            worst = max(worst, _expected(card, recipe, [tail], level))
        if "window" in card.options and not moving:  # somewhere at random
            recipe = planned(card.recipe(**options, steps=steps, window=2), size=2)
            for rollout in range(4):
                begin = _first_trained(card, recipe, rollout)
                chain = _windowed(card, kind, level, steps, (begin, begin + 2), 2)
                worst = max(worst, _expected(card, recipe, [chain], level, rollout))
    kind, level = kind_by_hand(card, {})
    recipe = planned(card.recipe(**known(card, {"steps": 3, "window": 2 if moving else 0})), size=3)
    return max(worst, _expected(card, recipe, [_windowed(card, kind, level, 3, (0, 2), 3)], level))


def _first_trained(card: Provable, recipe: Recipe, rollout: int) -> int:
    """The first step of a rollout's window, by the mask of its rows."""
    rows = drawn(affine_flow(recipe, dimension=1), recipe, rollout, count=1)
    return int(rows.mask[0].int().argmax()) - 1


@register
def branch_gradient(card: Provable) -> float:
    """The expected gradient is that of rows which part in one step, as if only that step drew noise, times 1 - 1 / G.

    For each plan of branches as in `BRANCHES`, published and corrected.
    """
    worst = 0.0
    for options in variants(card):
        kind, level = kind_by_hand(card, options)
        chains, chosen, settings = BRANCHES[card.id](kind, level)
        rollout = settings.pop("rollout", 0)
        recipe = planned(card.recipe(**options, **chosen), **settings)
        worst = max(worst, _expected(card, recipe, chains, level, rollout))
    return worst


def _one_step(kind: str, k: int, times: Sequence[float], weight: float) -> Chain:
    return Chain(tuple(kind if at == k else "ode" for at in range(len(times) - 1)), tuple(times), {k: weight})


Plan = tuple[list[Chain], dict[str, Any], dict[str, Any]]
"""The chains whose gradients add up to the expected one, and for it the method's options, and settings of the planner
with the number of the rollout."""


def _children(kind: str, level: float) -> Plan:
    """TempFlow: of three random steps each in turn, weighed by its q over their mean; two children each."""
    times = uniform_times(4)
    noise = [step.noise for step in chain_by_hand([kind] * 3, level, times[:4], 4)]
    weights = [0.5 / 3 * q / statistics.fmean(noise) for q in noise]
    return [_one_step(kind, k, times, weights[k]) for k in range(3)], {"steps": 4, "children": 2}, {}


def _strides(kind: str, level: float) -> Plan:
    """G2RPO: each of the first two steps, then every time or every second one that is left, 0 always; summed."""
    times, chains = uniform_times(5), []
    for k in range(2):
        for stride in (1, 2):
            rest = times[k + 1 : -1 : stride]
            chains.append(_one_step(kind, k, [*times[: k + 1], *rest, 0.0], 0.5 / 2))
    return chains, {"steps": 5, "branches": 2, "size": 2, "strides": 2}, {}


def _levels(kind: str, level: float) -> Plan:
    """A tree of two levels with two branches each, moved on by one step: 2 and 4 edges, each of them once in 6."""
    chain = Chain(("ode", kind, kind, "ode"), tuple(uniform_times(4)), {1: 0.5 * 2 / 6, 2: 0.5 * 4 / 6})
    return [chain], {"steps": 4, "depth": 2, "branching": 2, "hold": 1}, {"rollout": 1}


def _last_steps(kind: str, level: float) -> Plan:
    """B2-DiffuRL: the trunk draws noise all the way, and rows part before the last three steps, two at first and one
    more after a hold, of which the very last draws none; two branches of one trunk."""
    chain = Chain((kind, kind, kind, "ode"), tuple(uniform_times(4)), {1: 0.5 / 2, 2: 0.5 / 2})
    return [chain], {"steps": 4, "least": 2, "hold": 1, "branches": 2}, {"trunks": 1, "rollout": 1}


BRANCHES: dict[str, Callable[[str, float], Plan]] = {
    "tempflow-grpo": _children,
    "g2rpo": _strides,
    "dynamic-treerpo": _levels,
    "b2-diffurl": _last_steps,
}


@register
def path_divergence(card: Provable) -> float:
    """The expected gradient is that of E[r] - kl KL(path || reference), and it is zero at the tilted distribution.

    For r = x and a first step that forgets its noise, the distribution of the last state under the reference, tilted
    by exp(r / kl), is that of the chain whose every mean is moved by q^2 / kl times the derivative of the last state in
    it: its mean is moved by its variance / kl.
    """
    steps, kl = 4, 0.3
    recipe = planned(card.recipe(steps=steps, kl=kl), size=2)
    kind, level = kind_by_hand(card, {})
    chain = Chain((kind,) * (steps - 1) + ("ode",), tuple(uniform_times(steps)), dict.fromkeys(range(steps - 1), 1.0))
    models = affine_flow(recipe, dimension=1)
    rows = every_outcome(models, recipe)
    names = int(rows.prompt.max()) + 1
    found, _ = loss_gradient(models, recipe, rows, names)
    numbers, reference = both(models)
    worst = deviation(-found, expected_reward_gradient(chain, level, numbers, kl, reference))
    policy = recipe.whole.terms[0]
    assert isinstance(policy, Policy)
    assert isinstance(policy.credit_of, GroupCredit)
    linear = recipe.replace(credit_of=replace(policy.credit_of, reward=_LastState() + DivergencePenalty(kl)))
    _tilt(models, chain, level, kl)
    rows = every_outcome(models, linear)
    at_optimum, _ = loss_gradient(models, linear, rows, names)
    moved = abs(float(rows.action[:, -1].mean()) - _tilted_mean(both(models)[1], chain, level, kl))
    return max(worst, float(at_optimum.norm() / found.norm()), moved)


@dataclass(frozen=True)
class _LastState(Outcome):
    """r = x, the row's last state."""

    def __call__(self, batch: Any) -> Tensor:
        return batch.rows.action[:, -1, 0]


def _gains(chain: Chain, level: float, numbers: Matrices) -> list[float]:
    """d x_n / d x_{k+1} for every step k."""
    steps = chain_by_hand(chain.kinds, level, chain.times, len(numbers.shift))
    answer = [1.0]
    for step in reversed(steps[1:]):
        answer.insert(0, answer[0] * (step.state + step.velocity * float(numbers.slope[step.place, 0, 0])))
    return answer


@torch.no_grad()
def _tilt(models: Models, chain: Chain, level: float, kl: float) -> None:
    """Put the network at the drift that maximises E[x_n] - kl KL, around a reference whose first step forgets."""
    network: Any = models.policy.module
    reference: Any = models.of("reference").module
    reference.slope[0] = 1.0
    network.slope.copy_(reference.slope)
    network.shift.copy_(reference.shift)
    steps = chain_by_hand(chain.kinds, level, chain.times, len(network.shift))
    for step, gain in zip(steps, _gains(chain, level, Matrices.of(reference)), strict=True):
        if step.place in chain.weights:
            network.shift[step.place] += step.noise**2 * gain / (kl * step.velocity)


def _tilted_mean(reference: Matrices, chain: Chain, level: float, kl: float) -> float:
    """m + s / kl, the mean of the reference's last state tilted by exp(x / kl)."""
    mean, variance = 0.0, 1.0
    for step in chain_by_hand(chain.kinds, level, chain.times, len(reference.shift)):
        gain = step.state + step.velocity * float(reference.slope[step.place, 0, 0])
        mean = gain * mean + step.velocity * float(reference.shift[step.place, 0])
        variance = gain**2 * variance + step.noise**2
    return mean + variance / kl
