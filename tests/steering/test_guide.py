"""Guided rollouts: in closed form on Gaussian data, weighted back exactly, and nothing at all without a strength."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from stepwell import methods
from stepwell.check import expectation
from stepwell.check.oracles.flow.guide import guided_step
from stepwell.data.stream import PromptStream
from stepwell.errors import InputError, MissingAbility, RewardError
from stepwell.planning.branches import Branches
from stepwell.planning.groups import Groups
from stepwell.planning.windows import Tail, Windows
from stepwell.process.exact.table import markov
from stepwell.process.flow.build import flow
from stepwell.process.flow.process import Flow
from stepwell.recipe.recipe import Recipe
from stepwell.reward.mixing import Rewards
from stepwell.rng import Rng
from stepwell.sampling.request import Prompt, Request
from stepwell.sampling.rollout import rollout
from stepwell.steering.guide import RewardGuide
from stepwell.training.collect import collect

MEAN, DEVIATION, SLOPE, STEPS = 0.7, 0.6, 1.3, 4
"""Data N(MEAN, DEVIATION^2), and the reward SLOPE x."""


def posterior(t: float) -> tuple[float, float]:
    """slope and shift of E[x_0 | x_t = x] on the linear path."""
    alpha = 1 - t
    slope = alpha * DEVIATION**2 / (alpha**2 * DEVIATION**2 + t**2)
    return slope, MEAN - slope * alpha * MEAN


def velocity(x: Tensor, t: Tensor) -> Tensor:
    slope, shift = (
        x.new_tensor(part).reshape(t.shape) for part in zip(*map(posterior, t.flatten().tolist()), strict=True)
    )
    return (x - slope * x - shift) / t


def gaussian(solver="ddpm", steps=STEPS) -> Flow:
    return flow(velocity, (1,), solver=solver, steps=steps, dtype=torch.float64)


def linear(completions):
    return SLOPE * torch.stack(list(completions)).sum(1)


def judge(samples: Tensor, prompts: Tensor) -> Tensor:
    return SLOPE * samples.sum(1)


def drawn(process, guide, rng=None, count=1, reward=linear, planner=None):
    prompts = PromptStream([Prompt(0, None)], Rng(0), shuffle=False)
    planner = planner or Groups(1, count)
    return collect(process, planner, prompts, Rewards(reward), rng or Rng(0), 0, guide=guide).drawn.trajectories


def by_hand(times, strength):
    """Mean and variance of the last state: DDPM's step on a Gaussian, each mean moved by strength(q) dr/dx."""
    mean, variance = 0.0, 1.0
    for t, s in itertools.pairwise(times):
        slope, shift = posterior(t)
        q = s * math.sqrt(1 - (s * (1 - t) / (t * (1 - s))) ** 2)
        kept = math.sqrt(s**2 - q**2)
        a = (1 - s) * slope + kept * (1 - (1 - t) * slope) / t
        b = (1 - s) * shift - kept * (1 - t) * shift / t
        push = strength(q) * SLOPE * slope if q > 0 else 0.0  # the last step, to t = 0, draws nothing
        mean, variance = a * mean + b + push, a**2 * variance + q**2
    return mean, variance


def moments(process, guide):
    def program(rng):
        rows = drawn(process, guide, rng)
        x = rows.action[0, -1, 0]
        return {"mean": x, "square": x**2, "weight": rows.weight[0].exp()}

    found = expectation(program, normal_nodes=2)
    return float(found["mean"]), float(found["square"] - found["mean"] ** 2)


@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_the_guided_chain_on_gaussian_data_is_the_recursion_by_hand(beta):
    process = gaussian()
    expected = by_hand(process.sampler.times, lambda q: q**2 / (2 * beta))
    assert moments(process, RewardGuide(beta=beta)) == pytest.approx(expected, abs=1e-12)
    assert expected[0] > by_hand(process.sampler.times, lambda q: 0.0)[0] + 0.01


def test_a_scale_takes_the_place_of_the_steps_own_strength():
    process = gaussian()
    expected = by_hand(process.sampler.times, lambda q: 0.25)
    assert moments(process, RewardGuide(scale=0.25)) == pytest.approx(expected, abs=1e-12)


