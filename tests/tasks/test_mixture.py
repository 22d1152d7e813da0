"""The mixture task: it starts at its mixture, its reward has gradients, and its measures and picture tell the truth."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ElementTree

import pytest
import torch
from torch import Tensor

from stepwell.credit.group import GroupCredit
from stepwell.credit.shaping import DivergencePenalty, Outcome
from stepwell.errors import InputError, UnknownName
from stepwell.meter import Meter
from stepwell.objective.policy import Policy
from stepwell.objective.reduction import Reduction
from stepwell.objective.surrogate import Score
from stepwell.process.base import Process
from stepwell.process.exact.distance import sampling_floor, sliced_wasserstein
from stepwell.recipe.recipe import Recipe
from stepwell.reward.differentiable import Judge
from stepwell.rng import Rng
from stepwell.sampling.request import Prompt, Request
from stepwell.sampling.rollout import rollout
from stepwell.solver.path import Linear
from stepwell.tasks.mixture import mixture
from stepwell.tasks.mixture.picture import SHOWN, _levels
from stepwell.tasks.mixture.problem import CorrectedVelocity, MixtureProblem, mixture_problem
from stepwell.tasks.mixture.task import SETTINGS, show
from stepwell.tasks.registry import get_task
from stepwell.training.loop import train
from stepwell.training.settings import Settings

PROBLEM = mixture_problem()


def points(process: Process, count: int, seed: int = 0) -> Tensor:
    return torch.stack(rollout(process, [Request(Prompt(0, 0), count)], Rng(seed)).samples.values)


def test_the_process_begins_as_the_mixture_itself():
    x, t = Rng(0).normal(64, 2), Rng(1).uniform(64)
    network = CorrectedVelocity(PROBLEM.start, Linear(), Rng(2))
    torch.testing.assert_close(network(x, t), PROBLEM.start.predict(x, t, Linear()), rtol=0, atol=0)
    network(x, t).square().sum().backward()
    assert float(network.correction[-1].weight.grad.abs().max()) > 0  # and can leave it


def test_samples_of_the_start_are_at_the_floor_of_its_law():
    count, repeats = 1000, 40
    floor, error = sampling_floor(PROBLEM.start, count, Rng(0), repeats=repeats)
    assert sliced_wasserstein(points(mixture().process(), count), PROBLEM.start) < floor + 4 * error * repeats**0.5


def test_every_process_starts_alike_and_only_the_correction_is_saved():
    first, second = mixture().process(), mixture().process()
    assert first is not second
    assert torch.equal(points(first, 8), points(second, 8))
    state = first.module.state_dict()
    assert all(name.startswith("correction.") for name in state)
    assert any(
        not torch.equal(state[name], other) for name, other in mixture(seed=1).process().module.state_dict().items()
    )


def test_the_reward_is_one_for_lists_and_batches_and_has_a_gradient():
    task, batch = mixture(), Rng(0).normal(5, 2).requires_grad_()
    value = PROBLEM.closeness(batch)
    assert torch.equal(value, PROBLEM.closeness(list(batch)))
    (gradient,) = torch.autograd.grad(value.sum(), batch)
    torch.testing.assert_close(gradient, torch.tensor([1.7, 0.7]) - batch.detach())
    judged = Judge(task.rewards, task.prompts, Meter())(batch, torch.arange(5))
    (again,) = torch.autograd.grad(judged.sum(), batch)
    torch.testing.assert_close(again, gradient)
    drawn = rollout(task.process(), [Request(task.prompts[0], 5)], Rng(0))
    scored = task.rewards(drawn, Meter())
    assert scored.total.tolist() == pytest.approx(PROBLEM.closeness(drawn.samples.values).tolist())
    assert scored.names == ("closeness",)


def test_no_prompt_is_held_out_and_trained_on():
    task = mixture(evaluation=10)
    assert len(task.evaluation) == 10
    assert not {prompt.value for prompt in task.prompts} & {prompt.value for prompt in task.evaluation}
    assert not {prompt.id for prompt in task.prompts} & {prompt.id for prompt in task.evaluation}


def test_the_description_states_the_optimum():
    said = mixture(beta=0.5).description
    best = mixture_problem(beta=0.5).optimum
    assert f"{best.reward:.3f}" in said
    assert f"{best.kl:.2f} nats" in said


def test_perfect_samples_measure_as_perfect_and_hacked_ones_as_far_off():
    """Points at the target have the highest reward of all, and are far from the optimum: the distance must say so."""
    count, repeats = 500, 40
    floor, error = sampling_floor(PROBLEM.optimum.distribution, count, Rng(1), repeats=repeats)
    best = PROBLEM.optimum.distribution.sample(count, Rng(2))
    hacked = torch.tensor([1.7, 0.7]).expand(count, 2)
    assert PROBLEM.floor(count) == pytest.approx(floor, abs=4 * 2**0.5 * error)
    assert PROBLEM.distance([], best) < floor + 4 * error * repeats**0.5 < PROBLEM.distance([], hacked)
    rewards = PROBLEM.closeness(best)
    assert float(rewards.mean()) == pytest.approx(PROBLEM.optimum.reward, abs=4 * float(rewards.std()) / count**0.5)
    assert float(PROBLEM.closeness(hacked).mean()) > PROBLEM.optimum.reward
    assert PROBLEM.departure([], PROBLEM.start.sample(count, Rng(3))) < 0.2 < PROBLEM.departure([], best)


def test_a_policy_gradient_with_the_kl_moves_samples_towards_the_optimum():
    task = mixture()
    process = task.process()
    before = points(process, 500)
    credit = GroupCredit("leave-one-out", reward=Outcome() + DivergencePenalty(PROBLEM.beta))
    recipe = Recipe(
        Policy(credit, surrogate=Score(), reduction=Reduction("row-sum")), sampler={"solver": "ddpm", "steps": 8}
    )
    train(process, recipe, task.prompts, task.rewards, Settings(steps=30, **SETTINGS))
    after = points(process, 500)
    assert PROBLEM.distance([], after) < 0.6 * PROBLEM.distance([], before)
    assert float(PROBLEM.closeness(after).mean()) > 0.5 * float(PROBLEM.closeness(before).mean())  # both are negative


def test_the_levels_of_a_gaussian_are_those_of_the_chi_square():
    """The densest share q of a Gaussian in the plane lies where the density is above (1 - q) times its peak."""
    ticks = torch.linspace(-6, 6, 401, dtype=torch.float64)
    density = torch.exp(-0.5 * (ticks[:, None] ** 2 + ticks**2)).numpy()
    assert _levels(density) == pytest.approx([0.1, 0.5], abs=2e-3)


def test_the_picture_has_a_stroke_for_each_sample_shown():
    """There is a panel for the start, for each method, and for perfect samples."""
    start = list(PROBLEM.start.sample(SHOWN + 50, Rng(0)))
    ends = {"grpo": list(PROBLEM.optimum.distribution.sample(200, Rng(1))), "a & b": start[:30]}
    figure = mixture().figure
    assert figure is not None
    drawn = figure(start, ends)
    root = ElementTree.fromstring(drawn)
    strokes = {}
    for path in root.iter("path"):
        style = path.attrib.get("style", "")
        if "stroke-linecap: round" in style and "opacity: 0.6" in style:
            strokes[style.split("var(")[1].split(")")[0]] = path.attrib["d"].count("M")
    assert strokes == {"--muted": SHOWN, "--series-0": 200, "--series-1": 30, "--ink": SHOWN}
    titles = [text.text or "" for text in root.iter("text")]
    expected = {"start": start, **ends}
    for label, points in expected.items():
        assert f"{label}  {PROBLEM.distance([], points):.3f}" in titles
    assert f"perfect samples  {PROBLEM.floor(len(start)):.3f}" in titles
    assert "#0" not in re.sub(r'(href="|url\(|id=")[^"]*', "", drawn)  # every colour is the page's to choose


def test_a_point_is_shown_as_coordinates():
    assert show(Prompt(0, 0), torch.tensor([1.234, -0.5])) == "(1.23, -0.50)"


def test_options_are_checked():
    assert get_task("mixture", modes=3).name == "mixture"
    for options in ({"modes": 0}, {"strength": -1.0}, {"beta": 0.0}, {"evaluation": 0}):
        with pytest.raises(InputError):
            get_task("mixture", **options)
    with pytest.raises(UnknownName, match="'modes'"):
        get_task("mixture", mode=3)


def test_the_optimum_has_most_of_its_weight_near_the_target():
    best: MixtureProblem = mixture_problem(beta=0.3)
    assert float(best.optimum.distribution.weights.max()) > 0.9
    assert math.dist(best.optimum.distribution.mean.tolist(), (1.7, 0.7)) < 0.5
