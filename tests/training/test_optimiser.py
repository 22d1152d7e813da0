"""Parameters in half precision learn as float32 ones do: each is the rounding of a master that takes every step."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import stepwell as sw
from stepwell import methods
from stepwell.check.tolerance import products, rounding
from stepwell.data.prompts import load_prompts
from stepwell.reward.mixing import Rewards
from stepwell.training import checkpoint
from stepwell.training.loop import Trainer
from stepwell.training.optimiser import MasterAdamW, make_optimiser
from stepwell.training.settings import Settings
from stepwell.training.state import begin

HALF = (torch.bfloat16, torch.float16)
TEXTS = ["a b c d e", "f", "g h"]


def drawn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def parameters(dtype):
    """A matrix, a scale and one that is in float32 anyway, as a value head's are."""
    return [
        nn.Parameter(0.05 * drawn(4, 3, seed=1, dtype=dtype)),
        nn.Parameter(1.0 + drawn(3, seed=2, dtype=dtype)),
        nn.Parameter(drawn(2, seed=3)),
    ]


def walk(optimiser, learning, dtype, steps, first=0):
    """Steps with given gradients at changing rates; now and then a parameter has none."""
    for step in range(first, first + steps):
        optimiser.zero_grad(set_to_none=bool(step % 2))
        for place, parameter in enumerate(learning):
            if (step + place) % 5:
                gradient = drawn(*parameter.shape, seed=10 * step + place, dtype=dtype)
                parameter.grad = gradient.to(parameter.dtype)
        for group in optimiser.param_groups:
            group["lr"] = 1e-6 * (1 + step % 3)
        optimiser.step()


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("dtype", HALF)
def test_a_half_trajectory_is_the_rounding_of_the_float32_one(dtype, decay):
    half = parameters(dtype)
    single = [nn.Parameter(p.detach().float()) for p in half]
    ours = make_optimiser(half, Settings(weight_decay=decay))
    torchs = torch.optim.AdamW(single, lr=1e-6, weight_decay=decay)
    for first in range(0, 60, 20):
        walk(ours, half, dtype, 20, first)
        walk(torchs, single, dtype, 20, first)
        for one, other, master in zip(half, single, ours.masters, strict=True):
            assert torch.equal(master, other)
            assert torch.equal(one, other.to(one.dtype))
    assert not torch.equal(half[0], parameters(dtype)[0])


def test_without_masters_most_steps_at_the_default_rate_are_lost():
    """The fault that masters mend: AdamW on bfloat16 leaves parameters of a usual size where they are."""
    plain, ours = ([nn.Parameter(0.05 * drawn(1000, dtype=torch.bfloat16))] for _ in range(2))
    before = plain[0].detach().clone()
    for learning, kind in ((plain, torch.optim.AdamW), (ours, MasterAdamW)):
        optimiser = kind(learning, lr=Settings().learning_rate)
        for _ in range(300):
            learning[0].grad = torch.ones_like(before)
            optimiser.step()
    assert float((plain[0] != before).float().mean()) < 0.1
    assert float((ours[0] != before).float().mean()) > 0.8


def test_float32_parameters_are_their_own_masters():
    single = parameters(torch.float32)
    ours = make_optimiser(single, Settings())
    assert all(master is parameter for master, parameter in zip(ours.masters, single, strict=True))
    walk(ours, single, torch.float32, 3)
    assert single[0].grad is not None
    assert {name for entry in ours.state_dict()["state"].values() for name in entry} == {
        "step",
        "exp_avg",
        "exp_avg_sq",
    }


def test_gradients_of_half_parameters_are_added_up_in_float32():
    """In bfloat16 256 ones are as many as can be counted: the next one is rounded away."""
    parameter = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    optimiser = MasterAdamW([parameter])
    for _ in range(1000):
        parameter.sum().backward()
        optimiser.gather()
    assert parameter.grad is None
    assert optimiser.masters[0].grad.tolist() == [1000.0, 1000.0]
    optimiser.zero_grad(set_to_none=False)
    assert optimiser.masters[0].grad is None


def test_a_closure_is_called_once_and_its_gradients_are_taken():
    parameter = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    optimiser = MasterAdamW([parameter], lr=0.5, weight_decay=0.0)

    def loss():
        value = parameter.sum()
        value.backward()
        return value

    assert optimiser.step(loss).item() == 2.0
    assert parameter.tolist() == [0.5, 0.5]


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("steps", [0, 3])
def test_a_stored_optimiser_goes_on_bit_for_bit(dtype, steps, tmp_path):
    half = parameters(dtype)
    ours = make_optimiser(half, Settings())
    walk(ours, half, dtype, steps)
    groups = {"optimiser": checkpoint.optimiser_tensors(ours), "parameters": dict(zip("abc", half, strict=True))}
    checkpoint.write(tmp_path / "update-1", {}, groups)
    _, stored = checkpoint.read(tmp_path / "update-1")
    again = [nn.Parameter(torch.zeros_like(p)) for p in half]
    theirs = make_optimiser(again, Settings())
    with torch.no_grad():
        for name, parameter in zip("abc", again, strict=True):
            parameter.copy_(stored["parameters"][name])
    checkpoint.load_optimiser(theirs, stored["optimiser"])
    for place, one in enumerate(ours.masters[:2]):
        assert torch.equal(one, theirs.masters[place])
    walk(ours, half, dtype, 40, steps)
    walk(theirs, again, dtype, 40, steps)
    assert all(torch.equal(one, other) for one, other in zip(half, again, strict=True))


