"""The oracles of flow methods catch mistakes planted in each part and agree with real noise; figures of the cards."""

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import dataclass

import pytest
import torch
from mistakes import parts, planted

import stepwell
from stepwell import methods
from stepwell.batch import Batch
from stepwell.check.methods import TOLERANCE
from stepwell.check.oracles.flow.bench import affine_flow, drawn, every_outcome, loss_gradient, planned
from stepwell.check.oracles.flow.gradients import _mean_ratios
from stepwell.check.oracles.flow.moments import Chain, expected_reward_gradient
from stepwell.check.oracles.flow.steps import Matrices, chain_by_hand, nearness, prompts, step_by_hand, uniform_times
from stepwell.check.oracles.registry import oracle, oracles
from stepwell.check.replay import expectation
from stepwell.credit.branches import BranchExtremes, Pooled, TreeCredit
from stepwell.credit.group import GroupCredit
from stepwell.credit.shaping import Bounded, DivergencePenalty, Outcome
from stepwell.data.stream import PromptStream
from stepwell.errors import UnknownName
from stepwell.objective.flow.forward import DenoisingScore, DirectReward, Noised
from stepwell.objective.flow.gaussian import (
    DivergenceBound,
    PerDimensionRatio,
    RegulatedRatio,
    StepSize,
    step_divergence,
)
from stepwell.objective.preference.pairs import Logistic, Pairing
from stepwell.objective.ratio import Ratio
from stepwell.objective.reduction import Reduction
from stepwell.objective.regularise import Divergence
from stepwell.objective.term import Objective
from stepwell.planning.branches import Branches, Candidates
from stepwell.planning.groups import Groups
from stepwell.planning.windows import Backward, Tail, Windows
from stepwell.process.exact.mixture import Mixture, chain_moments
from stepwell.process.models import Models
from stepwell.reward.mixing import Rewards
from stepwell.rng import Rng
from stepwell.solver.path import Linear
from stepwell.solver.table import table
from stepwell.training.collect import collect
from stepwell.training.update import accumulate
from stepwell.trajectories import count


def credit(part):
    return parts(credit_of=Bounded(part, 5.0))


def law(**settings):
    return lambda recipe: recipe.replace(sampler={**recipe.sampler, **settings})


def planner(kind, **settings):
    """The same planner as another class, or with other settings."""

    def change(recipe):
        own = recipe.planner
        if kind is not None and not issubclass(kind, type(own)):
            return recipe
        mine = {field.name: getattr(own, field.name) for field in dataclasses.fields(own)}
        return recipe.replace(planner=(kind or type(own))(**{**mine, **settings}))

    return change


def only_where(published, change):
    """The change, in recipes whose ratio is the published one, or in all others."""
    return lambda recipe: (
        change(recipe) if isinstance(recipe.whole.terms[0].ratio, PerDimensionRatio) == published else recipe
    )


# mistakes in planners


@dataclass
class OneTooMany(Windows):
    """The window trains the step after it too."""

    def window(self, rollout, rng):
        begin, end = super().window(rollout, rng)
        return begin, min(end + 1, self.steps)


@dataclass
class OffByOne(Windows):
    """The window stands one rollout behind."""

    def window(self, rollout, rng):
        return super().window(max(rollout - 1, 0), rng)


@dataclass
class ShortTail(Tail):
    """The last step is forgotten when those that are left are counted."""

    after: int = 0


@dataclass
class Noisy(Branches):
    """Children of the first step draw noise in, and train, the next one too."""

    def _child(self, prompt, count, start, place, source=0):
        request = super()._child(prompt, count, start, place, source)
        return dataclasses.replace(request, window=(place, place + 2)) if place == 1 else request


@dataclass
class NoTerminal(Branches):
    """A stride that jumps over what is left, to the end at once."""

    def _child(self, prompt, count, start, place, source=0):
        strided = dataclasses.replace(self, strides=(*self.strides[:1], 9))
        return Branches._child(strided, prompt, count, start, place, source)


@dataclass
class Trunks(Backward):
    """The rows that others branched off are trained too."""

    def keep(self, so_far):
        return torch.arange(len(so_far))


@dataclass
class Apart(Candidates):
    """The first candidates of a prompt start from noises of their own."""

    def plan(self, step, so_far, prompts):
        if so_far is None:
            return [dataclasses.replace(r, count=self.size) for r in super().plan(step, so_far, prompts)]
        return super().plan(step, so_far, prompts)


# mistakes in parts


@dataclass(frozen=True)
class Biased(RegulatedRatio):
    """The ratio's bias is left in."""

    def __call__(self, batch, advantage=None):
        return super().__call__(batch, advantage) - batch.present("deviation") * step_divergence(batch) / 2


