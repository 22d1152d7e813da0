"""The formulas of flow oracles agree with real noise and with moments; figures of the cards; rows of planners."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch

import stepwell
from stepwell import methods
from stepwell.batch import Batch
from stepwell.check.oracles.flow.bench import affine_flow, drawn, every_outcome, loss_gradient, planned
from stepwell.check.oracles.flow.gradients import _mean_ratios
from stepwell.check.oracles.flow.moments import Chain, expected_reward_gradient
from stepwell.check.oracles.flow.steps import Matrices, chain_by_hand, nearness, prompts, step_by_hand, uniform_times
from stepwell.check.replay import expectation
from stepwell.data.stream import PromptStream
from stepwell.planning.groups import Groups
from stepwell.process.exact.mixture import Mixture, chain_moments
from stepwell.process.models import Models
from stepwell.reward.mixing import Rewards
from stepwell.rng import Rng
from stepwell.solver.path import Linear
from stepwell.solver.table import table
from stepwell.training.collect import collect
from stepwell.training.update import accumulate
from stepwell.trajectories import count

# the hand-written formulas themselves


@pytest.mark.parametrize(("time", "target"), [(0.9, 0.6), (0.4, 0.25)])
def test_the_exact_step_is_the_limit_of_the_sdes_euler_steps(time, target):
    """With the data prediction held fixed."""
    level, x, v, small = 0.7, 0.8, -0.3, 40_000
    data = x - time * v
    mean, variance, dt = x, 0.0, (target - time) / small
    for k in range(small):
        t = time + k * dt
        squared = level**2 * t / (1 - t)
        slope, offset = 1 / t + squared / (2 * t**2), -(1 / t + squared * (1 - t) / (2 * t**2)) * data
        mean, variance = mean + (slope * mean + offset) * dt, variance * (1 + slope * dt) ** 2 - squared * dt
    step = step_by_hand("flow", level, time, target, 10)
    assert abs(step.state * x + step.velocity * v - mean) < 1e-4  # order one in 1 / small
    assert abs(step.noise**2 - variance) < 1e-4


@pytest.mark.parametrize(
    ("solver", "kind", "level"),
    [
        ("sde-flow", "flow", 0.7),
        ("sde-euler-published", "flow-published", 0.7),
        ("sde-dance", "dance", 0.3),
        ("ddpm", "ddpm", 1.0),
    ],
)
def test_the_moments_by_hand_are_those_of_the_mixture(solver, kind, level):
    data = Mixture(torch.ones(1), torch.tensor([[0.7]]), torch.tensor([[[0.3]]]))
    times = uniform_times(6)
    means, covariances = chain_moments(data, Linear(), table(solver), times)
    mean, variance = 0.0, 1.0
    for step in chain_by_hand([kind] * 6, level, times, 6):
        zero, one = (float(data.predict(torch.full((1, 1), x).double(), step.time, Linear())) for x in (0.0, 1.0))
        gain = step.state + step.velocity * (one - zero)
        mean, variance = gain * mean + step.velocity * zero, gain**2 * variance + step.noise**2
    assert abs(mean - float(means[-1, 0])) < 1e-12
    assert abs(variance - float(covariances[-1, 0, 0])) < 1e-12


# the expectation over signs is the expectation


def unscaled(name, size, **options):
    recipe = planned(methods.get(name).recipe(**options), size=size)
    own = recipe.whole.terms[0].credit_of.part
    return recipe.replace(credit_of=dataclasses.replace(own, scale="none"))


def test_all_signs_give_the_expectation_over_gauss_hermite_nodes():
    recipe = planned(unscaled("flow-grpo", 2, steps=3), prompts=1)
    models = affine_flow(recipe, dimension=1)

    def program(rng):
        stream = PromptStream(prompts(1), rng.split("prompts"), shuffle=False)
        rows = collect(models.policy, recipe.planner, stream, Rewards(nearness), rng, 0).drawn.trajectories
        return loss_gradient(models, recipe, rows.replace(old_log_prob=rows.log_prob), 1)[0]

    rows = every_outcome(models, recipe)
    assert len(rows) == 2 * 2**6  # two rows, each of a start and two random steps
    found, _ = loss_gradient(models, recipe, rows, names=2**6)
    assert torch.allclose(found, expectation(program, normal_nodes=2), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "options", "chains"),
    [
        (
            "mix-grpo",
            {"window": 2},
            [Chain(("flow", "flow", "ode", "ode"), tuple(uniform_times(4)), {0: 0.25, 1: 0.25})],
        ),
        (
            "tempflow-grpo",
            {"children": 2},
            [
                Chain(tuple("flow" if at == k else "ode" for at in range(4)), tuple(uniform_times(4)), {k: 0.5 / 3})
                for k in range(3)
            ],
        ),
    ],
)
@pytest.mark.slow
def test_real_noise_gives_the_gradient_of_the_moment_recursion(name, options, chains):
    """Within four standard errors."""
    recipe = unscaled(name, 2, steps=4, **options).replace(gates=())
    models = affine_flow(recipe, dimension=1)
    batches = [
        loss_gradient(models, recipe, drawn(models, recipe, seed=seed, count=300), names=300)[0] for seed in range(24)
    ]
    found = -torch.stack(batches)
    error = found.std(0) / math.sqrt(len(batches))
    exact = sum(expected_reward_gradient(chain, 0.7, Matrices.of(models.policy.module)) for chain in chains)
    assert bool((exact.abs() > 0).any())
    assert bool(((found.mean(0) - exact).abs() <= 4 * error + 1e-12).all())


# figures that the cards' notes give


def published(name):
    note = methods.get(name).note
    assert note
    return note


def test_the_mean_ratio_is_0779_at_k_1_in_two_dimensions():
    assert "0.779" in published("flow-grpo")
    card = methods.get("flow-grpo")
    ratio, squares, noise = _mean_ratios(card, {"variant": "published"})
    divergence = squares / (2 * noise**2)
    at_one = ratio ** (1 / divergence)  # E[r] is exponential in K
    assert torch.allclose(at_one, torch.full_like(at_one, 0.7788), atol=5e-5)
    assert bool((ratio < 1).all())


@pytest.mark.parametrize(("level", "variance"), [(0.7, 1.0600), (1.0, 1.25)])
def test_the_published_first_step_leaves_too_large_a_variance(level, variance):
    """It is 1 + level^4 / 4."""
    assert "1.060 at level 0.7" in published("mix-grpo")
    recipe = methods.get("flow-grpo").recipe(variant="published", level=level)
    times = [1.0, 1.0 - 1e-7, 0.0]
    models = affine_flow(recipe, dimension=1)
    exact = methods.get("flow-grpo").recipe(level=level).sampler
    for sampler, expected in ((recipe.sampler, variance), (exact, 1.0)):
        policy = models.policy.with_sampler(times=times, solver=sampler["solver"], level=sampler["level"])
        rows = every_outcome(Models(policy, models.reference), recipe.replace(planner=Groups(size=1)))
        assert abs(float(rows.action[:, 1].square().mean()) - expected) < 1e-4


def test_published_windows_are_short_75_and_empty_25_times_in_650():
    assert "75 of 650 rollouts train one to three steps and 25 train none" in published("mix-grpo")
    for variant, short, none in (("published", 75, 25), ("corrected", 0, 0)):
        windows = methods.get("mix-grpo").recipe(variant=variant, steps=26).planner
        stream = PromptStream(prompts(1), Rng(0), shuffle=False)
        plans = [windows.plan(rollout, None, stream)[0] for rollout in range(650)]
        widths = [end - begin for begin, end in (plan.window for plan in plans)]
        assert (sum(0 < width < 4 for width in widths), widths.count(0)) == (short, none)


def test_the_published_penalty_is_a_twentieth():
    """For ten steps in two dimensions."""
    assert "0.05" in published("flow-grpo")
    gradients = []
    for variant in ("published", "corrected"):
        recipe = methods.get("flow-grpo").recipe(variant=variant, kl=0.3)
        recipe = recipe.replace(objective=recipe.whole.terms[1], sampler=methods.get("flow-grpo").recipe().sampler)
        models = affine_flow(recipe)
        gradients.append(loss_gradient(models, recipe, drawn(models, recipe))[0])
    assert torch.allclose(gradients[0], 0.05 * gradients[1], rtol=1e-12)


# what the oracles found out about planners


@pytest.mark.parametrize(("steps", "flash", "made"), [(10, 0.4, 2), (5, 0.6, 2), (6, 0.4, 2), (6, 0.1, 1)])
def test_a_tail_replaces_all_steps_that_are_left_the_last_one_too(steps, flash, made):
    """MixGRPO-Flash makes max(1, int(ratio n)) of the n steps after the window."""
    recipe = methods.get("mix-grpo").recipe(steps=steps, window=1, flash=flash)
    left = steps - 1
    (request,) = recipe.planner.plan(0, None, PromptStream(prompts(1), Rng(0)))[:1]
    assert request.sampler["tail"][2] == max(1, int(flash * left))


@pytest.mark.parametrize("name", ["mix-grpo", "spo"])
def test_rows_without_a_trained_step_have_a_gradient_of_zero(name):
    """As in every rollout whose published window is empty; a loss of pairs goes through its scores here."""
    recipe = methods.get(name).recipe(steps=4, **({"window": 2} if name == "mix-grpo" else {}))
    models = affine_flow(recipe)
    rows = drawn(models, recipe)
    rows = rows.replace(mask=torch.zeros_like(rows.mask))
    objective, counts = recipe.whole, count(rows)
    targets = objective.plan(Batch(rows, counts))
    for tokens in (None, 1):
        accumulate(models, objective, Batch(rows, counts), targets, tokens)
    parameters = list(models.policy.module.parameters())
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in parameters)


def test_a_run_goes_through_the_published_empty_window():
    recipe = methods.get("mix-grpo").recipe(steps=4, window=2, hold=1, variant="published")
    settings = {"prompts_per_step": 2, "group_size": 2, "learning_rate": 1e-3}
    run = stepwell.train(affine_flow(recipe).policy, [0, 1], nearness, recipe, steps=5, **settings)
    norms = [row["gradient_norm"] for row in run.history]
    assert norms[3] == 0.0
    assert all(norm > 0 for place, norm in enumerate(norms) if place != 3)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_all_candidates_of_a_step_start_from_one_state(size):
    recipe = planned(methods.get("spo").recipe(steps=5, candidates=size), size=size)
    rows = drawn(affine_flow(recipe), recipe)
    assert len(rows) == 3 * 4 * size
    for prompt, step in itertools.product(range(3), range(1, 5)):
        here = rows[(rows.prompt == prompt) & (rows.length == step + 1)]
        assert len(here) == size
        assert bool((here.action[:, :step] == here.action[:1, :step]).all())
        assert len(here.action[:, step].unique(dim=0)) == size


def test_the_best_candidate_goes_on():
    recipe = methods.get("spo").recipe(steps=5, go_on="best")
    rows = drawn(affine_flow(recipe), recipe)
    for prompt, step in itertools.product(range(3), range(1, 4)):
        here = rows[(rows.prompt == prompt) & (rows.length == step + 1)]
        after = rows[(rows.prompt == prompt) & (rows.length == step + 2)]
        assert torch.equal(after.action[0, step], here.action[here.reward.argmax(), step])
