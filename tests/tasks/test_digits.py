"""Labels are as noisy as they say, judges can read, gradients pass the reward, and measures see what it does not."""

import functools
import math
import time

import numpy as np
import pytest
import torch

from stepwell.check.tolerance import rounding
from stepwell.credit.group import GroupCredit
from stepwell.errors import InputError
from stepwell.meter import Meter
from stepwell.objective.policy import Policy
from stepwell.objective.reduction import Reduction
from stepwell.recipe.recipe import Recipe
from stepwell.reward.differentiable import Judge
from stepwell.rng import Rng
from stepwell.sampling.request import Prompt, Request
from stepwell.sampling.rollout import rollout
from stepwell.tasks.digits import digits_task
from stepwell.tasks.digits import models as digits_model
from stepwell.tasks.digits.measures import MEASURES, accuracy, distance, diversity, nearest, recognised
from stepwell.tasks.digits.models import (
    PARTS,
    VelocityNetwork,
    decoded,
    digits,
    encoded,
    judge,
    most_alike,
    noisy,
    read,
    taught,
)
from stepwell.tasks.digits.teaching import CLASSES, NO_LABEL, SHAPE, Teaching
from stepwell.tasks.registry import get_task
from stepwell.training.loop import evaluate, train
from stepwell.training.settings import Settings

SHORT = Teaching(steps=3, batch=16)


@pytest.fixture(autouse=True, scope="module")
def _own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STEPWELL_CACHE", str(tmp_path_factory.mktemp("cache")))
        judge.cache_clear()
        yield
    judge.cache_clear()


def asked(classes):
    return [Prompt(row, int(digit)) for row, digit in enumerate(classes)]


def real(part="flow"):
    """Real digits as samples: prompts that ask for what they are, and the images."""
    images, classes = digits(part)
    return asked(classes), list(images)


@functools.cache
def four_errors(measure, groups=10):
    """Four standard errors of a measure of real digits: a jackknife over groups, and as much for the held-out ones."""
    prompts, samples = real()
    place = Rng(5).permutation(len(samples)) % groups
    values = []
    for group in range(groups):
        kept = (place != group).nonzero()[:, 0].tolist()
        values.append(measure([prompts[row] for row in kept], [samples[row] for row in kept]))
    own = (groups - 1) * np.var(values)
    return 4 * math.sqrt(own * (1 + len(samples) / PARTS["held out"]))


# data


def test_the_parts_are_all_digits_and_share_none():
    parts = {part: digits(part) for part in PARTS}
    whole = torch.cat([images for images, _ in parts.values()]).flatten(1)
    every = digits_model._digits()[0].flatten(1)
    whole, every = (rows.numpy()[np.lexsort(rows.numpy().T)] for rows in (whole, every))
    assert (whole == every).all()
    assert [len(classes) for _, classes in parts.values()] == list(PARTS.values())
    for images, classes in parts.values():
        assert (float(images.min()), float(images.max())) == (0.0, 1.0)
        assert set(classes.tolist()) == set(range(CLASSES))
        assert torch.equal(decoded(encoded(images)), images)
    assert torch.equal(decoded(torch.tensor([-1.5, 1.5])), torch.tensor([0.0, 1.0]))


@pytest.mark.parametrize("noise", [0.0, 0.3, 0.5, 1.0])
def test_labels_are_replaced_as_often_as_said_and_stay_balanced(noise):
    count = 40_000
    labels = torch.arange(count) % CLASSES
    found = noisy(labels, noise, Rng(1))
    right = 1 - 0.9 * noise
    error = 4 * math.sqrt(right * (1 - right) / count)
    share = float((found == labels).float().mean())
    assert abs(share - right) <= error
    if noise:
        assert abs(share - (1 - noise)) > error  # the mistake: replaced by one of the nine others
    shares = found.bincount(minlength=CLASSES) / count
    assert float((shares - 0.1).abs().max()) <= 4 * math.sqrt(0.09 / count)


def test_wrong_labels_are_spread_over_all_other_digits():
    found = noisy(torch.full((40_000,), 7), 0.5, Rng(2))
    shares = found.bincount(minlength=CLASSES)[[d for d in range(CLASSES) if d != 7]] / 40_000
    assert float((shares - 0.05).abs().max()) <= 4 * math.sqrt(0.05 * 0.95 / 40_000)