@dataclass(frozen=True)
class Summed(DivergenceBound):
    """The bound is on K in place of K / D."""

    def __call__(self, batch, log_ratio, advantage):
        return dataclasses.replace(self, threshold=self.threshold / 2)._bound(batch, log_ratio, advantage)

    def _bound(self, batch, log_ratio, advantage):
        return DivergenceBound.__call__(self, batch, log_ratio, advantage)


@dataclass(frozen=True)
class Everywhere(DivergenceBound):
    """Steps are dropped whichever way they went."""

    def __call__(self, batch, log_ratio, advantage):
        return (step_divergence(batch) / batch.dimensions < self.threshold).double()


@dataclass(frozen=True)
class FromTheMiddle(DirectReward):
    """Samples are noised at the middle of the grid."""

    def draw(self, rows, models, rng):
        drawn = super().draw(rows, models, rng)
        return {**drawn, "time": torch.full_like(drawn["time"], models.policy.sampler.times[-3])}


@dataclass(frozen=True)
class Never(DirectReward):
    """The largest depth is never drawn."""

    def draw(self, rows, models, rng):
        return dataclasses.replace(self, up_to=self.up_to - 1)._draw(rows, models, rng)

    def _draw(self, rows, models, rng):
        return DirectReward.draw(self, rows, models, rng)


@dataclass(frozen=True)
class Reversed(Pairing):
    """The worst is chosen."""

    def __call__(self, batch):
        return super().__call__(batch).flip(1)


@dataclass(frozen=True)
class Swapped(Logistic):
    """The pair's sides are swapped."""

    def __call__(self, chosen, rejected):
        return super().__call__(rejected, chosen)


def negative_aware(**changes):
    """NFT's targets are r = 1/2 + A / (2 C) without the clip, or what else `good` makes of them."""

    def change(recipe):
        (term,) = recipe.whole.terms
        return recipe.replace(objective=dataclasses.replace(term, **changes))

    return change


def unclipped(recipe):
    (term,) = recipe.whole.terms

    @dataclass(frozen=True)
    class Unclipped(type(term)):
        def credit(self, batch):
            return {"good": 0.5 + self.credit_of(batch) / (2 * self.bound)}

    values = {field.name: getattr(term, field.name) for field in dataclasses.fields(term)}
    return recipe.replace(objective=Unclipped(**values))


def penalty(quantity):
    """Another quantity in the penalty."""

    def change(recipe):
        policy, term = recipe.whole.terms
        return recipe.replace(objective=Objective((policy, dataclasses.replace(term, quantity=quantity))))

    return change


group = GroupCredit("mean", "std")