def test_a_normalised_gradient_of_one_number_is_its_sign():
    """Every push is 0.25, whatever the gradient, but the first, of 0, and the last, which is not random."""
    process = gaussian()
    slopes = []
    for t, s in itertools.pairwise(process.sampler.times):
        slope, _ = posterior(t)
        kept = s**2 * (1 - t) / (t * (1 - s)) if s else 0.0  # of DDPM's step
        slopes.append((1 - s) * slope + kept * (1 - (1 - t) * slope) / t)
    pushed = sum(0.25 * math.prod(slopes[step + 1 :]) for step in (1, 2))
    plain, _ = by_hand(process.sampler.times, lambda q: 0.0)
    found, _ = moments(process, RewardGuide(scale=0.25, normalise=True))
    assert found - plain == pytest.approx(pushed, abs=1e-7)  # the norm has 1e-8 added to it
    raw, _ = moments(process, RewardGuide(scale=0.25))
    assert found != pytest.approx(raw, abs=1e-3)


def test_nothing_is_pushed_where_the_state_says_nothing_of_the_data():
    """At t = 1 the prediction is the mean whatever the noise, and so has no gradient."""
    process = gaussian()
    state = process.advance(process.start([None], Rng(0)), torch.ones(1, 1).double(), Rng(0))
    step = process.propose(state)
    guided = RewardGuide().proposal(process, judge)(step, state, [Prompt(0, None)])
    torch.testing.assert_close(guided.mean, step.mean, rtol=0, atol=1e-15)


def test_half_of_beta_gives_the_tilted_distribution_for_a_linear_reward():
    """Doob's transform needs g^2 grad log E[exp(r / beta) | x], here g^2 grad r(D) / beta: twice the Langevin share."""
    beta = 1.5
    tilted = MEAN + SLOPE * DEVIATION**2 / beta
    off = {}
    for steps in (256, 512, 1024):
        times = [1 - k / steps for k in range(steps)] + [0.0]
        doob, share = (by_hand(times, lambda q, b=b: q**2 / (2 * b))[0] for b in (beta / 2, beta))
        off[steps] = abs(doob - tilted)
        assert share - MEAN == pytest.approx((doob - MEAN) / 2, abs=1e-12)
    assert off[256] / off[512] == pytest.approx(2, abs=0.1), "first order in the step"
    assert off[512] / off[1024] == pytest.approx(2, abs=0.05)
    assert 2 * off[1024] - off[512] == pytest.approx(0, abs=0.1 * off[1024]), "and no error is left in the limit"


# weights


@pytest.mark.parametrize("guide", [RewardGuide(beta=3.0), RewardGuide(scale=0.1), RewardGuide(0.1, normalise=True)])
@pytest.mark.parametrize(
    "planner", [Groups(1, 3), Windows(1, 3, steps=3, width=2), Tail(1, 3, steps=3, width=1, begin=1, ratio=0.5)]
)
def test_stored_log_densities_are_those_of_the_guided_steps(guide, planner):
    """The weights are the ratio to the model's own."""
    process = gaussian()
    rows = drawn(process, guide, planner=planner)
    assert len(rows) == 3
    with torch.no_grad():
        plain = process.score(rows).log_prob
    torch.testing.assert_close((plain - rows.log_prob).sum(1), rows.weight, rtol=0, atol=1e-12)
    assert float(rows.weight.abs().min()) > 1e-4
    unguided = drawn(process, None, planner=planner)
    assert not unguided.weight.any()
    assert torch.equal(unguided.mask, rows.mask)
    assert torch.equal(unguided.action[:, 0], rows.action[:, 0]), "the noise is nobody's choice"


def test_weighted_expectations_are_those_of_the_unguided_chain():
    """E[w] = 1 and E[w x] = E[x], at 4 standard errors of 4000 rows; unweighted, the mean is far off."""
    process = gaussian()
    rows = drawn(process, RewardGuide(beta=0.5), count=4000)
    weight, x = rows.weight.exp(), rows.action[:, -1, 0]
    exact = by_hand(process.sampler.times, lambda q: 0.0)[0]
    for values, expected in ((weight, 1.0), (weight * x, exact)):
        error = float(values.std()) / math.sqrt(len(values))
        assert abs(float(values.mean()) - expected) < 4 * error
    assert abs(float(x.mean()) - exact) > 4 * float(x.std()) / math.sqrt(len(x))


