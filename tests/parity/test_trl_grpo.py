"""TRL 1.16's GRPO trainer and ours give the same loss and slopes, option by option, in float64."""

from __future__ import annotations

import collections
import contextlib
import itertools
import os
from types import SimpleNamespace

import pytest
import torch

os.environ |= {"TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_OFFLINE": "1"}
pytest.importorskip("trl", minversion="1.16", reason="TRL 1.16 is what these losses are held against")

from trl.experimental.gmpo.gmpo_trainer import GMPOTrainer
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.rloo_trainer import RLOOTrainer
from trl.trainer.utils import nanstd

from stepwell.batch import Batch
from stepwell.credit.columns import RewardColumn
from stepwell.credit.group import GroupCredit
from stepwell.errors import InputError, UnknownName
from stepwell.methods.catalogue import get
from stepwell.methods.language.trl import MODES, REDUCTIONS
from stepwell.objective.term import Objective
from stepwell.process.base import Scores
from stepwell.rng import Rng
from stepwell.trajectories import count, make

EXACT = 1e-10
ROWS, STEPS, HORIZON = 12, 9, 11
LENGTH = torch.tensor([9, 3, 5, 1, 4, 6, 9, 7, 2, 8, 5, 9])
MASK = torch.arange(STEPS) < LENGTH[:, None]
MASK = MASK & ~((torch.arange(STEPS) == 1) & (LENGTH > 5)[:, None])  # a tool's word: it happened, and is not trained
PROMPT = torch.arange(ROWS) // 4
REWARD = Rng(9).normal(ROWS, dtype=torch.float64)


def field(seed, size, around=None):
    """(N, T) log-probabilities, `size` away from others."""
    away = size * (2 * Rng(seed).uniform(ROWS, STEPS, dtype=torch.float64) - 1)
    return (away - 2.0 if around is None else around + away) * MASK


OLD = field(1, 1.0)
PRESENT, SAMPLER, REFERENCE = field(2, 0.6, OLD), field(3, 0.5, OLD), field(4, 0.8, OLD)
ENTROPY = (0.1 + Rng(5).uniform(ROWS, STEPS, dtype=torch.float64)) * MASK
LOSSES = list(REDUCTIONS)
LEVELS = ["token", "sequence"]


class OneProcess:
    """What TRL asks of accelerate, for one process."""

    device = torch.device("cpu")
    num_processes = 1
    sync_gradients = True
    gather = staticmethod(lambda x: x)
    gather_for_metrics = staticmethod(lambda x: x)
    reduce = staticmethod(lambda x, reduction="sum": x)
    pad_across_processes = staticmethod(lambda x, dim, pad_index: x)


@contextlib.contextmanager
def double():
    """TRL makes some of its constants tensors of the default kind, 4/3 among them: float32, 1e-8 off, otherwise."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@double()
def advantages(scale="group"):
    """TRL's lines on rewards, with its own deviation."""
    groups = REWARD.view(-1, 4)
    centred = REWARD - groups.mean(1).repeat_interleave(4)
    spread = {"group": nanstd(groups, dim=1).repeat_interleave(4), "batch": nanstd(REWARD), "none": torch.ones(())}
    return centred if scale == "none" else centred / (spread[scale] + 1e-4)