PLANTED = [
    ("gaussian_gradient", "flow-grpo", credit(group), "the group's deviation for the batch's"),
    ("gaussian_gradient", "flow-grpo", law(solver="sde-euler"), "Euler for the exact step"),
    ("gaussian_gradient", "flow-grpo", law(level=0.6), "a in place of tau"),
    ("gaussian_gradient", "flow-grpo", only_where(True, parts(ratio=Ratio())), "the sum for the mean"),
    ("gaussian_gradient", "flow-grpo", only_where(True, law(solver="sde-euler")), "a mended first step"),
    ("gaussian_gradient", "dance-grpo", law(solver="sde-euler-published"), "another law"),
    ("gaussian_gradient", "ddpo-sf", parts(reduction=Reduction("token")), "a mean over steps for their sum"),
    ("gaussian_gradient", "ddpo-is", credit(GroupCredit("mean", "std", ddof=0)), "the population's deviation"),
    ("gaussian_gradient", "mix-grpo", credit(group), "an epsilon of 1e-4"),
    ("gaussian_gradient", "tempflow-grpo", credit(group), "groups of a whole prompt"),
    ("gaussian_gradient", "tempflow-grpo", parts(gates=()), "no weights by noise"),
    ("gaussian_gradient", "g2rpo", credit(GroupCredit("mean", "std", keys=("prompt", "origin"))), "not summed"),
    ("gaussian_gradient", "g2rpo", parts(credit_of=Bounded(Pooled(group), 5.0)), "strides judged together"),
    ("gaussian_gradient", "dynamic-treerpo", parts(credit_of=TreeCredit(scale=False)), "no deviation"),
    ("gaussian_gradient", "dynamic-treerpo", parts(reduction=Reduction("token")), "shared steps counted for each leaf"),
    ("gaussian_gradient", "grpo-guard", parts(gates=()), "no 1 / |dt|"),
    ("gaussian_gradient", "grpo-guard", parts(ratio=PerDimensionRatio()), "no scale of the step's own"),
    ("gaussian_gradient", "b2-diffurl", parts(credit_of=BranchExtremes(positive=-5.0)), "every best branch counts"),
    ("gaussian_gradient", "b2-diffurl", parts(credit_of=group), "every branch counts"),
    ("gaussian_gradient", "loop", parts(credit_of=GroupCredit("mean")), "a baseline with its own reward in it"),
    (
        "gaussian_gradient",
        "ctrl",
        parts(credit_of=GroupCredit("leave-one-out", reward=Outcome() + DivergencePenalty(-0.1))),
        "divergence rewarded",
    ),
    ("policy_moment_gradient", "flow-grpo", planner(OneTooMany, width=2), "a window that is too short"),
    ("policy_moment_gradient", "mix-grpo", planner(OffByOne), "a window one rollout behind"),
    ("policy_moment_gradient", "mix-grpo", parts(reduction=Reduction("row-sum")), "a sum over steps"),
    ("policy_moment_gradient", "loop", parts(credit_of=GroupCredit("mean")), "the factor 1 - 1/G"),
    ("policy_moment_gradient", "ddpo-sf", parts(credit_of=GroupCredit("leave-one-out")), "no factor 1 - 1/G"),
    ("policy_moment_gradient", "ddpo-is", credit(GroupCredit("mean", keys=("prompt", "reward"))), "equals compared"),
    ("branch_gradient", "tempflow-grpo", planner(Noisy), "noise after the branch"),
    ("branch_gradient", "tempflow-grpo", credit(group), "children of different states compared"),
    ("branch_gradient", "g2rpo", planner(NoTerminal), "another stride"),
    ("branch_gradient", "g2rpo", credit(GroupCredit("mean", keys=("prompt", "origin"))), "strides not summed"),
    ("branch_gradient", "dynamic-treerpo", parts(reduction=Reduction("token")), "shared steps counted for each leaf"),
    ("branch_gradient", "dynamic-treerpo", parts(credit_of=group), "leaves' own advantages"),
    ("branch_gradient", "b2-diffurl", planner(Trunks), "trunks trained"),
    ("branch_gradient", "b2-diffurl", planner(None, steps=5), "a split one step too late"),
    ("branch_gradient", "b2-diffurl", planner(None, hold=9), "a part that does not grow"),
    ("branch_gradient", "dynamic-treerpo", planner(None, hold=0), "a tree that stays where it is"),
    ("path_divergence", "ctrl", parts(credit_of=GroupCredit("leave-one-out")), "no penalty"),
    (
        "path_divergence",
        "ctrl",
        parts(credit_of=GroupCredit("leave-one-out", reward=Outcome() + DivergencePenalty(0.15))),
        "half the penalty",
    ),
    ("mean_ratio", "flow-grpo", parts(ratio=PerDimensionRatio()), "the mean for the sum"),
    ("mean_ratio", "flow-grpo", only_where(True, parts(ratio=Ratio())), "the sum for the mean"),
    ("regulated_ratio", "grpo-guard", parts(ratio=PerDimensionRatio()), "the mean ratio"),
    ("regulated_ratio", "grpo-guard", parts(ratio=Biased()), "the bias left in"),
    ("divergence_bound", "flow-dppo", parts(gates=()), "no bound"),
    ("step_divergence", "flow-grpo", only_where(False, penalty(Divergence("exact") * StepSize())), "|dt| of the KL"),
    ("step_divergence", "flow-grpo", only_where(True, penalty(Divergence("exact"))), "the exact one as published"),
    ("step_divergence", "tempflow-grpo", penalty(Divergence("exact") * 2.0), "without the half"),
    ("window_schedule", "mix-grpo", planner(None, variant="published"), "the published end in both"),
    ("window_schedule", "mix-grpo", planner(None, stride=2), "two steps at a time"),
    ("truncated_sum", "alignprop", lambda r: r.replace(objective=Never(2, r.sampler["steps"])), "never all the way"),
    ("renoised_gradient", "draft-lv", lambda r: r.replace(objective=FromTheMiddle(renoised=2)), "another time"),
    ("renoised_gradient", "draft-lv", lambda r: r.replace(objective=DirectReward(1)), "the sample's own last step"),
    ("step_preference", "spo", parts(link=Swapped(3.0)), "sides swapped"),
    ("step_preference", "spo", parts(link=Logistic(6.0)), "twice beta"),
    ("step_preference", "spo", parts(pairing=Pairing()), "candidates of different states compared"),
    ("step_preference", "spo", parts(pairing=Reversed(keys=("prompt", "origin"))), "the worst chosen"),
    ("step_preference", "spo", planner(Apart), "first candidates from different noises"),
    ("denoising_preference", "diffusion-dpo", parts(link=Swapped(0.7)), "sides swapped"),
    ("denoising_preference", "diffusion-dpo", parts(link=Logistic(0.7, smoothing=0.1)), "smoothed labels"),
    ("denoising_preference", "diffusion-dpo", parts(score=DenoisingScore("data")), "errors of the data"),
    ("denoising_preference", "diffusion-dpo", parts(noised=Noised(3, grid=True)), "points of each row's own"),
    ("denoising_preference", "diffusion-dpo", parts(noised=Noised(3, shared=True)), "times off the grid"),
    ("negative_aware_minimum", "diffusion-nft", negative_aware(beta=1.0), "no beta"),
    ("negative_aware_minimum", "diffusion-nft", unclipped, "advantages that are not clipped"),
    ("weighted_matching", "awm", parts(credit_of=GroupCredit("mean")), "no deviation"),
    ("weighted_matching", "awm", parts(weight="uniform"), "a weight that is not heard of"),
    ("weighted_matching", "awm", parts(coefficient=-1.0), "the other sign"),
    ("adjoint_gradient", "implicit-diffusion", parts(pinned=False), "states that move with the parameters"),
]


