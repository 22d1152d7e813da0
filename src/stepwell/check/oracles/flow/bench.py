"""The bench of flow oracles: rows that a method's own planner draws, and the gradient of its loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from stepwell.batch import Batch, Read
from stepwell.check.oracles.flow.steps import Affine, Matrices, nearness, prompts
from stepwell.columns import Columns
from stepwell.data.stream import PromptStream
from stepwell.distributions import Gaussian, Point
from stepwell.errors import LawBroken
from stepwell.meter import Meter
from stepwell.process.flow.build import flow
from stepwell.process.flow.process import Flow
from stepwell.process.flow.state import FlowState
from stepwell.process.models import Models
from stepwell.recipe.recipe import Recipe
from stepwell.reward.differentiable import Judge
from stepwell.reward.mixing import Rewards
from stepwell.rng import Rng
from stepwell.training.collect import collect
from stepwell.training.scoring import fill
from stepwell.training.update import accumulate
from stepwell.trajectories import Trajectories, count


def affine_flow(recipe: Recipe, dimension: int = 2, seed: int = 0) -> Models:
    """A flow of an affine velocity under the method's sampler, and a reference a little way off."""
    network = Affine(recipe.sampler["steps"], dimension, seed)
    process = flow(network, (dimension,), encode="label").with_sampler(**recipe.sampler)
    reference = process.frozen()
    reference.module.move(0.1, seed + 1)  # type: ignore[operator]
    return Models(process, reference)


def planned(recipe: Recipe, **settings: Any) -> Recipe:
    """The recipe with those settings of its planner that the planner has."""
    mine = {name: value for name, value in settings.items() if hasattr(recipe.planner, name)}
    return recipe.replace(planner=replace(recipe.planner, **mine))  # type: ignore[type-var]


def drawn(models: Models, recipe: Recipe, rollout: int = 0, seed: int = 5, count: int = 3) -> Trajectories:
    """Rows as a training step draws them, for `count` prompts, with everything that the method reads filled in."""
    recipe = planned(recipe, prompts=count)
    stream = PromptStream(prompts(count), Rng(seed).split("prompts"), shuffle=False)
    rows = collect(models.policy, recipe.planner, stream, Rewards(nearness), Rng(seed), rollout).drawn.trajectories
    return filled(models, recipe, rows, seed)


def filled(models: Models, recipe: Recipe, rows: Trajectories, seed: int = 5) -> Trajectories:
    """The rows with the points that the method draws and the fields that it reads, under the present parameters."""
    rows = recipe.whole.draw(rows, models, Rng(seed).split("points"))
    return fill(models, rows, {Read("policy", "log_prob"), *recipe.whole.reads}, tokens=None)


def loss_gradient(models: Models, recipe: Recipe, rows: Trajectories, names: int = 3) -> tuple[Tensor, float]:
    """The gradient of the method's loss on all rows at once, flat, and the number that it logs first."""
    objective, counts = recipe.whole, count(rows, models.policy.horizon)
    states = {name: state.initial for name, state in objective.states.items()}
    with torch.no_grad():
        scores = models.score(rows, sorted(objective.needs - {"log_prob", "sample", "denoised"}))
    targets = objective.plan(Batch(rows, counts, scores, states), objective.credit(Batch(rows, counts, None, states)))
    parameters = list(models.policy.module.parameters())
    for parameter in parameters:
        parameter.grad = None
    judge = Judge(Rewards(nearness), prompts(names), Meter())
    metrics = accumulate(models, objective, Batch(rows, counts, None, states, judge), targets)
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    return torch.cat([part.reshape(-1) for part in parts]), next(iter(metrics.values()))


def points(rows: Trajectories) -> Columns:
    """The points that a term drew for the rows."""
    assert rows.points is not None, "the method draws no points"
    return rows.points


def rewards(rows: Trajectories) -> Tensor:
    """(N,) the rows' rewards."""
    assert rows.reward is not None, "the rows were not judged"
    return rows.reward


def both(models: Models) -> tuple[Matrices, Matrices]:
    """The parameters of a policy and of its reference."""
    return Matrices.of(models.policy.module), Matrices.of(models.of("reference").module)


class Signs(Flow):
    """A flow whose normal draws are +1 or -1: prompt number i is the outcome that the bits of i spell.

    The two are the Gauss-Hermite nodes of order two, of equal weight: over all 2^k numbers of k draws the plain mean
    of a polynomial whose degree in each draw is three at most is its expectation under normal noise. A reward that is
    quadratic in the last state of an affine chain, times a score, is such a polynomial. `used` counts each prompt's
    draws, over all twins of the flow.
    """

    used: dict[int, int]

    def propose(self, state: FlowState) -> Gaussian | Point:
        return self._signed(super().propose(state), state)

    def deterministic(self, state: FlowState) -> Gaussian | Point:
        return self._signed(super().deterministic(state), state)

    def _signed(self, step: Gaussian | Point, state: FlowState) -> Gaussian | Point:
        if isinstance(step, Point):
            return step
        assert state.condition is not None
        return _Signed(step.mean, step.standard_deviation, step.trained, state.condition["label"].tolist(), self.used)


class _Signed(Gaussian):
    """A Gaussian that knows which outcome each of its rows belongs to."""

    def __init__(self, mean: Tensor, deviation: Tensor, trained: bool, outcome: Sequence[int], used: dict[int, int]):
        super().__init__(mean, deviation, trained)
        object.__setattr__(self, "outcome", outcome)
        object.__setattr__(self, "used", used)

    def sample(self, rng: Rng) -> Tensor:
        outcome, used = self.__dict__["outcome"], self.__dict__["used"]
        signs = torch.empty_like(self.mean).reshape(len(outcome), -1)
        for row, number in enumerate(outcome):
            for entry in range(signs.shape[1]):
                bit = used.get(number, 0)
                signs[row, entry] = 1.0 - 2.0 * (number >> bit & 1)
                used[number] = bit + 1
        return self.mean + self.standard_deviation * signs.reshape(self.mean.shape)


LARGEST = 10
"""The most normals that a rollout may draw for all of its outcomes to be drawn."""


def every_outcome(models: Models, recipe: Recipe, rollout: int = 0) -> Trajectories:
    """The rows of every outcome of a rollout for one prompt, each outcome a prompt: means over them are expectations.

    Raises `LawBroken` where outcomes draw different numbers of normals, or more than `LARGEST`.
    """
    signs = Signs.__new__(Signs)
    signs.__dict__ |= models.policy.__dict__
    signs.used = {}
    models = replace(models, policy=signs)
    drawn(models, recipe, rollout, count=1)
    draws = signs.used.pop(0)
    if draws > LARGEST:
        raise LawBroken(f"A rollout draws {draws} normals; at most {LARGEST} can be gone through.")
    rows = drawn(models, recipe, rollout, count=2**draws)
    if set(signs.used.values()) != {draws}:
        raise LawBroken(f"Outcomes of one rollout draw from {min(signs.used.values())} to {draws} normals or more.")
    return rows
