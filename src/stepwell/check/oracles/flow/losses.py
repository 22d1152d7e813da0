"""Oracles of flow methods that train on pairs or on points of the forward path: each loss written out by hand."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from stepwell.batch import Batch
from stepwell.check.oracles.flow.bench import affine_flow, both, drawn, loss_gradient, points, rewards
from stepwell.check.oracles.flow.credit import Seen, seen, standardised
from stepwell.check.oracles.flow.gradients import steps_by_hand
from stepwell.check.oracles.flow.steps import TARGET, Matrices, Slopes, uniform_times
from stepwell.check.oracles.provable import Provable, deviation, known
from stepwell.check.oracles.registry import register
from stepwell.columns import Columns
from stepwell.objective.flow.forward import ForwardPairs
from stepwell.process.base import Scores
from stepwell.recipe.recipe import Recipe
from stepwell.rng import Rng
from stepwell.trajectories import Trajectories, count


def _pairs(rows: list[Seen], by_state: bool) -> list[tuple[int, int]]:
    """The best and the worst row of each prompt, or of each state."""
    groups: dict[Any, list[int]] = {}
    for place, row in enumerate(rows):
        groups.setdefault(row.origin if by_state else row.prompt, []).append(place)
    ends = [
        (max(group, key=lambda at: rows[at].reward), min(group, key=lambda at: rows[at].reward))
        for group in groups.values()
    ]
    return [(best, worst) for best, worst in ends if rows[best].reward > rows[worst].reward]


@register
def step_preference(card: Provable) -> float:
    """The gradient is the mean over states of -beta sigmoid(-beta d) (grad log p(w) - grad log p(l)).

    d is the difference of log p - log p_reference of the best and the worst of a state's candidates, by the method's
    steps; every step of a row has its own state, and each candidate is judged by the data predicted from it.
    """
    beta, steps, size = 3.0, 5, 4
    options = known(card, {"beta": beta, "steps": steps, "candidates": size, "eta": 0.8})
    recipe = card.recipe(**options)
    models = affine_flow(recipe)
    rows = drawn(models, recipe)
    found, value = loss_gradient(models, recipe, rows)
    numbers, reference = both(models)
    chain, views = steps_by_hand(card, options, steps), seen(rows)
    pairs, answer, loss = _pairs(views, by_state=True), Slopes(numbers), 0.0
    worst = float(len(pairs) != 3 * (steps - 1))
    for best, least in pairs:
        k = views[best].trained[0]
        step, x = chain[k - 1], rows.action[best, k - 1 : k]
        ends = rows.action[[best, least], k]
        near, far = ((ends - side.mean(step, x)) / step.noise**2 for side in (numbers, reference))
        squares = (far.square() - near.square()).sum(1) * step.noise**2 / 2
        difference = float(squares[0] - squares[1])
        weight = -beta / (1 + math.exp(beta * difference)) / len(pairs)
        loss += math.log1p(math.exp(-beta * difference)) / len(pairs)
        answer.add(step.place, x, weight * step.velocity * (near[:1] - near[1:]))
    for row, view in enumerate(views):
        k = view.trained[-1]
        x, time = rows.action[row, k], chain[k - 1].target
        judged = -(x - time * numbers.velocity(x, k) - TARGET).square().sum()
        worst = max(worst, abs(float(judged - rewards(rows)[row])), float(len(view.trained) != 1))
    return max(worst, deviation(found, answer.flat), abs(value / loss - 1.0))


def _at_points(rows: Trajectories) -> tuple[Tensor, Tensor, Tensor]:
    """t (N, K), x_t and u = e - x_0 (N, K, D) by hand on the linear path, from the points that a term drew."""
    time, noise = points(rows)["time"], points(rows)["noise"]
    data = rows.action[torch.arange(len(rows)), rows.length - 1][:, None]
    return time, (1 - time[..., None]) * data + time[..., None] * noise, noise - data


def _places(time: Tensor, steps: int) -> Tensor:
    return ((1 - time) * steps).round().long().clamp(0, steps - 1)


def _velocities(numbers: Matrices, x: Tensor, place: Tensor) -> Tensor:
    return torch.einsum("nkij,nkj->nki", numbers.slope[place], x) + numbers.shift[place]


def _add_points(answer: Slopes, place: Tensor, x: Tensor, pull: Tensor) -> None:
    for at in place.unique().tolist():
        here = place == at
        answer.add(at, x[here], pull[here])


@register
def denoising_preference(card: Provable) -> float:
    """The loss is -log sigmoid(beta (s_w - s_l)), s = -mean_k (|v - u|^2 - |v_ref - u|^2) / D over points that both
    rows of a pair share; its gradient; and its fixed point.

    With labels drawn with probability sigmoid(r_w - r_l) the loss is flat where beta s = r, up to a constant.
    """
    beta, steps = 0.7, 5
    recipe = card.recipe(**known(card, {"beta": beta, "steps": steps, "points": 3}))
    models = affine_flow(recipe)
    rows = drawn(models, recipe)
    found, value = loss_gradient(models, recipe, rows)
    numbers, reference = both(models)
    time, x, target = _at_points(rows)
    place = _places(time, steps)
    now, then = (_velocities(side, x, place) - target for side in (numbers, reference))
    score = -(now.square().mean(2) - then.square().mean(2)).mean(1)
    pairs, answer, loss = _pairs(seen(rows), by_state=False), Slopes(numbers), 0.0
    worst = float(len(pairs) != 3)
    for best, least in pairs:
        same = torch.equal(time[best], time[least]) and torch.equal(*points(rows)["noise"][[best, least]])
        on_grid = set(time[best].tolist()) <= set(uniform_times(steps)[:-1])
        worst = max(worst, float(not same), float(not on_grid))
        logit = beta * float(score[best] - score[least])
        loss += math.log1p(math.exp(-logit)) / len(pairs)
        weight = -beta / (1 + math.exp(logit)) / len(pairs)
        for row, sign in ((best, 1.0), (least, -1.0)):
            pull = -2 * sign * weight * now[row] / now[row].numel()
            _add_points(answer, place[row], x[row], pull)
    worst = max(worst, deviation(found, answer.flat), abs(value / loss - 1.0))
    return max(worst, _labels_fixed_point(recipe, rows, then, beta))


def _labels_fixed_point(recipe: Recipe, rows: Trajectories, then: Tensor, beta: float) -> float:
    """The slope of the expected loss in v where s = (r - max r) / beta, v being as far from u as that takes."""
    (term,) = recipe.whole.terms
    assert isinstance(term, ForwardPairs)
    reward = Rng(3).normal(len(rows), dtype=torch.float64)
    less = (reward.max() - reward) / beta  # s, which has to be 0 or less for there to be such a v
    shrink = (1 + less / then.square().mean((1, 2))).sqrt()[:, None, None]
    forward = (points(rows)["target"] + shrink * then).requires_grad_()
    score = term.score(Batch(rows, count(rows), Scores(rows.log_prob, {"forward": forward})))
    chosen, rejected = (index.reshape(-1) for index in torch.meshgrid(*[torch.arange(len(rows))] * 2, indexing="ij"))
    weight = torch.sigmoid(reward[chosen] - reward[rejected])
    loss = (weight * term.link(score[chosen], score[rejected])).sum() / weight.sum()
    return float(torch.autograd.grad(loss, forward)[0].norm())


# the forward path


@register
def negative_aware_minimum(card: Provable) -> float:
    """The loss is flat at v = v_old + (2 r - 1) (u - v_old) / beta, r = 1/2 + clip(A, -C, C) / (2 C), and nowhere near.

    For rows that meet in one state of the forward path the minimum is v_old plus the mean of these moves: the
    improvement of DiffusionNFT, (2 / beta) E[r] (E[u | good] - v_old), where v_old is the mean of u.
    """
    beta, bound = 0.7, 0.8
    recipe = card.recipe(**known(card, {"beta": beta, "bound": bound, "steps": 4, "points": 3}))
    models = affine_flow(recipe)
    rows = drawn(models, recipe)
    _, x, target = _at_points(rows)
    then = _velocities(Matrices.of(models.policy.module), x, _places(points(rows)["time"], 4))
    good = torch.tensor(
        [
            0.5 + max(-bound, min(bound, z)) / (2 * bound)
            for z in standardised(seen(rows), lambda row: row.prompt, 1e-4)
        ],
        dtype=torch.float64,
    )
    best = then + (2 * good - 1)[:, None, None] * (target - then) / beta
    flat, size = _forward_slope(recipe, rows, best), _forward_slope(recipe, rows, then)
    worst = float(flat.norm() / size.norm())
    return max(worst, _meeting(recipe, rows, good, beta))


def _forward_slope(recipe: Recipe, rows: Trajectories, velocity: Tensor) -> Tensor:
    """The slope of the method's loss in the velocities (N, K, D) that it is given, at these."""
    leaf, counts = velocity.detach().clone().requires_grad_(), count(rows)
    objective = recipe.whole
    targets = objective.plan(Batch(rows, counts))
    loss = objective.loss(Batch(rows, counts, Scores(rows.log_prob, {"forward": leaf})), targets).value
    return torch.autograd.grad(loss, leaf)[0]


