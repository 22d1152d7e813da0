"""Oracles of flow methods whose steps are Gaussian: gradients, ratios and divergences written out by hand."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stepwell.batch import Batch
from stepwell.check.oracles.flow.bench import affine_flow, both, drawn, filled, loss_gradient, rewards
from stepwell.check.oracles.flow.credit import definition, factors, path_log_ratio, seen
from stepwell.check.oracles.flow.steps import ChainStep, Matrices, Slopes, chain_by_hand, uniform_times
from stepwell.check.oracles.provable import Provable, deviation, known, variants
from stepwell.check.oracles.registry import register
from stepwell.check.replay import law
from stepwell.objective.policy import Policy
from stepwell.objective.regularise import Regulariser
from stepwell.planning.windows import Windows
from stepwell.process.base import Scores
from stepwell.process.models import Models
from stepwell.recipe.recipe import Recipe
from stepwell.rng import Rng
from stepwell.trajectories import Trajectories, count, make


def kind_by_hand(card: Provable, options: dict[str, Any]) -> tuple[str, float]:
    """The kind of a method's random steps and their level, the variant's own."""
    defined = definition(card.id)
    level = defined.level if isinstance(defined.level, float) else {**card.options, **options}[defined.level]
    published = options.get("variant") == "published" and defined.kind == "flow"
    return defined.kind + ("-published" if published else ""), level


def steps_by_hand(card: Provable, options: dict[str, Any], steps: int) -> list[ChainStep]:
    """Every step of the method's grid as a random one."""
    name, level = kind_by_hand(card, options)
    return chain_by_hand([name] * steps, level, uniform_times(steps), steps)


@register
def gaussian_gradient(card: Provable) -> float:
    """At the old parameters the gradient is the sum over trained steps of -W A (x' - mu) / q^2 . dmu / dtheta.

    mu and q are those of the paper's step in flow coordinates, A and W those of its credit and its reduction, the
    latter over D as published, whose ratio is that of mean log-densities.
    """
    worst = 0.0
    for options in variants(card):
        options |= known(card, {"level": 0.6, "eta": 0.8})
        recipe = card.recipe(**options)
        models = affine_flow(recipe)
        rows = drawn(models, recipe)
        rows = rows.replace(reward=rewards(rows) + Rng(6).normal(len(rows), dtype=torch.float64) ** 3)
        found, _ = loss_gradient(models, recipe, rows)
        worst = max(worst, deviation(found, _policy_gradient(card, options, models, rows)))
    return worst


def _policy_gradient(card: Provable, options: dict[str, Any], models: Models, rows: Trajectories) -> Tensor:
    defined, dimension = definition(card.id), rows.action.shape[2]
    steps = steps_by_hand(card, options, rows.mask.shape[1] - 1)
    numbers, flat = Matrices.of(models.policy.module), rows.action.flatten(2)
    if defined.kl:
        taken = path_log_ratio(rows, steps, *both(models))
        rows = rows.replace(reward=rewards(rows) - card.options[defined.kl] * taken)
    views = seen(rows)
    tables = defined.advantage(views), defined.weight(views), factors(views, defined.factor, steps, dimension)
    over = dimension if options.get("variant") == "published" else 1
    answer = Slopes(numbers)
    for row, (advantage, weight, factor) in enumerate(zip(*tables, strict=True)):
        for k, value in advantage.items():
            step, x = steps[k - 1], flat[row, k - 1 : k]
            score = (flat[row, k : k + 1] - numbers.mean(step, x)) / step.noise**2
            answer.add(step.place, x, -weight[k] * factor[k] / over * value * step.velocity * score)
    return answer.flat


# what is measured away from the old parameters: on a quadrature of one step of every trained step of a chain

NODES = 20