@double()
def theirs(trainer=GRPOTrainer, sampler=False, scale_rewards="group", **options):
    """TRL's loss and its slopes in log-probabilities and entropies."""
    settings = {
        "loss_type": "dapo",
        "importance_sampling_level": "token",
        "epsilon": 0.2,
        "epsilon_high": None,
        "delta": None,
        "beta": 0.0,
        "use_bias_correction_kl": True,
        "top_entropy_quantile": 1.0,
        "entropy_coef": 0.0,
        "off_policy_mask_threshold": None,
        "vllm_importance_sampling_mode": None,
        "vllm_importance_sampling_clip_max": 3.0,
        **options,
    }
    leaf, entropy = PRESENT.clone().requires_grad_(), ENTROPY.clone().requires_grad_()
    mode = settings["vllm_importance_sampling_mode"]
    shapes = {"sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.05}
    shapes |= {"vespo_k_pos": 2.0, "vespo_lambda_pos": 3.0, "vespo_k_neg": 3.0, "vespo_lambda_neg": 2.0}
    stub = SimpleNamespace(
        accelerator=OneProcess(),
        model=SimpleNamespace(training=True),
        args=SimpleNamespace(steps_per_generation=1, **{**settings, **shapes}),
        aux_loss_enabled=False,
        epsilon_low=settings["epsilon"],
        use_adaptive_entropy=False,
        use_vllm=mode is not None,
        vllm_importance_sampling_correction=True,
        _entropy_bonus_enabled=settings["entropy_coef"] != 0,
        current_gradient_accumulation_steps=1,
        max_completion_length=HORIZON,
        _metrics={"train": collections.defaultdict(list)},
        **{name: value for name, value in settings.items() if name not in ("epsilon", "epsilon_high")},
    )
    stub.epsilon_high = settings["epsilon"] if settings["epsilon_high"] is None else settings["epsilon_high"]
    stub._get_per_token_logps_and_entropies = lambda *_, **__: (leaf, entropy, None)
    for name in ("get_off_policy_mask", "get_gamma_weights"):
        setattr(stub, name, getattr(GRPOTrainer, name))
    stub.get_high_entropy_mask = lambda *given: GRPOTrainer.get_high_entropy_mask(stub, *given)
    inputs = {
        "prompt_ids": torch.zeros(ROWS, 1, dtype=torch.long),
        "prompt_mask": torch.ones(ROWS, 1, dtype=torch.long),
        "completion_ids": torch.zeros(ROWS, STEPS, dtype=torch.long),
        "completion_mask": (torch.arange(STEPS) < LENGTH[:, None]).long(),
        "tool_mask": MASK.long(),
        "advantages": advantages(scale_rewards),
        "old_per_token_logps": OLD,
        "old_logps": OLD.sum(1),
        "ref_per_token_logps": REFERENCE,
        "num_items_in_batch": MASK.sum(),
    }
    if sampler or mode:
        inputs["sampling_per_token_logps"] = SAMPLER
    if mode:
        inputs["importance_sampling_ratio"] = correction(mode, settings["vllm_importance_sampling_clip_max"])
    if trainer is RLOOTrainer:  # it knows no tools, so that their words are not its own
        inputs["completion_mask"] = MASK.long()
    value = trainer._compute_loss(stub, stub.model, inputs)
    slopes = torch.autograd.grad(value, (leaf, entropy), allow_unused=True)
    return value.detach(), slopes[0], torch.zeros_like(entropy) if slopes[1] is None else slopes[1]


def correction(mode, maximum):
    """TRL's factor, as its lines before the loss have it: of steps (N, T) or rows (N, 1), cut or dropped."""
    difference = (OLD - SAMPLER) * MASK
    rho = (difference.sum(1, keepdim=True) if mode.startswith("sequence") else difference).exp()
    return rho.clamp(max=maximum) if mode.endswith("truncate") else rho.masked_fill(rho > maximum, 0.0)


def ours(objective, sampler=False):
    """Our loss and its slopes on the same rows."""
    objective = objective if isinstance(objective, Objective) else Objective((objective,))
    leaf, entropy = PRESENT.clone().requires_grad_(), ENTROPY.clone().requires_grad_()
    fields = {"reward": REWARD, "prompt": PROMPT, "length": LENGTH}
    fields |= {"reference_log_prob": REFERENCE, "old_log_prob": OLD}
    drawn = SAMPLER if sampler else OLD
    rows = make(torch.zeros(MASK.shape, dtype=torch.long), drawn, MASK, **fields)
    scores, counts = Scores(leaf, {"entropy": entropy}), count(rows, HORIZON)
    plan = objective.plan(Batch(rows, counts, scores.detach()))
    value = objective.loss(Batch(rows, counts, scores), plan).value
    slopes = torch.autograd.grad(value, (leaf, entropy), allow_unused=True)
    return value.detach(), slopes[0], torch.zeros_like(entropy) if slopes[1] is None else slopes[1]


def apart(one, two):
    """The largest difference in loss or slope; padding and tools' words have none that counts."""
    return max(float(((a - b) * (MASK if a.dim() else 1)).abs().max()) for a, b in zip(one, two, strict=True))


def both(sampler=False, **options):
    found = ours(get("trl-grpo").recipe(**options).whole, sampler or "vllm_importance_sampling_mode" in options)
    return found, theirs(sampler=sampler, **options)


def clipping(loss):
    """Options under which many steps are clipped, for each loss type."""
    if loss in ("sapo", "vespo"):
        return {}
    return {"epsilon_high": 1.1} if loss == "cispo" else {"epsilon": 0.05, "epsilon_high": 0.08}


WAYS = {
    "plain": {},
    "kl": {"beta": 0.3},
    "kl without bias correction": {"beta": 0.3, "use_bias_correction_kl": False},
    "off-policy mask": {"off_policy_mask_threshold": 0.02, "sampler": True},
    "off-policy mask against the old policy": {"off_policy_mask_threshold": 0.02},
    "entropy bonus": {"entropy_coef": 0.07},
    "entropy quantile": {"top_entropy_quantile": 0.4},
    "entropy quantile and bonus": {"top_entropy_quantile": 0.4, "entropy_coef": 0.07},
    **{mode: {"vllm_importance_sampling_mode": mode, "vllm_importance_sampling_clip_max": 1.2} for mode in MODES},
    "all at once": {
        "beta": 0.3,
        "off_policy_mask_threshold": 0.02,
        "entropy_coef": 0.07,
        "top_entropy_quantile": 0.6,
        "vllm_importance_sampling_mode": "token_mask",
        "scale_rewards": "batch",
    },
}


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("way", WAYS)
def test_every_loss_type_at_every_level_is_that_of_trl(loss, level, way):
    options = {"loss_type": loss, "importance_sampling_level": level, **clipping(loss), **WAYS[way]}
    if loss == "vespo" and way.startswith("sequence"):
        with pytest.raises(InputError, match="token by token"):  # as TRL refuses it
            get("trl-grpo").recipe(**options)
        return
    found, expected = both(**options)
    assert float(expected[1].abs().max()) > 1e-3
    assert apart(found, expected) < EXACT


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss", [name for name in LOSSES if name not in ("sapo", "vespo", "cispo")])
def test_two_sided_clipping_is_that_of_trl(loss, level):
    options = {"loss_type": loss, "importance_sampling_level": level, "epsilon": 0.01}
    ratio = (PRESENT - OLD) if level == "token" else (PRESENT - OLD).sum(1, keepdim=True) / MASK.sum(1, keepdim=True)
    bad = (advantages() < 0)[:, None]
    delta = (1.01 + float(ratio[bad.expand_as(ratio)].exp().max())) / 2  # some of the bad steps are beyond it
    found, expected = both(delta=delta, **options)
    assert apart(found, expected) < EXACT
    assert apart(expected, theirs(**options)) > 1e-6


@pytest.mark.parametrize(("loss", "level"), list(itertools.product(LOSSES, LEVELS)))
def test_clipping_and_every_option_is_at_work_in_these_comparisons(loss, level):
    base = {"loss_type": loss, "importance_sampling_level": level}
    free = {"epsilon_high": 1e9} if loss == "cispo" else {"epsilon": 1e9} if clipping(loss) else None
    tight = theirs(**base, **clipping(loss))
    assert free is None or apart(theirs(**base, **free), tight) > 1e-4
    for way, options in WAYS.items():
        if options and not (loss == "vespo" and way.startswith("sequence")):
            assert apart(theirs(**base, **clipping(loss), **options), tight) > 1e-6, way


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_are_those_of_trl(scale):
    found, expected = both(scale_rewards=scale)
    assert apart(found, expected) < EXACT


def test_rewards_that_are_normalised_one_by_one_are_a_composition():
    each = Rng(7).normal(ROWS, 2, dtype=torch.float64)
    groups = each.view(-1, 4, 2)
    with double():  # TRL's normalize_then_sum
        single = ((groups - groups.mean(1, keepdim=True)) / (nanstd(groups, dim=1, keepdim=True) + 1e-4)).view(-1, 2)
        total = (single * torch.tensor([0.3, 1.7])).sum(1)
        expected = (total - total.mean()) / (nanstd(total) + 1e-4)
    parts = [GroupCredit("mean", "std", reward=RewardColumn(number)) for number in (0, 1)]
    credit = GroupCredit("batch", "batch-std", reward=0.3 * parts[0] + 1.7 * parts[1])
    rows = make(torch.zeros(MASK.shape, dtype=torch.long), OLD, MASK, reward=REWARD, rewards=each, prompt=PROMPT)
    assert float((credit(Batch(rows, count(rows))) - expected).abs().max()) < EXACT


METHODS = {
    "grpo": ({"kl": 0.3, "semantics": "trl"}, {"loss_type": "grpo", "beta": 0.3}),
    "bnpo": ({"kl": 0.3, "semantics": "trl"}, {"loss_type": "bnpo", "beta": 0.3}),
    "dr-grpo": ({}, {"loss_type": "dr_grpo", "scale_rewards": "none"}),
    "dapo": ({"buffer": 0.0, "low": 0.1, "high": 0.14}, {"loss_type": "dapo", "epsilon": 0.1, "epsilon_high": 0.14}),
    "two-sided-clip": ({"clip": 0.1, "delta": 1.3}, {"loss_type": "grpo", "epsilon": 0.1, "delta": 1.3}),
    "gspo": (
        {"low": 0.03, "high": 0.04},
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.03, "epsilon_high": 0.04},
    ),
    "luspo": (
        {"low": 0.03, "high": 0.04},
        {"loss_type": "luspo", "importance_sampling_level": "sequence", "epsilon": 0.03, "epsilon_high": 0.04},
    ),
    "cispo": ({"maximum": 1.2}, {"loss_type": "cispo", "epsilon_high": 1.2}),
    "sapo": ({}, {"loss_type": "sapo"}),
    "vespo": ({"semantics": "trl"}, {"loss_type": "vespo"}),
    "off-policy-masking": ({"threshold": 0.02}, {"loss_type": "grpo", "off_policy_mask_threshold": 0.02}),
    "tis": ({"cap": 1.2, "mask": True}, {"vllm_importance_sampling_mode": "token_mask"}),
}