# the judges


def test_both_judges_read_digits_they_never_saw():
    images, classes = digits("held out")
    probability = read(images)
    assert torch.allclose(probability.sum(1), torch.ones(len(images)))
    assert float((probability.argmax(1) == classes).float().mean()) >= 0.96
    assert float(probability[torch.arange(len(classes)), classes].mean()) >= 0.95
    assert float((most_alike(images) == classes).float().mean()) >= 0.96
    assert not any(parameter.requires_grad for parameter in judge().parameters())


def test_judges_know_different_digits_by_heart():
    shares = {}
    for part in ("flow", "judge"):
        images, classes = digits(part)
        shares[part] = [
            float((seen == classes).float().mean()) for seen in (read(images).argmax(1), most_alike(images))
        ]
    assert shares["flow"][0] > shares["judge"][0]
    assert shares["judge"][1] == 1.0 > shares["flow"][1]


def test_the_reward_is_the_probability_of_what_was_asked():
    prompts, samples = real()
    values = [prompt.value for prompt in prompts]
    from_list, from_batch = recognised(values, samples), recognised(values, torch.stack(samples))
    assert torch.equal(from_list, from_batch)
    whole = sum(recognised([(value + shift) % CLASSES for value in values], samples) for shift in range(CLASSES))
    assert torch.allclose(whole, torch.ones(len(values)), atol=rounding(torch.float32, CLASSES))
    assert float(from_list.mean()) > 0.9 > 0.1 > float(recognised([(v + 1) % CLASSES for v in values], samples).mean())


def test_gradients_pass_the_reward_and_stay_within_their_row():
    task = digits_task()
    judging = Judge(task.rewards, task.prompts, Meter())
    images = digits("held out")[0][:4].clone().requires_grad_(True)
    reward = judging(images, torch.tensor([3, 1, 4, 1]))
    (gradient,) = torch.autograd.grad(reward[2], images)
    assert float(gradient[2].abs().max()) > 0
    assert not gradient[[0, 1, 3]].any()
    step = 1e-2 * gradient / gradient.norm()  # a central difference along the gradient has to find its norm
    with torch.no_grad():
        ahead, behind = (judging_value(task, images + sign * step)[2] for sign in (1, -1))
        half = [judging_value(task, images + sign * 0.5 * step)[2] for sign in (1, -1)]
    coarse, fine = float(ahead - behind) / 2e-2, float(half[0] - half[1]) / 1e-2
    richardson = fine + (fine - coarse) / 3
    rounding = 4 * 2**-24 / 1e-2
    assert abs(float(gradient.norm()) - richardson) <= abs(fine - coarse) + rounding


def judging_value(task, images):
    (reward,) = task.rewards.functions
    return reward([3, 1, 4, 1], images)


# the measures


@pytest.mark.parametrize(("measure", "value"), [(diversity, 1.0), (distance, 0.0), (nearest, 1.0)])
def test_real_digits_score_as_real_digits(measure, value):
    prompts, samples = real()
    assert abs(measure(prompts, samples) - value) <= four_errors(measure)


def test_copies_have_no_diversity_and_are_far_from_real_digits_as_a_whole():
    images, classes = digits("flow")
    first = {digit: images[classes == digit][0] for digit in range(CLASSES)}
    prompts = asked(range(CLASSES)) * 20
    copies = [first[prompt.value] for prompt in prompts]
    assert diversity(prompts, copies) == 0.0
    assert distance(prompts, copies) > four_errors(distance)