def _quadrature(
    models: Models, recipe: Recipe, steps: Sequence[ChainStep], width: float = 1.0, nodes: int = NODES
) -> tuple[Trajectories, Tensor]:
    """Rows that each hold one random step from a state of its own, at nodes^2 values of its noise, and their weights.

    All that the method reads is filled in under the present parameters.
    """
    points, weights = np.polynomial.hermite_e.hermegauss(nodes)
    grid = torch.tensor(list(itertools.product(points, repeat=2)), dtype=torch.float64)
    mass = torch.tensor([a * b for a, b in itertools.product(weights / weights.sum(), repeat=2)], dtype=torch.float64)
    numbers, places = Matrices.of(models.policy.module), [k for k, step in enumerate(steps[:-1], 1) if step.noise > 0]
    states = width * Rng(7).normal(len(places), 2, dtype=torch.float64)
    count_ = len(grid)
    action = torch.zeros(len(places) * count_, len(steps) + 1, 2, dtype=torch.float64)
    mask = torch.zeros(action.shape[:2], dtype=torch.bool)
    for part, k in enumerate(places):
        here = slice(part * count_, (part + 1) * count_)
        action[here, k - 1] = states[part]
        action[here, k] = numbers.mean(steps[k - 1], states[part]) + steps[k - 1].noise * grid
        mask[here, k] = True
    length = torch.full((len(action),), action.shape[1])
    prompt = torch.zeros(len(action), dtype=torch.long)
    condition = models.policy.condition([0] * len(action))
    rows = make(action, torch.zeros(mask.shape).double(), mask, length=length, prompt=prompt, condition=condition)
    reward = Rng(8).normal(len(rows), dtype=torch.float64)
    return filled(models, recipe, rows.replace(reward=reward)), mass.repeat(len(places))


def _moved(models: Models, steps: Sequence[ChainStep], rows: Trajectories, width: float) -> tuple[Tensor, Tensor]:
    """|mu - mu_old|^2 and log p - log p_old (N,) of each row's step after a move of the parameters, which is made."""
    old = Matrices.of(models.policy.module)
    models.policy.module.move(width, seed=9)  # type: ignore[operator]
    new = Matrices.of(models.policy.module)
    squares, log_ratio = torch.zeros(2, len(rows), dtype=torch.float64)
    places = _places(rows)
    for k in places.unique().tolist():
        rows_here, step = places == k, steps[k - 1]
        x, after = rows.action[rows_here, k - 1], rows.action[rows_here, k]
        here, there = new.mean(step, x), old.mean(step, x)
        squares[rows_here] = (here - there).square().sum(1)
        change = (after - there).square().sum(1) - (after - here).square().sum(1)
        log_ratio[rows_here] = change / (2 * step.noise**2)
    return squares, log_ratio


def _places(rows: Trajectories) -> Tensor:
    """(N,) the one random step of each row."""
    return rows.mask.int().argmax(1)


def _noises(steps: Sequence[ChainStep], rows: Trajectories) -> Tensor:
    """q (N,) of each row's step."""
    return torch.tensor([steps[k - 1].noise for k in _places(rows).tolist()], dtype=torch.float64)


def _policy(recipe: Recipe) -> Policy:
    term = recipe.whole.terms[0]
    assert isinstance(term, Policy)
    return term