@pytest.mark.parametrize("name", METHODS)
def test_the_methods_are_trls_loss_types(name):
    options, theirs_ = METHODS[name]
    if name == "tis":
        theirs_ = {**theirs_, "vllm_importance_sampling_clip_max": 1.2}
    sampled = name in ("tis", "off-policy-masking")
    expected = theirs(sampler=sampled, **theirs_)
    assert apart(ours(get(name).recipe(**options).whole, sampled), expected) < EXACT
    if "semantics" in options and name != "vespo":  # vespo's bound of 20 is far away here
        assert apart(ours(get(name).recipe(**{**options, "semantics": "paper"}).whole), expected) > 1e-4


@pytest.mark.parametrize("kl", [0.0, 0.3])
def test_gmpo_is_that_of_trl(kl):
    recipe = get("gmpo").recipe(low=0.1, high=0.15)
    objective = recipe.whole
    if kl:
        objective = objective + get("grpo").recipe(kl=kl).whole.terms[1]
    expected = theirs(GMPOTrainer, epsilon=0.1, epsilon_high=0.15, beta=kl)
    assert apart(ours(objective), expected) < EXACT
    assert apart(expected, theirs(GMPOTrainer, epsilon=1e9, beta=kl)) > 1e-4


def test_rloo_is_that_of_trl():
    mean = (REWARD.view(-1, 4).sum(1).repeat_interleave(4) - REWARD) / 3

    def leave_one_out(scale):
        return REWARD - mean

    expected = swapped(leave_one_out, lambda: theirs(RLOOTrainer, epsilon=0.2))
    assert apart(ours(get("rloo").recipe().whole), expected) < EXACT


def swapped(other, work):
    """Something done with other advantages."""
    kept = globals()["advantages"]
    globals()["advantages"] = other
    try:
        return work()
    finally:
        globals()["advantages"] = kept


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"loss_type": "dr-grpo"}, "did you mean 'dr_grpo'"),
        ({"importance_sampling_level": "turn"}, "importance_sampling_level"),
        ({"loss_type": "sapo", "epsilon": 0.3}, "epsilon must be left out with loss_type=sapo"),
        ({"loss_type": "vespo", "delta": 4.0}, "delta must be left out with loss_type=vespo"),
        ({"loss_type": "cispo"}, "epsilon_high must be given"),
        ({"vllm_importance_sampling_mode": "mask"}, "did you mean 'token_mask'"),
        ({"vllm_importance_sampling_clip_max": 2.0}, "clip_max must be left out without"),
        ({"scale_rewards": "std"}, "scale_rewards"),
    ],
)
def test_what_trl_would_ignore_or_not_know_is_refused(options, said):
    with pytest.raises((InputError, UnknownName), match=said):
        get("trl-grpo").recipe(**options)