def long(completions, **columns):
    return [float(len(text)) for text in completions]


def train(process, out=None, resume=False, **settings):
    given = {"steps": 4, "prompts_per_step": 3, "group_size": 4, "learning_rate": 1e-4, "weight_decay": 0.1}
    given |= {"checkpoint_every": 1, "keep": 1000, "seed": 1, "tokens_per_microbatch": 40}
    return sw.train(process, TEXTS, long, "ppo", out=out, resume=resume, **{**given, **settings})


def weights(run):
    return [p.detach().clone() for p in run.process.module.parameters()]


@pytest.mark.parametrize("master", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_resumed_run_in_bfloat16_is_the_whole_run(master, tmp_path, small_language, monkeypatch):
    """And it is not where masters are not in the checkpoint."""
    process = lambda: small_language(max_new_tokens=5, dtype="bfloat16")  # noqa: E731
    if not master:
        monkeypatch.setattr(MasterAdamW, "state_dict", torch.optim.AdamW.state_dict)
    whole = weights(train(process(), tmp_path / "whole"))
    train(process(), tmp_path / "cut", steps=2)
    resumed = weights(train(process(), tmp_path / "cut", resume=True))
    assert whole[0].dtype == torch.bfloat16
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True)) == master


@pytest.mark.parametrize("adapter", [True, False])
def test_training_in_bfloat16_moves_what_training_in_float32_moves(adapter, small_language):
    """At the default rate every parameter with a gradient that is not zero moves, if only in its master."""
    lora = {"r": 4, "target_modules": "all-linear"} if adapter else None
    process = small_language(max_new_tokens=5, dtype="bfloat16", lora=lora)
    settings = Settings(steps=1, prompts_per_step=3, group_size=4)
    made = Trainer(begin(process, methods.get("grpo").recipe(), load_prompts(TEXTS), Rewards(long), settings))
    masters = made.state.optimiser.masters
    assert {master.dtype for master in masters} == {torch.float32}
    before = [master.detach().clone() for master in masters]
    made.collect()
    made.update()
    moments = [made.state.optimiser.state[master].get("exp_avg") for master in masters]
    learnt = [moment != 0 for moment in moments if moment is not None]
    moved = [now != then for now, then, moment in zip(masters, before, moments, strict=True) if moment is not None]
    assert sum(int(found.sum()) for found in learnt) > 100
    share = sum(int((a & b).sum()) for a, b in zip(moved, learnt, strict=True)) / sum(int(a.sum()) for a in learnt)
    assert share > 0.99
    for parameter, master in zip(made.state.learning.values(), masters, strict=True):
        assert torch.equal(parameter, master.to(parameter.dtype))


def test_adapters_in_half_precision_have_masters(make_model, make_tokenizer):
    from peft import LoraConfig, get_peft_model

    base = make_model("qwen2").to(torch.bfloat16)
    adapted = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=4), autocast_adapter_dtype=False)
    learning = [p for p in adapted.parameters() if p.requires_grad]
    assert {p.dtype for p in learning} == {torch.bfloat16}
    assert {master.dtype for master in make_optimiser(learning, Settings()).masters} == {torch.float32}


@pytest.mark.parametrize("micro", [None, 30])
@pytest.mark.parametrize("old", ["rollout", "recomputed"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_first_update_begins_at_ratio_one_in_any_precision(dtype, old, micro, small_language):
    process = small_language(max_new_tokens=6, dtype=dtype)
    settings = Settings(steps=1, prompts_per_step=3, group_size=4, tokens_per_microbatch=micro)
    recipe = methods.get("grpo").recipe().replace(old=old)
    made = Trainer(begin(process, recipe, load_prompts(TEXTS), Rewards(long), settings))
    made.collect()
    largest = 1 + float(made.at.drawn.trajectories.log_prob.abs().max())
    made.update()
    differ = rounding(torch.float32, products(process.module)) * largest  # half precision learns from what it scored
    assert made.at.metrics["old_kl"] <= differ**2  # its estimator is about half the square of a log-ratio
    assert made.at.metrics["clip_fraction"] == 0.0