def _mean_ratios(card: Provable, options: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """E_old[r] by quadrature, |mu - mu_old|^2 and q of every trained step, after a move, through the method's ratio."""
    recipe = card.recipe(**options, **known(card, {"steps": 6}))
    steps = steps_by_hand(card, options, recipe.sampler["steps"])
    models = affine_flow(recipe)
    rows, mass = _quadrature(models, recipe, steps)
    squares, _ = _moved(models, steps, rows, 0.1)
    with torch.no_grad():
        scores = models.score(rows, sorted(recipe.whole.needs - {"log_prob", "kl"}))
        log_ratio = _policy(recipe).ratio(Batch(rows, count(rows), scores))
    ratio = log_ratio[rows.mask].exp()
    size = NODES**2
    mean = (ratio * mass).reshape(-1, size).sum(1)
    return mean, squares[::size], _noises(steps, rows)[::size]


@register
def mean_ratio(card: Provable) -> float:
    """E_old[r] = 1 for each trained step; as published, of mean log-densities, exp(-K / D + K / D^2).

    K = |mu - mu_old|^2 / (2 q^2), D = 2, by Gauss-Hermite quadrature of the step's noise.
    """
    worst = 0.0
    for options in variants(card):
        found, squares, noise = _mean_ratios(card, options)
        divergence = squares / (2 * noise**2)
        below = (-divergence / 2 + divergence / 4).exp() if options.get("variant") == "published" else 1.0
        worst = max(worst, float((found - below).abs().max()))
    return worst


@register
def regulated_ratio(card: Provable) -> float:
    """E_old[r] = exp(|mu - mu_old|^2 / (2 D^2)), whatever the step's q."""
    found, squares, _ = _mean_ratios(card, {})
    return float((found - (squares / 8).exp()).abs().max())


@register
def divergence_bound(card: Provable) -> float:
    """The slope of the loss in a step's log-density is -W A r, and 0 iff K / D is at least the threshold and the step
    has gone on in the direction of its advantage: all eight cells of that table."""
    recipe = card.recipe(**known(card, {"steps": 5}))
    steps = steps_by_hand(card, {}, 5)
    models = affine_flow(recipe)
    rows, _ = _quadrature(models, recipe, steps, nodes=6)
    squares, log_ratio = _moved(models, steps, rows, 0.1)
    share = squares / (2 * _noises(steps, rows) ** 2) / 2
    near, far = share.unique()[1:3].tolist()
    threshold = min(1.2 * near, (near + far) / 2)
    recipe = card.recipe(**known(card, {"steps": 5, "threshold": threshold}))
    objective, counts = recipe.whole, count(rows)
    scores = models.score(rows, sorted(objective.needs - {"log_prob"})).detach()
    leaf = Scores(scores.log_prob.requires_grad_(), scores.extra)
    targets = objective.plan(Batch(rows, counts, scores))
    slope = torch.autograd.grad(objective.loss(Batch(rows, counts, leaf), targets).value, leaf.log_prob)[0][rows.mask]
    cells, expected = set(), []
    advantages = [value for entry in definition(card.id).advantage(seen(rows)) for value in entry.values()]
    for distance, r, advantage in zip((share >= threshold).tolist(), log_ratio.exp().tolist(), advantages, strict=True):
        cells.add((distance, r > 1, advantage > 0))
        dropped = distance and (r > 1) == (advantage > 0)
        expected.append(0.0 if dropped else -advantage * r / len(rows))
    assert len(cells) == 8, "the rows do not fill the table"
    return deviation(slope, torch.tensor(expected, dtype=torch.float64))


@register
def step_divergence(card: Provable) -> float:
    """The penalty is its coefficient times the mean over trained steps of KL = |mu - mu_ref|^2 / (2 q^2), and of
    |dt| / D times that in the published Flow-GRPO; value and gradient."""
    worst = 0.0
    for options in variants(card):
        recipe = card.recipe(**options, kl=0.3)
        (term,) = (term for term in recipe.whole.terms if isinstance(term, Regulariser))
        models = affine_flow(recipe)
        rows = drawn(models, recipe)
        numbers, reference = both(models)
        published = options.get("variant") == "published" and card.id == "flow-grpo"
        value, answer, share = 0.0, Slopes(numbers), 0.3 / float(rows.mask.sum())
        for k, step in enumerate(steps_by_hand(card, options, recipe.sampler["steps"]), 1):
            x = rows.action[rows.mask[:, k], k - 1]
            gap, scale = numbers.mean(step, x) - reference.mean(step, x), share
            scale *= (step.time - step.target) / 2 if published else 1.0
            if len(x):
                value += scale * float(gap.square().sum()) / (2 * step.noise**2)
                answer.add(step.place, x, scale * step.velocity * gap / step.noise**2)
        found, _ = loss_gradient(models, recipe.replace(objective=term), rows)
        counts = count(rows)
        with torch.no_grad():
            loss = term.loss(Batch(rows, counts, models.score(rows, ["kl"])), term.plan(Batch(rows, counts), {}))
        worst = max(worst, deviation(found, answer.flat), abs(float(loss.value) / value - 1.0))
    return worst


@register
def window_schedule(card: Provable) -> float:
    """A corrected window is whole in every rollout; the published one is empty in 25 of 650 and short in 75 more.

    With 25 steps that may be random, a width of 4 and a hold of 25: the position goes on after each hold, and back to
    0 only once it is above 25. At random every position is equally likely. Returns how many of 1300 rollouts have
    another window than that.
    """
    wrong = 0
    for options in variants(card):
        planner = card.recipe(**options, steps=26, window=4, hold=25).planner
        assert isinstance(planner, Windows)
        position, last = 0, 25 if options.get("variant") == "published" else 21
        for rollout in range(1300):
            if rollout and rollout % 25 == 0:
                position = 0 if position + 1 > last else position + 1
            wrong += planner.window(rollout, Rng(0)) != (position, min(position + 4, 25))
        chance = card.recipe(**options, steps=6, window=2, schedule="random").planner
        assert isinstance(chance, Windows)
        found = law(functools.partial(chance.window, 0))
        wrong += found.keys() != {(place, place + 2) for place in range(4)}
        wrong += sum(abs(probability - 1 / 4) > 1e-12 for probability in found.values())
    return float(wrong)