# no strength, no guide


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2, dtype=torch.float64)
        for place, parameter in enumerate(self.parameters()):
            parameter.data.copy_(Rng(2).split(place).normal(*parameter.shape, dtype=torch.float64))

    def forward(self, x, time):
        return self.linear(torch.cat([x, time[:, None]], 1)).tanh()


def small(solver="sde-flow") -> Flow:
    return flow(Net(), (2,), solver=solver, steps=STEPS)


def closeness(completions):
    return -(torch.stack(list(completions)) - 1.0).square().sum(1)


@pytest.mark.parametrize("solver", ["sde-flow", "sde-dance", "sde-dpmpp-2m", "sa-solver-2"])
def test_a_guide_of_no_strength_changes_nothing_bit_for_bit(solver):
    plain = drawn(small(solver), None, count=3, reward=closeness)
    none = drawn(small(solver), RewardGuide(scale=0.0), count=3, reward=closeness)
    weak = drawn(small(solver), RewardGuide(beta=1e18), count=3, reward=closeness)
    for rows in (none, weak):
        for name in ("action", "log_prob", "mask", "weight", "node"):
            assert torch.equal(getattr(rows, name), getattr(plain, name)), name
    strong = drawn(small(solver), RewardGuide(), count=3, reward=closeness)
    assert not torch.equal(strong.action, plain.action)


def test_deterministic_steps_are_left_alone():
    rows = drawn(small("euler"), RewardGuide(), count=2, reward=closeness)
    assert torch.equal(rows.action, drawn(small("euler"), None, count=2, reward=closeness).action)


def test_a_guided_step_costs_one_more_evaluation():
    """Also the way back through it, and a reward call."""
    process = small()
    drawn(process, RewardGuide(), count=3, reward=closeness)
    spent, random = process.meter.spent, STEPS - 1  # the last step draws nothing
    assert spent.model_evaluations == 3 * (STEPS + random)
    assert spent.backward == 3 * random
    assert spent.reward_calls == 3 * (random + 1)
    assert all(p.grad is None for p in process.module.parameters()), "nothing is left behind"


def test_the_norm_is_that_of_the_whole_batch_which_couples_rows():
    """The raw gradient is each row's own."""
    process = small()
    rng = Rng(4)
    state = process.start([None] * 3, rng)
    state = process.advance(state, process.propose(state).sample(rng), rng)
    prompts = [Prompt(0, None)] * 3

    def pushes(guide, index):
        part = state[index]
        step = process.propose(part)
        moved = guide.proposal(process, lambda x, ids: -(x - 1.0).square().sum(1))(step, part, prompts[: len(index)])
        return (moved.mean - step.mean).detach()

    together, alone = torch.arange(3), torch.tensor([1])
    raw = RewardGuide(beta=0.3)
    torch.testing.assert_close(pushes(raw, together)[1:2], pushes(raw, alone), rtol=0, atol=1e-14)
    published = RewardGuide(scale=0.1, normalise=True)
    assert float(pushes(published, together).norm()) == pytest.approx(0.1, abs=1e-8)
    assert float(pushes(published, alone).norm()) == pytest.approx(0.1, abs=1e-8)
    assert not torch.allclose(pushes(published, together)[1:2], pushes(published, alone))


def test_the_gradient_is_that_of_the_decoded_prediction():
    """Under the row's own prompt."""

    def towards(completions, target):
        points = torch.stack(list(completions))
        return -(points - points.new_tensor(target)[:, None]).square().sum(1)

    process = flow(Net(), (2,), solver="sde-flow", steps=STEPS, decode=lambda x: -3.0 * x)
    prompts = [Prompt(0, None, {"target": 50.0}), Prompt(1, None, {"target": -50.0})]
    stream = PromptStream(prompts, Rng(0), shuffle=False)
    rows = collect(process, Groups(2, 3), stream, Rewards(towards), Rng(0), 0, guide=RewardGuide(beta=20.0)).drawn
    ends = rows.trajectories.action[:, -1].mean(1)
    assert float(ends[:3].max()) < float(ends[3:].min()), "samples are minus three times the states"


# the method


def test_the_methods_step_is_written_out_by_hand():
    assert guided_step(methods.get("euphonium")) < 1e-12