def test_diversity_and_distance_are_their_definitions():
    prompts, samples = real("judge")
    chosen = [row for row, prompt in enumerate(prompts) if prompt.value in (2, 5)][:12]
    prompts, samples = [prompts[row] for row in chosen], [samples[row] for row in chosen]
    shown, classes = (part.numpy().reshape(len(part), -1) for part in digits("held out"))

    def spread(rows):
        return np.mean([np.linalg.norm(a - b) for i, a in enumerate(rows) for j, b in enumerate(rows) if i != j])

    rows = [image.numpy().ravel() for image in samples]
    within = {d: [row for row, prompt in zip(rows, prompts, strict=True) if prompt.value == d] for d in (2, 5)}
    spreads = [(spread(within[d]), spread(shown[classes[:, 0] == d])) for d in (2, 5)]
    expected = sum(a for a, _ in spreads) / sum(b for _, b in spreads)
    assert diversity(prompts, samples) == pytest.approx(expected, rel=rounding(torch.float32, 100))
    between = np.mean([[np.linalg.norm(a - b) for b in shown] for a in rows])
    expected = (2 * between - spread(rows) - spread(shown)) / (2 * between)
    assert distance(prompts, samples) == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_measures_see_what_is_wrong_with_images():
    prompts, samples = real()
    images, rng = torch.stack(samples), Rng(3)
    fair = four_errors(distance)
    few = [row for row, prompt in enumerate(prompts) if prompt.value > 4]
    assert distance([prompts[row] for row in few], [samples[row] for row in few]) > fair
    grainy = (images + 0.3 * rng.normal(*images.shape)).clamp(0, 1)
    assert distance(prompts, list(grainy)) > fair
    assert nearest(prompts, list(grainy)) > 1 + four_errors(nearest)
    means = {d: images[[row for row, p in enumerate(prompts) if p.value == d]].mean(0) for d in range(CLASSES)}
    assert nearest(prompts, [means[prompt.value] for prompt in prompts]) < 1 - four_errors(nearest)


def test_accuracy_is_the_second_judges():
    prompts, samples = real("held out")
    assert 0.96 <= accuracy(prompts, samples) < 1.0
    others = [Prompt(prompt.id, (prompt.value + 1) % CLASSES) for prompt in prompts]
    assert accuracy(others, samples) <= 1 - accuracy(prompts, samples)


def test_measures_see_images_that_only_please_the_judge():
    images, classes = digits("judge")
    images, wanted = images[:200].clone().requires_grad_(True), ((classes[:200] + 1) % CLASSES).tolist()
    prompts = asked(wanted)
    before = {measure: measure(prompts, list(images)) for measure in (distance, nearest)}
    optimiser = torch.optim.Adam([images], lr=0.02)
    for _ in range(20):
        optimiser.zero_grad()
        (-recognised(wanted, images).log().mean()).backward()
        optimiser.step()
        images.data.clamp_(0, 1)
    reward = float(recognised(wanted, images).detach().mean())
    assert reward > 0.9
    assert accuracy(prompts, list(images)) < 0.5 * reward
    assert nearest(prompts, list(images)) > 1.5 * before[nearest]
    assert distance(prompts, list(images)) > before[distance] + four_errors(distance)


def test_measures_do_not_depend_on_the_order_and_leave_gradients_behind():
    prompts, samples = real("judge")
    order = Rng(6).permutation(len(samples)).tolist()
    for measure in MEASURES.values():
        moved = measure([prompts[row] for row in order], [samples[row].requires_grad_() for row in order])
        assert isinstance(moved, float)
        assert moved == pytest.approx(measure(prompts, samples), rel=rounding(torch.float32, 100), abs=1e-6)


def test_what_cannot_be_measured_is_refused():
    prompts, samples = real("judge")
    alone = [next(row for row, prompt in enumerate(prompts) if prompt.value == digit) for digit in range(CLASSES)]
    with pytest.raises(InputError, match="two samples"):
        diversity([prompts[row] for row in alone], [samples[row] for row in alone])
    with pytest.raises(InputError, match="at least two"):
        distance(prompts[:1], samples[:1])
    for measure in MEASURES.values():
        with pytest.raises(InputError, match="images must be of shape"):
            measure(prompts[:3], samples[:2])
    with pytest.raises(InputError, match="images must be of shape"):
        recognised([1, 2], torch.zeros(2, 8, 8))


# the flow


def test_the_same_seed_teaches_the_same_flow():
    """The global generator is left alone."""
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first, second, third = taught(SHORT), taught(SHORT), taught(Teaching(steps=3, batch=16, seed=1))
    assert torch.equal(before, torch.random.get_rng_state())
    pairs = list(zip(first.parameters(), second.parameters(), third.parameters(), strict=True))
    assert all(torch.equal(one, other) for one, other, _ in pairs)
    assert not any(torch.equal(one, other) for one, _, other in pairs if one.dim() > 1)


