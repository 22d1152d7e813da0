"""The oracle of guided rollouts: every guided step, the rows' weights and the update, written out by hand."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from stepwell.batch import Batch
from stepwell.check.oracles.flow.steps import near
from stepwell.check.oracles.provable import Provable, variants
from stepwell.check.oracles.registry import register
from stepwell.data.stream import PromptStream
from stepwell.process.flow.build import flow
from stepwell.process.models import Models
from stepwell.recipe.recipe import Recipe
from stepwell.reward.mixing import Rewards
from stepwell.rng import Rng
from stepwell.sampling.request import Prompt
from stepwell.training.collect import collect
from stepwell.training.settings import Settings, with_settings
from stepwell.training.update import accumulate
from stepwell.trajectories import Trajectories, count

LEVEL, STEPS, BETA, SCALE = 0.4, 5, 1.5, 0.07
WANTED = (1.0, -0.5)


class Straight(nn.Module):
    """v(x, t) = M x + s, the same at all times."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(0.6 * Rng(21).normal(2, 2, dtype=torch.float64))
        self.shift = nn.Parameter(Rng(22).normal(2, dtype=torch.float64))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return x @ self.slope.T + self.shift


@register
def guided_step(card: Provable) -> float:
    """Rows are drawn, weighed and learned from by dance's step with the mean moved by c grad r(x - t v(x)).

    grad r(x - t v) = -2 (I - t M)^T (x - t v - wanted) for v = M x + s. The stored log-densities are those of the
    guided steps, a row's log-weight is the sum of the plain ones less these, and the loss is the clipped objective
    with the ratio of the policy's own steps to the guided ones.
    """
    worst = 0.0
    for options in variants(card):
        recipe = card.recipe(**options, level=LEVEL, steps=STEPS, beta=BETA, scale=SCALE, clip=0.05)
        assert recipe.guide is not None
        published = recipe.guide.normalise
        network = Straight()
        policy = flow(network, (2,)).with_sampler(**recipe.sampler)
        stream = PromptStream([Prompt(number, None) for number in range(2)], Rng(3), shuffle=False)
        planner = with_settings(recipe, Settings(prompts_per_step=2, group_size=4)).planner
        drawn = collect(policy, planner, stream, Rewards(near(*WANTED)), Rng(5), 0, guide=recipe.guide).drawn
        rows = drawn.trajectories
        plain, guided = _log_densities(network, rows, published)
        worst = max(worst, float((rows.log_prob[:, 1:STEPS] - guided).abs().max()))
        worst = max(worst, float((rows.weight - (plain.detach() - guided).sum(1)).abs().max()))
        worst = max(worst, _update(recipe, network, Models(policy), rows, plain, guided, published))
    return worst


def _log_densities(network: Straight, rows: Trajectories, published: bool) -> tuple[Tensor, Tensor]:
    """Log-densities (N, n - 1) of the random steps: the policy's, differentiable, and the guided ones."""
    plain: list[Tensor] = []
    guided: list[Tensor] = []
    wanted = torch.tensor(WANTED, dtype=torch.float64)
    for step in range(STEPS - 1):
        time, dt = 1.0 - step / STEPS, 1.0 / STEPS
        x, following = rows.action[:, step], rows.action[:, step + 1]
        velocity = network(x, x.new_full((len(x),), time))
        noise = x + (1.0 - time) * velocity
        mean = x - dt * velocity - 0.5 * LEVEL**2 / time * noise * dt
        deviation = LEVEL * math.sqrt(dt)
        with torch.no_grad():
            slope = torch.eye(2, dtype=torch.float64) - time * network.slope
            gradient = -2.0 * (x - time * velocity - wanted) @ slope
            if published:
                push = SCALE * gradient / (gradient.norm() + 1e-8)
            else:
                push = LEVEL**2 * dt / (2.0 * BETA) * gradient
        for mean_, column in ((mean, plain), (mean.detach() + push, guided)):
            squares = (following - mean_).square().sum(1)
            column.append(-0.5 * squares / deviation**2 - math.log(2.0 * math.pi * deviation**2))
    return torch.stack(plain, 1), torch.stack(guided, 1)


def _update(
    recipe: Recipe,
    network: Straight,
    models: Models,
    rows: Trajectories,
    plain: Tensor,
    guided: Tensor,
    published: bool,
) -> float:
    """The deviation of the loss's gradient from that of the clipped objective, relative to it."""
    assert rows.reward is not None
    advantage = torch.empty_like(rows.reward)
    for prompt in rows.prompt.unique():
        here = rows.prompt == prompt
        reward = rows.reward[here]
        advantage[here] = ((reward - reward.mean()) / (reward.std() + 1e-4)).clamp(-5.0, 5.0)
    ratio = ((plain - guided) / (2 if published else 1)).exp()
    clipped = ratio.clamp(0.95, 1.05)
    loss = -torch.minimum(ratio * advantage[:, None], clipped * advantage[:, None]).mean()
    parameters = list(network.parameters())
    exact = torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, parameters)])
    objective, counts = recipe.whole, count(rows)
    targets = objective.plan(Batch(rows, counts), objective.credit(Batch(rows, counts)))
    accumulate(models, objective, Batch(rows, counts), targets)
    found = torch.cat([parameter.grad.flatten() for parameter in parameters])  # type: ignore[union-attr]
    return float((found - exact).norm() / exact.norm())