@pytest.mark.parametrize(
    ("name", "method", "change", "mistake"), PLANTED, ids=lambda value: value if isinstance(value, str) else ""
)
def test_an_oracle_catches_the_planted_mistake(name, method, change, mistake):
    assert oracle(name)(planted(method, change)) > 1000 * TOLERANCE, mistake


def test_every_flow_oracle_has_a_planted_mistake():
    homes = {f"stepwell.check.oracles.flow.{room}" for room in ("gradients", "moments", "rewards", "losses")}
    assert {name for name, found in oracles().items() if found.__module__ in homes} == {name for name, *_ in PLANTED}


def test_a_bound_that_reads_the_sum_or_drops_both_ways_is_caught():
    for gate in (Summed, Everywhere):
        change = lambda recipe: recipe.replace(gates=(gate(recipe.whole.terms[0].gates[0].threshold),))  # noqa: E731, B023
        assert oracle("divergence_bound")(planted("flow-dppo", change)) > 1e-3


def test_a_depth_off_by_one_is_caught():
    def deeper(recipe):
        depth = recipe.objective.depth
        return recipe.replace(objective=DirectReward(depth + 1 if depth else None))

    assert oracle("truncated_sum")(planted("draft-k", deeper)) > 1e-3


def test_a_tail_that_forgets_the_last_step_is_caught():
    change = planner(None)

    def short(recipe):
        return planner(ShortTail, after=0)(recipe) if isinstance(recipe.planner, Tail) else change(recipe)

    assert oracle("policy_moment_gradient")(planted("mix-grpo", short)) > 1e-3


def test_a_method_that_is_not_defined_by_hand_is_refused():
    with pytest.raises(UnknownName, match="did you mean 'flow-grpo'"):
        oracle("gaussian_gradient")(dataclasses.replace(methods.get("flow-grpo"), id="flow-grp"))


# the hand-written formulas themselves


@pytest.mark.parametrize(("time", "target"), [(0.9, 0.6), (0.4, 0.25)])
def test_the_exact_step_is_the_limit_of_the_sdes_euler_steps_with_the_data_prediction_held(time, target):
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
def test_the_moments_by_hand_are_those_of_the_mixture_room(solver, kind, level):
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
def test_real_noise_gives_the_gradient_of_the_moment_recursion_within_four_standard_errors(name, options, chains):
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
def test_the_published_first_step_leaves_a_variance_of_one_and_a_quarter_of_level_to_the_fourth(level, variance):
    assert "1.060 at level 0.7" in published("mix-grpo")
    recipe = methods.get("flow-grpo").recipe(variant="published", level=level)
    times = [1.0, 1.0 - 1e-7, 0.0]
    models = affine_flow(recipe, dimension=1)
    exact = methods.get("flow-grpo").recipe(level=level).sampler
    for sampler, expected in ((recipe.sampler, variance), (exact, 1.0)):
        policy = models.policy.with_sampler(times=times, solver=sampler["solver"], level=sampler["level"])
        rows = every_outcome(Models(policy, models.reference), recipe.replace(planner=Groups(size=1)))
        assert abs(float(rows.action[:, 1].square().mean()) - expected) < 1e-4


def test_the_published_windows_are_short_in_75_and_empty_in_25_of_650_rollouts():
    assert "75 of 650 rollouts train one to three steps and 25 train none" in published("mix-grpo")
    for variant, short, none in (("published", 75, 25), ("corrected", 0, 0)):
        windows = methods.get("mix-grpo").recipe(variant=variant, steps=26).planner
        stream = PromptStream(prompts(1), Rng(0), shuffle=False)
        plans = [windows.plan(rollout, None, stream)[0] for rollout in range(650)]
        widths = [end - begin for begin, end in (plan.window for plan in plans)]
        assert (sum(0 < width < 4 for width in widths), widths.count(0)) == (short, none)


def test_the_published_penalty_is_a_twentieth_for_ten_steps_in_two_dimensions():
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
