"""Oracles of flow methods that differentiate the reward: the terms of a chain by hand, and differences of the whole."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor

from stepwell.check.oracles.flow.bench import affine_flow, drawn, loss_gradient, planned, points
from stepwell.check.oracles.flow.steps import TARGET, ChainStep, Matrices, Slopes, chain_by_hand, uniform_times
from stepwell.check.oracles.provable import Provable, deviation, known
from stepwell.check.oracles.registry import register
from stepwell.rng import Rng
from stepwell.trajectories import Trajectories


def _reward_slope(x: Tensor) -> Tensor:
    """dr / dx of r = -|x - c|^2."""
    return -2 * (x - TARGET)


#


@register
def truncated_sum(card: Provable) -> float:
    """Backpropagation through the last K steps is the sum of those steps' own terms, r'(x_n) G_k dmu_k / dtheta.

    G_k is the derivative of the last state in that of step k, through all later steps. For samplers with and without
    noise, every depth, and all steps against the differences of the reward of the whole chain at theta +- 1/2, which
    are exact as the reward is quadratic in each parameter. A random depth is each of its values equally often.
    """
    worst, steps = 0.0, 4
    cases: list[dict[str, Any]] = [{"depth": 1}, {"depth": 3}, {"depth": 0}] if "depth" in card.options else [{}]
    for options, solver in itertools.product(cases, ("ddim", "ddpm")):
        recipe = planned(card.recipe(**options, steps=steps, solver=solver), size=4)
        models = affine_flow(recipe)
        numbers, kind = Matrices.of(models.policy.module), "ode" if solver == "ddim" else "ddpm"
        chain = chain_by_hand([kind] * steps, 1.0, uniform_times(steps), steps)
        rows = drawn(models, recipe)
        depth = points(rows)["depth"].tolist()
        if options:
            worst = max(worst, float(any(found != (options["depth"] or steps) for found in depth)))
        found, _ = loss_gradient(models, recipe, rows)
        worst = max(worst, deviation(found, _terms(chain, numbers, rows, depth)))
        if all(number == steps for number in depth):
            worst = max(worst, deviation(found, _differences(chain, numbers, rows)))
    return max(worst, _depths(card)) if "least" in card.options else worst


@register
def adjoint_gradient(card: Provable) -> float:
    """Along states that older parameters drew, the gradient is r'(x_n) G_k dmu_k / dtheta at the present ones.

    The rows of a queue were each drawn by several versions of the parameters; here they move once, after the rows.
    """
    worst, steps = 0.0, 4
    for solver in ("ddim", "ddpm"):
        recipe = planned(card.recipe(steps=steps, solver=solver), size=4)
        models = affine_flow(recipe)
        rows = drawn(models, recipe)
        for place, parameter in enumerate(models.policy.module.parameters()):
            parameter.data.add_(0.1 * Rng(3).split(place).normal(*parameter.shape, dtype=torch.float64))
        numbers, kind = Matrices.of(models.policy.module), "ode" if solver == "ddim" else "ddpm"
        chain = chain_by_hand([kind] * steps, 1.0, uniform_times(steps), steps)
        found, _ = loss_gradient(models, recipe, rows)
        worst = max(worst, deviation(found, _terms(chain, numbers, rows, [steps] * len(rows))))
    return worst


def _terms(chain: list[ChainStep], numbers: Matrices, rows: Trajectories, depth: list[int]) -> Tensor:
    answer = Slopes(numbers)
    for row, reach in enumerate(depth):
        pull = -_reward_slope(rows.action[row, -1:]) / len(rows)
        for step in reversed(chain[len(chain) - reach :]):
            answer.add(step.place, rows.action[row, step.place : step.place + 1], step.velocity * pull)
            pull = step.state * pull + step.velocity * pull @ numbers.slope[step.place]
    return answer.flat


def _differences(chain: list[ChainStep], numbers: Matrices, rows: Trajectories) -> Tensor:
    noise = {
        step.place: (rows.action[:, k] - numbers.mean(step, rows.action[:, k - 1])) for k, step in enumerate(chain, 1)
    }

    def loss(at: Matrices) -> float:
        x = rows.action[:, 0]
        for step in chain:
            x = at.mean(step, x) + noise[step.place]
        return float((x - TARGET).square().sum(1).mean())

    answer = Slopes(numbers)
    for into, values in ((answer.slope, numbers.slope), (answer.shift, numbers.shift)):
        flat, slopes = values.view(-1), into.view(-1)
        for entry, value in enumerate(flat.tolist()):
            ends = []
            for move in (0.5, -0.5):
                flat[entry] = value + move
                ends.append(loss(numbers))
            flat[entry], slopes[entry] = value, ends[0] - ends[1]
    return answer.flat


class _Even(Rng):
    """Uniforms that are evenly spread instead of random, and normals that are 1 and -1 in turn."""

    def uniform(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return ((torch.arange(math.prod(shape), dtype=dtype) + 0.5) / math.prod(shape)).reshape(shape)

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        order = torch.arange(math.prod(shape)).reshape(*shape[:2], -1)
        point = order // order.shape[2] % shape[1]
        return torch.where(point % 2 == 0, 1.0, -1.0).to(dtype or torch.float64).reshape(shape)

    def split(self, *name: object) -> _Even:
        return self


def _depths(card: Provable) -> float:
    recipe = planned(card.recipe(least=2, steps=5), size=4)
    rows = drawn(affine_flow(recipe), recipe)  # twelve rows
    depth = points(recipe.whole.draw(rows, affine_flow(recipe), _Even(0)))["depth"]
    return float(sorted(depth.tolist()) != sorted([2, 3, 4, 5] * 3))


@register
def renoised_gradient(card: Provable) -> float:
    """The gradient is that of E[r(x_t - t v(x_t, t))], x_t = (1 - t) x_0 + t e, at the last time t of the grid.

    With noises 1 and -1 the mean of two is the expectation, which has a closed form: for x_t of mean m and of
    variance t^2, and x_0hat = (I - t A) x_t - t b, E[r'(x_0hat) x_t'] = -2 [(I - t A) (m m' + t^2 I) - (t b + c) m'].
    """
    recipe = planned(card.recipe(**known(card, {"noises": 2, "steps": 4})), size=4)
    models = affine_flow(recipe, dimension=1)
    rows = recipe.whole.draw(drawn(models, recipe), models, _Even(0))
    found, _ = loss_gradient(models, recipe, rows)
    numbers, t = Matrices.of(models.policy.module), 0.25
    answer, factor = Slopes(numbers), 1 - t * float(numbers.slope[3])
    mean = (1 - t) * rows.action[:, -1]
    pull = -2 * t * (factor * mean - t * float(numbers.shift[3]) - TARGET) / len(rows)
    answer.shift[3] = pull.sum()
    answer.slope[3] = (pull * mean).sum() - 2 * t**3 * factor
    return deviation(found, answer.flat)