@pytest.mark.parametrize("mistake", ["sign", "beta", "unguided", "raw"])
def test_planted_mistakes_in_the_guide_are_caught(mistake, monkeypatch):
    right = RewardGuide.proposal

    def proposal(self, process, judge_):
        guide = self
        if mistake == "beta":
            guide = RewardGuide(self.scale, self.beta / 2, self.normalise)
        if mistake == "raw":
            guide = RewardGuide(self.scale, self.beta, False)
        made = right(guide, process, judge_)

        def planted(step, state, prompts):
            moved = made(step, state, prompts)
            if mistake == "sign" and hasattr(step, "mean"):
                return type(step)(2 * step.mean - moved.mean, step.standard_deviation, step.trained)
            return step if mistake == "unguided" else moved

        return planted

    monkeypatch.setattr(RewardGuide, "proposal", proposal)
    assert guided_step(methods.get("euphonium")) > 1e-3


def test_the_card_names_the_published_numbers_and_the_centre_left_out():
    card = methods.get("euphonium")
    assert card.recipe().guide == RewardGuide(beta=0.1)
    assert card.recipe(variant="published").guide == RewardGuide(scale=0.1, normalise=True)
    assert "RewardGuide(scale=0.1, normalise=True)" in card.recipe(variant="published").parts()
    assert "guided centre" in card.differs


def test_a_guided_run_learns_and_its_policy_is_the_unguided_one(tmp_path):
    import stepwell as sw

    process = flow(Net(), (2,), steps=8)
    settings = {"steps": 30, "learning_rate": 0.02, "prompts_per_step": 1, "group_size": 16, "seed": 1}
    options = {"steps": 6, "level": 0.6, "beta": 5.0}
    prompts = [{"prompt": "anything"}]
    run = sw.train(process, prompts, closeness, "euphonium", options=options, **settings)
    first, last = (sum(step["reward"] for step in part) for part in (run.history[:5], run.history[-5:]))
    assert last > first
    before = drawn(small("ddim"), None, count=64, reward=closeness).reward.mean()
    after = drawn(run.process.with_sampler(solver="ddim", steps=STEPS), None, count=64, reward=closeness).reward.mean()
    assert float(after) > float(before)


# what cannot be guided


def test_what_cannot_be_guided_is_refused_in_words():
    with pytest.raises(MissingAbility, match="data_prediction"):
        RewardGuide().proposal(markov(), judge)
    with pytest.raises(InputError, match=r"RewardGuide\.beta must be a number above 0, got 0\.0"):
        RewardGuide(beta=0.0)
    with pytest.raises(InputError, match=r"RewardGuide\.scale must be a number, 0 or more, or None, got -0\.1"):
        RewardGuide(scale=-0.1)
    with pytest.raises(RewardError, match="not differentiable"):
        drawn(small(), RewardGuide(), reward=lambda completions: [1.0] * len(completions))
    request = Request(Prompt(0, None), 1, proposal=lambda step, state, prompts: step)
    with pytest.raises(InputError, match=r"Request\.proposal must be left out where a guide makes it \(prompt 0\)"):
        RewardGuide().applied([request], small(), judge)
    with pytest.raises(InputError, match="importance weights cannot be gone through again"):
        drawn(small(), RewardGuide(), planner=Windows(1, 3, steps=3, width=3, same_noise=True), reward=closeness)


def test_rows_that_branch_off_deterministic_trunks_can_be_guided():
    rows = drawn(small(), RewardGuide(), planner=Branches(1, 3, at=(0, 1)), reward=closeness)
    assert len(rows) == 6
    with torch.no_grad():
        plain = small().score(rows).log_prob
    torch.testing.assert_close((plain - rows.log_prob).sum(1), rows.weight, rtol=0, atol=1e-12)


def test_requests_with_other_samplers_are_guided_by_their_predictions():
    """They are drawn side by side where the samplers are alike."""
    process = gaussian()
    samplers = [None, {"tail": (2, "ddim", 1)}, None, {"tail": (2, "ddim", 1)}]
    requests = [Request(Prompt(0, None), 1, sampler=sampler) for sampler in samplers]
    requests = RewardGuide().applied(requests, process, judge)
    assert requests[0].proposal is requests[2].proposal
    assert requests[1].proposal is requests[3].proposal
    assert requests[0].proposal is not requests[1].proposal
    rollout(process, requests, Rng(0))


def test_a_recipe_is_as_it_was_without_a_guide():
    plain = methods.get("dance-grpo").recipe()
    assert isinstance(plain, Recipe)
    assert plain.guide is None
    assert not any("guide" in part.lower() for part in plain.parts())