def test_the_network_is_small_and_begins_as_zero():
    network = VelocityNetwork(Teaching())
    assert sum(parameter.numel() for parameter in network.parameters()) < 110_000
    x, t = Rng(0).normal(11, *SHAPE), Rng(1).uniform(11)
    assert not network(x, t, torch.arange(NO_LABEL + 1)).any()


def test_lessons_are_learnt():
    lessons = Teaching(noise=0.0, steps=300, batch=64)
    network = taught(lessons)
    states, classes = encoded(digits("held out")[0]), digits("held out")[1]
    rng = Rng(8)
    noise, time = rng.normal(*states.shape), 0.2 + 0.6 * rng.uniform(len(states))
    between = (1 - time).reshape(-1, 1, 1, 1) * states + time.reshape(-1, 1, 1, 1) * noise
    with torch.no_grad():
        losses = {
            name: (network(between, time, label) - (noise - states)).square().mean((1, 2, 3))
            for name, label in (("right", classes), ("wrong", (classes + 1) % CLASSES))
        }
    difference = losses["wrong"] - losses["right"]  # the label helps, beyond four standard errors
    assert float(difference.mean()) > 4 * float(difference.std()) / math.sqrt(len(difference))
    assert float(losses["right"].mean()) < 0.7 * float((noise - states).square().mean())


def test_the_task_draws_images_from_its_own_copy_every_time():
    task = get_task("digits", warm_steps=2, steps=3, draws=2)
    first, second = task.process(), task.process()
    assert first.module is not second.module
    drawn = rollout(first, [Request(prompt, 2) for prompt in task.evaluation], Rng(0))
    assert len(drawn) == 40
    assert all(image.shape == SHAPE and image.min() >= 0 and image.max() <= 1 for image in drawn.samples.values)
    again = rollout(second, [Request(prompt, 2) for prompt in task.evaluation], Rng(0))
    assert torch.equal(torch.stack(drawn.samples.values), torch.stack(again.samples.values))
    assert drawn.trajectories.action.shape == (40, 4, *SHAPE)
    guided = get_task("digits", warm_steps=2, steps=3, guidance=3.0).process()
    assert len(rollout(guided, [Request(task.prompts[7], 2)], Rng(0))) == 2


def test_every_digit_is_trained_and_judged_equally_often():
    task = digits_task(draws=3)
    assert [prompt.value for prompt in task.prompts] == list(range(CLASSES))
    assert sorted(prompt.value for prompt in task.evaluation) == sorted(list(range(CLASSES)) * 3)
    ids = [prompt.id for prompt in [*task.prompts, *task.evaluation]]
    assert len(set(ids)) == len(ids)
    assert task.same_prompts
    assert task.measures == MEASURES


@pytest.mark.parametrize("wrong", [{"noise": 1.5}, {"noise": -0.1}, {"draws": 0}, {"warm_steps": 0}])
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(InputError):
        digits_task(**wrong)


@pytest.mark.slow
def test_a_policy_gradient_follows_the_prompts_that_the_start_does_not():
    """The start follows half of them."""
    task = digits_task()
    begin = time.process_time()  # of one core: what else the machine does is not the task
    process = task.process()
    assert time.process_time() - begin < 60
    before = evaluate(process, task.evaluation, task.rewards, Rng(0), 8)
    assert 0.35 < before.reward < 0.55  # 0.55 of the labels are right
    measured = {n: f(before.drawn.prompts, before.drawn.samples.values) for n, f in MEASURES.items()}
    assert measured == pytest.approx(dict(zip(MEASURES, (0.45, 1.0, 0.0, 1.0), strict=True)), abs=0.1)
    recipe = Recipe(Policy(GroupCredit("mean", "std"), reduction=Reduction("row")), sampler={"solver": "sde-flow"})
    settings = Settings(steps=120, **{**task.settings, "learning_rate": 1e-3})  # faster than methods are compared at
    train(process, recipe, task.prompts, task.rewards, settings)
    assert evaluate(process, task.evaluation, task.rewards, Rng(0), 8).reward > 0.9


@pytest.mark.slow
def test_clean_labels_are_followed():
    task = digits_task(noise=0.0)
    assert evaluate(task.process(), task.evaluation, task.rewards, Rng(0), 4).reward > 0.85