def _meeting(recipe: Recipe, rows: Trajectories, good: Tensor, beta: float) -> float:
    """The slope summed over the rows of a prompt that share one velocity, at the theorem's minimum."""
    one = rows.prompt == 0
    rows, good = rows[one], good[one]
    target = points(rows)["target"][:, :1].expand_as(points(rows)["target"])
    old = target.mean(0, keepdim=True).expand_as(target)
    changed = {"target": target, "old_forward": old, "reach": torch.ones_like(points(rows)["reach"])}
    rows = rows.replace(points=Columns({**points(rows), **changed}, len(rows)))
    liked = (good[:, None, None] * target).sum(0, keepdim=True) / good.sum()
    best = old + 2 / beta * good.mean() * (liked - old)
    slope, elsewhere = (_forward_slope(recipe, rows, at).sum(0).norm() for at in (best.expand_as(old), old))
    return float(slope / elsewhere)


WEIGHTS = {"uniform": 0, "time": 1, "data": 2}
"""The powers of t that forward losses weigh their errors by."""


@register
def weighted_matching(card: Provable) -> float:
    """At ratio one the gradient is the mean over rows and points of A w(t) grad |v - u|^2 / D, for every weight w."""
    worst, steps = 0.0, 5
    for weight, power in WEIGHTS.items():
        recipe = card.recipe(**known(card, {"weight": weight, "steps": steps, "points": 3}))
        models = affine_flow(recipe)
        rows = drawn(models, recipe)
        found, _ = loss_gradient(models, recipe, rows)
        numbers, answer = Matrices.of(models.policy.module), Slopes(Matrices.of(models.policy.module))
        time, x, target = _at_points(rows)
        place = _places(time, steps)
        error = _velocities(numbers, x, place) - target
        advantage = torch.tensor(standardised(seen(rows), lambda row: row.prompt, 1e-4), dtype=torch.float64)
        pull = 2 * advantage[:, None, None] * time[..., None] ** power * error / (time.numel() * error.shape[2])
        _add_points(answer, place, x, pull)
        worst = max(worst, deviation(found, answer.flat))
    return worst
