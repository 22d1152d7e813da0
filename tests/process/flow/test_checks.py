"""Checks of the parts of a flow: a mistake is one sentence, where it was made; half precision keeps its densities."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import stepwell as sw
from stepwell.errors import InputError, RewardError
from stepwell.rng import Rng
from stepwell.sampling.request import Prompt, Request
from stepwell.sampling.rollout import rollout


def to_one(x, t):
    return (x - 1) / t


def to_label(x, t, label):
    return (x - label.reshape(-1, 1)) / t


class Net(nn.Module):
    def __init__(self, cut=lambda x: x):
        super().__init__()
        self.layer, self.cut = nn.Linear(3, 2), cut
        with torch.no_grad():
            for place, parameter in enumerate(self.parameters()):
                parameter.copy_(0.3 * Rng(0).split(place).normal(*parameter.shape))

    def forward(self, x, t):
        return self.cut(self.layer(torch.cat([x, t[:, None]], 1)))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"shape": 2}, "shape must be the sizes of one sample, .* got 2"),
        ({"shape": (0,)}, r"shape must be the sizes of one sample, .* got \(0,\)"),
        ({"shape": (2.5,)}, r"shape must be the sizes of one sample, .* got \(2.5,\)"),
        ({"shape": "ab"}, "shape must be the sizes of one sample, .* got 'ab'"),
        ({"path": 3}, "path must be a name or a Path, got 3"),
        ({"dtype": "float16"}, "dtype must be a floating one .* got 'float16'"),
        ({"dtype": torch.int64}, "dtype must be a floating one .* got torch.int64"),
        ({"encode": 5}, "encode must be a function, got a int"),
        ({"decode": 5}, "decode must be a function, got a int"),
        ({"times": 0.5}, "times must be falling numbers, got 0.5"),
        ({"times": [1, 0], "steps": 5}, "times cannot be given beside steps or shift"),
        ({"times": [1, 0], "shift": 3.0}, "times cannot be given beside steps or shift"),
        ({"shift": float("inf")}, "time shift must be positive and finite, got inf"),
        ({"shift": "x"}, "shift must be a number, got 'x'"),
        ({"guidance": "x"}, "guidance must be a number, got 'x'"),
        ({"unconditional": {"label": torch.zeros(1)}}, "give `encode` as well"),
        ({"encode": "label", "unconditional": torch.zeros(1)}, "unconditional must be a dictionary .* got a Tensor"),
        (
            {"encode": "label", "unconditional": {"label": 0}},
            r"unconditional\['label'\] must be a tensor with one row, got a int",
        ),
        (
            {"encode": "label", "unconditional": {"label": torch.zeros(3)}},
            r"\['label'\] must be a tensor with one row, got a tensor of shape \(3,\)",
        ),
    ],
)
def test_what_a_flow_cannot_be_made_of_is_said_in_one_sentence(change, said):
    with pytest.raises(InputError, match=said):
        sw.flow(to_one, **{"shape": (2,)} | change)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"level": "x"}, "level must be a number, got 'x'"),
        ({"stride": 3}, r"stride must be \(step, stride\): .* got 3"),
        ({"tail": (5, 2)}, r"tail must be \(step, solver, steps\): .* got \(5, 2\)"),
    ],
)
def test_what_a_sampler_cannot_be_set_to_is_said_in_one_sentence(setting, said):
    with pytest.raises(InputError, match=said):
        sw.flow(to_one, (2,), solver="sde-flow").with_sampler(**setting)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"encode": lambda prompts: torch.zeros(len(prompts))}, "a dictionary of tensors, one row a prompt"),
        ({"encode": lambda prompts: {"label": [1]}}, "one row a prompt as 'label', got a list for 1 prompts"),
        ({"encode": lambda prompts: {"label": torch.tensor(1.0)}}, r"as 'label', got a tensor of shape \(\)"),
        (
            {"encode": "label", "unconditional": {"d": torch.zeros(1)}},
            "must have the names that encode returns, label, got d",
        ),
        (
            {"encode": "label", "decode": lambda x: x[:1]},
            r"decode must return .* got a tensor of shape \(1, 2\) for 2 states",
        ),
        ({"encode": "label", "decode": lambda x: None}, "decode must return .* got a NoneType for 2 states"),
    ],
)
def test_what_the_users_functions_return_is_checked(settings, said):
    with pytest.raises(InputError, match=said):
        sw.sample(sw.flow(to_label, (2,), **settings), [1], 2)


@pytest.mark.parametrize("kind", [torch.int64, torch.complex64])
def test_predictions_are_floating_point_numbers(kind):
    with pytest.raises(InputError, match=f"must return floating point numbers, got {kind}"):
        sw.sample(sw.flow(lambda x, t: x.to(kind), (2,)), None, 1)


def test_a_prediction_in_another_format_leaves_rows_in_the_flows_own():
    process = sw.flow(lambda x, t: to_one(x, t).double(), (2,), solver="sde-flow", steps=4)
    rows = rollout(process, [Request(Prompt(0, None), 3)], Rng(0)).trajectories
    assert rows.action.dtype == torch.float32
    assert torch.equal(process.score(rows).log_prob, rows.log_prob)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_a_half_precision_network_moves_states_of_single_precision(kind):
    """An update's change of the mean, smaller than bfloat16's spacing of the states, is in the density nevertheless."""
    process = sw.flow(Net().to(kind), (2,), solver="sde-flow", steps=10)
    rows = rollout(process, [Request(Prompt(0, None), 16)], Rng(0)).trajectories
    assert process.dtype == rows.action.dtype == torch.float32
    wide = sw.flow(Net().to(kind).float(), (2,), solver="sde-flow", steps=10)
    states = rows.action.to(kind).to(torch.float32)
    spacing = float((states - rows.action).abs().max())
    scale = float(wide.score(rows, ("deviation",))["deviation"][rows.mask].min())
    assert spacing > 0.01 * scale  # what half precision states would be off by, in deviations of a step
    mean, exact = (each.score(rows, ("mean",))["mean"][rows.mask] for each in (process, wide))
    bound = 0.2 * torch.finfo(kind).eps * float(rows.action.abs().max() + 1)
    assert float((mean - exact).detach().abs().max()) < bound
    assert sw.flow(Net().to(kind), (2,), dtype=kind).dtype == kind  # as asked


def bright(completions):
    return torch.stack([value.mean() for value in completions])


@pytest.mark.parametrize("method", ["draft-k", "flow-grpo", "diffusion-nft", "euphonium"])
@pytest.mark.parametrize("cut", [torch.Tensor.detach, torch.no_grad()(lambda x: x * 1)], ids=["detach", "no_grad"])
def test_a_network_that_gives_no_gradient_is_refused(method, cut):
    with pytest.raises(InputError, match="prediction carries no gradient, so its parameters cannot learn"):
        sw.train(sw.flow(Net(cut), (2,)), [None], bright, method, steps=1, prompts_per_step=1, group_size=2)


@pytest.mark.parametrize("method", ["draft-k", "draft-lv", "implicit-diffusion", "euphonium"])
def test_a_decode_that_gives_no_gradient_is_named_and_not_the_reward(method):
    process = sw.flow(Net(), (2,), decode=lambda x: x.detach())
    with pytest.raises(RewardError, match="the network or the flow's `decode`"):
        sw.train(process, [None], bright, method, steps=1, prompts_per_step=1, group_size=2)


@pytest.mark.parametrize("method", ["draft-k", "implicit-diffusion", "euphonium"])
def test_a_reward_with_a_gradient_that_is_not_the_samples_is_refused(method):
    weight = torch.ones((), requires_grad=True)

    def apart(completions):
        return torch.stack([weight * 1.0 for _ in completions])

    with pytest.raises(RewardError, match="not depend on the samples"):
        sw.train(sw.flow(Net(), (2,)), [None], apart, method, steps=1, prompts_per_step=1, group_size=2)


def test_a_gradient_of_the_reward_that_is_not_finite_guides_nothing():
    def rooted(completions):
        return torch.stack([(0 * value).sum().sqrt() for value in completions])

    with pytest.raises(RewardError, match="which guides the rollout, has values that are NaN"):
        sw.train(sw.flow(Net(), (2,)), [None], rooted, "euphonium", steps=1, prompts_per_step=1, group_size=2)


def test_a_frozen_twin_may_be_scored_with_gradients_on():
    process = sw.flow(Net(), (2,), solver="sde-flow", steps=4)
    rows = rollout(process, [Request(Prompt(0, None), 3)], Rng(0)).trajectories
    assert not process.frozen().score(rows).log_prob.requires_grad
    assert process.score(rows).log_prob.requires_grad


@pytest.mark.parametrize("method", ["tempflow-grpo", "g2rpo"])
def test_children_that_have_no_sibling_are_refused(method):
    with pytest.raises(InputError, match="must be at least 2 for GroupCredit, which compares"):
        sw.train(sw.flow(Net(), (2,)), [None], bright, method, steps=1, group_size=1)


@pytest.mark.parametrize("method", ["ddpo-sf", "ddpo-is", "loop", "b2-diffurl", "ctrl", "spo", "g2rpo", "flow-grpo"])
def test_a_method_of_random_steps_refuses_a_sampler_that_has_none(method):
    with pytest.raises(InputError):
        sw.train(sw.flow(Net(), (2,)), [None], bright, method, options={"steps": 1}, steps=1)
    with pytest.raises(InputError, match="steps must be at least 6, got 5: this method trains 5 random steps"):
        sw.methods.get("g2rpo").recipe(steps=5, branches=5)
