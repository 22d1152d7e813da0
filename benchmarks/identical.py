"""Trains every method shortly, writes down what came out, and compares it bit for bit with another commit's.

    PYTHONPATH=A/src python benchmarks/identical.py --out a.json
    PYTHONPATH=B/src python benchmarks/identical.py --against a.json

The second line prints every run that differs from the first commit's and what in it does (the weights, the name of the
first metric, a cost), and how many are the same; it exits with 1 where any differs. `--only resume sample` runs the
cases whose names begin so. Both have to run on one machine, with the same packages.

`method/ID`     two steps with every registered method, on a table of strings or a small flow
`updates/ID`    the same with three epochs of two minibatches and long steps, so that clips bite
`option/...`    methods with other options than their own
`language/...`  a small Llama of `transformers`: critics, adapters, references, precision, conversations, ...
`pipeline/...`  small pipelines of `diffusers`
`resume/...`    a run that goes on from a checkpoint, which has to end as the run that never stopped
`sample/...`    samples of flows by every solver, of tables, of language models and of pipelines

It was written to hold a change of the source's layout against the commit before it, so it asks for nothing but the
package's front door, and knows the ways in which that door was rebuilt: `trained`, `kinds_of` and `conversation`.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import inspect
import json
import os
import shutil
import string
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "DIFFUSERS_VERBOSITY": "error"}
os.environ |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false"}

import torch
from torch import Tensor, nn

import stepwell as sw

Record = dict[str, Any]
Case = Callable[[], Record]

# what is written down


def content(values: Iterable[Any]) -> str:
    """The hash of tensors, bit for bit with their type and shape, and of anything else by what it prints as."""
    digest = hashlib.sha256()
    for value in values:
        if isinstance(value, Tensor):
            digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            digest.update(f"{value!r};".encode())
    return digest.hexdigest()


def weights(module: nn.Module) -> str:
    """The hash of all parameters in the order of their names."""
    return content(value for _, value in sorted(module.named_parameters(), key=lambda entry: entry[0]))


def number(value: Any) -> str:
    """A number to its last digit."""
    return repr(float(value)) if isinstance(value, int | float | Tensor) else str(value)


def cost(spent: Any) -> dict[str, str]:
    """What was spent, without the time."""
    return {unit: number(amount) for unit, amount in vars(spent).items() if unit != "wall_time"}


def record(run: Any) -> Record:
    """What came out of a run: its weights, every metric of every step that is no time, and its cost."""
    steps = [
        {name: number(value) for name, value in step.items() if "wall_time" not in name and "seconds" not in name}
        for step in run.history
    ]
    return {"weights": weights(run.process.module), "metrics": steps, "cost": cost(run.cost)}


# ways in which the package's front door was rebuilt


def registry() -> Any:
    """The module that lists methods and knows their cards."""
    for place in ("stepwell.methods", "stepwell.methods.registry", "stepwell.registry", "stepwell.recipes"):
        try:
            module = importlib.import_module(place)
        except ImportError:
            continue
        if hasattr(module, "names") and hasattr(module, "get"):
            return module
    raise ImportError("This Stepwell has no list of methods at any known place.")


@cache
def cards() -> dict[str, Any]:
    """The cards of all methods by id."""
    return {method: registry().get(method) for method in registry().names()}


def kinds_of(card: Any) -> str:
    """The kinds of processes that a method is for, in words: once a card's `room`, then its `processes`."""
    kinds = getattr(card, "processes", None) or getattr(card, "room", "language")
    kinds = [kinds] if isinstance(kinds, str) else kinds
    return " ".join(getattr(kind, "__name__", str(kind)).lower() for kind in kinds)


def trained(
    process: Any, prompts: Sequence[Any], reward: Any, method: Any, teacher: Any = None, **settings: Any
) -> Any:
    """A run; a teacher was once an attribute of the process, and then an argument."""
    if teacher is not None and "teacher" in inspect.signature(sw.train).parameters:
        settings["teacher"] = teacher
    elif teacher is not None:
        process.teacher = teacher
    return sw.train(process, prompts, reward, method=method, **settings)


def conversation(model: Any, environment: Any, **settings: Any) -> Any:
    """A model that talks to environments: once by its method `turns`, then by `sw.conversation`."""
    if hasattr(sw, "conversation"):
        return sw.conversation(model, environment, **settings)
    return model.turns(environment, **settings)


# every method, on the smallest process that it trains

TAUGHT = ("gkd", "kdrl", "on-policy-distillation", "pre-dpo", "tgdpo")
"""The methods that learn from a teacher."""

OPTIONS: dict[str, list[dict[str, Any]]] = {
    "dpo": [
        *({"loss": loss} for loss in ("hinge", "ipo")),
        *({"divergence": divergence} for divergence in ("forward-kl", "js")),
        {"pairs": "all"},
        {"pairs": "mean", "smoothing": 0.2, "weighted": True, "tail": 0.5},
    ],
    "bnpo": [{"semantics": "trl", "kl": 0.1}],
    "cispo": [{"semantics": "verl"}],
    "clip-cov": [{"fraction": 0.2, "low": 0.0}],
    "copo": [{"column": 1}],
    "dapo": [{"semantics": "verl"}],
    "d3s": [{"updates": 1}],
    "diffusion-dpo": [{"beta": 10.0}],
    "dr-grpo": [{"length": 7}],
    "dual-clip": [{"c": 1.05}],
    "flow-dppo": [{"threshold": 1e-6}],
    "flow-grpo": [{"window": 3, "noise": "cps"}],
    "gkd": [{"beta": 0.0}, {"beta": 1.0}, {"top": 2}, {"scaled": True}],
    "grpo": [{"epsilon": 1e-4, "kl": 0.05}, *({"semantics": name, "kl": 0.1} for name in ("trl", "verl"))],
    "gspo": [{"semantics": "verl"}],
    "ipo": [{"semantics": "trl"}],
    "iterative-dpo": [{"reference": "synced"}],
    "kdrl": [{"failing": True, "estimate": "k3"}],
    "mix-grpo": [{"schedule": "random", "flash": 0.5}],
    "kl-cov": [{"fraction": 0.2}],
    "m2po": [{"threshold": 1e-3}],
    "off-policy-masking": [{"threshold": 0.01}],
    "on-policy-distillation": [{"to_go": True}, {"front": 0.5}],
    "ppo": [{"entropy": 0.1, "kl": 0.05}, {"semantics": "verl", "kl": 0.1}],
    "raft": [{"keep": "above-mean"}],
    "rec-ring": [{"far_low": 0.25, "far_high": 1.25}],
    "rloo": [{"semantics": "verl", "kl": 0.1}],
    "spo": [{"go_on": "best"}],
    "steer": [{"exact": True}],
    "stratified-grpo": [{"column": 1}],
    "tis": [{"sequence": True}, {"mask": True}],
    "topr": [{"baseline": 0.5}],
    "treepo": [{"segment": 2}],
    "trl-grpo": [
        *({"loss_type": kind} for kind in ("grpo", "bnpo", "dr_grpo", "sapo")),
        {"loss_type": "cispo", "epsilon_high": 5.0},
        {"importance_sampling_level": "sequence", "beta": 0.1, "scale_rewards": "batch"},
        {"top_entropy_quantile": 0.5, "entropy_coef": 0.1, "epsilon_high": 0.28, "delta": 3.5},
        {"off_policy_mask_threshold": 0.5, "vllm_importance_sampling_mode": "token_mask"},
    ],
    "turn-ppo": [{"product": True}],
    "two-sided-clip": [{"delta": 1.25}],
    "vespo": [{"semantics": "trl"}],
    "vineppo": [{"segment": 2, "vines": 2}],
}
"""Options besides the ones that many methods share, which `options_of` tries wherever they are."""

STRINGS = [{"prompt": i, "hinted": 3, "demonstration": [2, 1, 0]} for i in range(4)]


def weighed(completions: Sequence[Sequence[int]], prompts: Sequence[int], **columns: Any) -> list[float]:
    """Symbols weighed by their place, modulo 5; prompt 0 is hardly ever paid for, so that some groups fail."""
    pairs = zip(completions, prompts, strict=True)
    return [
        float(sum((i + 2) * s for i, s in enumerate(text)) % 5 / 4 if prompt else text[:2] == (2, 1))
        for text, prompt in pairs
    ]


def odd(completions: Sequence[Sequence[int]], prompts: Sequence[int], **columns: Any) -> list[float]:
    """Whether the symbols add up to an odd number; nothing for prompt 0."""
    return [float(sum(text) % 2 and prompt > 0) for text, prompt in zip(completions, prompts, strict=True)]


def near(completions: Sequence[Tensor], **columns: Any) -> Tensor:
    """Minus the squared distance to (1, -1/2), which gradients pass through."""
    points = torch.stack(list(completions))
    return -(points - points.new_tensor([1.0, -0.5])).square().sum(1)


class Velocity(nn.Module):
    """A small velocity of two numbers, their time and a label."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor, time: Tensor, label: Tensor) -> Tensor:
        inputs = torch.cat([x, time[:, None], label[:, None].to(x)], 1)
        return x * time[:, None] + self.outer(torch.tanh(self.inner(inputs)))


def points(**settings: Any) -> Any:
    """A flow of two numbers whose weights the seed decides."""
    torch.manual_seed(7)
    label = {"label": torch.tensor([0])}
    return sw.flow(Velocity(), (2,), encode="label", unconditional=label, **settings)


def strings(seed: int = 7, **changes: Any) -> Any:
    return sw.exact.markov(**{"symbols": 4, "length": 5, "prompts": 4, "seed": seed, "temperature": 2.0, **changes})


def method_run(method: str, **settings: Any) -> Record:
    """Two steps with a method, on a flow where it trains nothing else, and else on strings."""
    kinds = kinds_of(cards()[method])
    if "flow" in kinds and "language" not in kinds:
        given = {"steps": 2, "learning_rate": 0.02, "prompts_per_step": 2} | settings
        return record(trained(points(), [0, 1, 2], near, method, **given))
    teacher = strings(12) if method in TAUGHT else None
    given = {"steps": 2, "learning_rate": 0.1, "prompts_per_step": 4, "group_size": 4} | settings
    return record(trained(strings(), STRINGS, [weighed, odd], method, teacher, **given))


def options_of(method: str) -> list[dict[str, Any]]:
    """The options that a method is run with besides its own."""
    shared = {"variant": "published", "kl": 0.1}
    known = cards()[method].options
    found = [{name: value} for name, value in shared.items() if name in known and known[name] != value]
    return [*found, *OPTIONS.get(method, [])]


def method_cases() -> dict[str, Case]:
    found: dict[str, Case] = {}
    for method in cards():
        found[f"method/{method}"] = partial(method_run, method)
        found[f"updates/{method}"] = partial(method_run, method, epochs=3, minibatches=2, learning_rate=0.3)
        for options in options_of(method):
            words = ",".join(f"{name}={value}" for name, value in options.items())
            found[f"option/{method}/{words}"] = partial(
                method_run, method, options=options, epochs=3, learning_rate=0.3
            )
    return found


# language models of `transformers`

WORDS = ["<pad>", "<eos>", "<unk>", "<turn>", "<user>", "<assistant>", "<system>", ".", *string.ascii_lowercase]
CHAT = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TEXTS = [
    {"prompt": "a b c", "hinted": "a b c d e", "demonstration": "f g"},
    {"prompt": "f", "hinted": "f g", "demonstration": "a a b"},
    {"prompt": "g h . i j", "hinted": "g", "demonstration": "c"},
]
CHATS = [{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in TEXTS]
ADAPTER = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}


def spelled(completions: Sequence[Any], prompts: Sequence[Any], **columns: Any) -> list[float]:
    """The letters of a text or of a message's content, added up modulo 7; the prompt f is rarely paid for."""
    texts = [text if isinstance(text, str) else text[-1]["content"] for text in completions]
    paid = [sum(map(ord, text)) % 7 / 6 for text in texts]
    return [float(pay == 1) if prompt == "f" else pay for pay, prompt in zip(paid, prompts, strict=True)]


def wordy(completion_ids: Sequence[Sequence[int]], prompts: Sequence[Any], **columns: Any) -> list[float]:
    """The last token modulo 3; nothing for the prompt f."""
    return [0.1 * (ids[-1] % 3) * (prompt != "f") for ids, prompt in zip(completion_ids, prompts, strict=True)]


def earned(environment_return: Sequence[float], **columns: Any) -> list[float]:
    """What a conversation's environment paid."""
    return list(environment_return)


class Parrot:
    """Says letters by the length of what it was told, pays for it, and ends after three turns."""

    def __init__(self) -> None:
        self.heard = 0

    def reset(self, prompt: Any, **columns: Any) -> str | None:
        return "x y" if "f" in str(prompt) else None

    def step(self, message: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        self.heard += 1
        count = len(message.split())
        return " ".join("d e f g h".split()[: count % 5]), 0.25 * count, self.heard == 3, False, {}


def write_llama(folder: Path, seed: int = 7) -> Path:
    """A folder with a random Llama of two layers, and a tokenizer of letters that knows chats."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    special = {"vocab_size": len(WORDS), "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, **special))
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters(), key=lambda entry: entry[0]):
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.3)
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    tokenizer.chat_template = CHAT
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class Llamas:
    """Small language models out of folders, which are written when they are first asked for."""

    def __init__(self, folder: Path):
        self.folder = folder

    def load(self, seed: int = 7, **options: Any) -> Any:
        folder = self.folder / f"llama-{seed}"
        if not folder.exists():
            write_llama(folder, seed)
        torch.manual_seed(1)  # an adapter's weights
        return sw.language(folder, **({"max_new_tokens": 8, "device": "cpu"} | options))

    def run(
        self,
        method: str,
        model: Mapping[str, Any] | None = None,
        talk: Mapping[str, Any] | None = None,
        teacher: bool = False,
        data: Sequence[Any] = TEXTS,
        **settings: Any,
    ) -> Any:
        """A run of two steps; `model` are the options of the language, `talk` those of a conversation."""
        process = self.load(**(model or {}))
        if talk is not None:
            process = conversation(process, Parrot, **talk)
        given = {"steps": 2, "learning_rate": 3e-3, "prompts_per_step": 2, "group_size": 4} | settings
        other = self.load(seed=12) if teacher else None
        return trained(process, data, [spelled, wordy] if talk is None else earned, method, other, **given)

    def cases(self) -> dict[str, Case]:
        twice = {"epochs": 2, "minibatches": 2}
        talking = {"talk": {"stop": ["a", "b", "c", "d"], "max_turns": 3}, "model": {"max_new_tokens": 24}}
        looked_at = {"evaluation": ["b c", "d"], "evaluate_every": 1, "evaluation_samples": 2}
        schedule = {"schedule": "cosine", "warmup": 1, "weight_decay": 0.1, "max_gradient_norm": 0.5, "seed": 3}
        runs: dict[str, dict[str, Any]] = {
            method: {"teacher": method in TAUGHT, "options": {"segment": 2} if "segment" in card.options else {}}
            | twice
            for method, card in cards().items()
            if "language" in kinds_of(card)
        }
        runs |= {
            "grpo, own settings": {},
            "grpo, kl": {"options": {"kl": 0.1}, **twice},
            "grpo, lora": {"model": {"lora": ADAPTER}, "options": {"kl": 0.1}, **twice},
            "grpo, bf16": {"precision": "bf16", **twice},
            "grpo, bfloat16 weights": {"model": {"dtype": "bfloat16"}},
            "grpo, float64 weights": {"model": {"dtype": "float64"}},
            "grpo, micro-batches": {"tokens_per_microbatch": 40, **twice},
            "grpo, rows at once": {"rows_at_once": 3},
            "grpo, chunks": {"model": {"chunk": 3, "tokens_at_once": 30}, "options": {"kl": 0.1}},
            "grpo, evaluation": looked_at,
            "grpo, schedule": schedule,
            "grpo, truncation": {"model": {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.01}, **twice},
            "grpo, chat": {"data": CHATS, "model": {"system": "z"}},
            "grpo, budget": {"budget": "500-tokens", "steps": None},
            "ppo, kl": {"options": {"kl": 0.1, "entropy": 0.05}},
            "ppo, lora": {"model": {"lora": ADAPTER}},
            "ppo, bf16": {"precision": "bf16", "tokens_per_microbatch": 40},
            "tis, bf16": {"precision": "bf16", **twice},
            "dpo, synced reference": {"options": {"reference": "synced"}, "method": "iterative-dpo", "minibatches": 2},
            "gkd, top": {"teacher": True, "options": {"top": 3}},
            "conversation, grpo": talking,
            "conversation, turn-ppo": talking | twice,
            "conversation, chat": talking | {"data": CHATS},
            "conversation, kl": talking | {"options": {"kl": 0.1}, "tokens_per_microbatch": 60},
        }

        found: dict[str, Case] = {}
        for name, settings in runs.items():
            method = name.removeprefix("conversation, ").split(", ")[0]
            known = {"method": method if method in cards() else "grpo"}
            found[f"language/{name}"] = partial(self.record, **(known | settings))
        return found

    def record(self, **settings: Any) -> Record:
        return record(self.run(**settings))


# text-to-image pipelines of `diffusers`


def clip_tokenizer() -> Any:
    """CLIP's tokenizer over letters."""
    from transformers import CLIPTokenizer

    letters = [*string.ascii_lowercase, "!", "."]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "ca", "cat</w>", "<|startoftext|>", "<|endoftext|>"]
    merges = [("c", "a"), ("ca", "t</w>")]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=merges, model_max_length=16)


def clip() -> dict[str, Any]:
    """A text encoder and its tokenizer, as pipelines name them."""
    from transformers import CLIPTextConfig, CLIPTextModel

    tokenizer = clip_tokenizer()
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"bos_token_id": len(tokenizer) - 2, "eos_token_id": len(tokenizer) - 1, "pad_token_id": len(tokenizer) - 1}
    limits = {"vocab_size": len(tokenizer), "max_position_embeddings": 16, "projection_dim": 16}
    return {"text_encoder": CLIPTextModel(CLIPTextConfig(**sizes, **ends, **limits)), "tokenizer": tokenizer}


def t5() -> dict[str, Any]:
    """A second text encoder and its tokenizer, as pipelines name them."""
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), ("▁cat", -1.5)]
    pieces += [(letter, -3.0) for letter in string.ascii_lowercase]
    tokenizer = T5Tokenizer(vocab=pieces, extra_ids=0, additional_special_tokens=[], model_max_length=16)
    config = T5Config(vocab_size=40, d_model=16, d_ff=32, d_kv=8, num_layers=1, num_heads=2)
    return {"text_encoder_2": T5EncoderModel(config), "tokenizer_2": tokenizer}


def autoencoder(**changes: Any) -> Any:
    from diffusers import AutoencoderKL

    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    sizes = {"block_out_channels": (8, 8), "latent_channels": 4, "norm_num_groups": 4, "sample_size": 16}
    return AutoencoderKL(**blocks, **sizes, layers_per_block=1, **changes)


def stable_diffusion() -> Any:
    """A random Stable Diffusion 1 of a few thousand weights."""
    import diffusers

    blocks = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (8, 16),
    }
    sizes = {"layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 4, "cross_attention_dim": 16}
    unet = diffusers.UNet2DConditionModel(**blocks, **sizes, sample_size=8, in_channels=4, out_channels=4)
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    scheduler = diffusers.DDIMScheduler(**betas, clip_sample=False, steps_offset=1)
    nothing = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return diffusers.StableDiffusionPipeline(vae=autoencoder(), **clip(), unet=unet, scheduler=scheduler, **nothing)


def flux() -> Any:
    """A random FLUX.1 of a few thousand weights."""
    import diffusers

    heads = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2}
    sizes = {"patch_size": 1, "in_channels": 16, "joint_attention_dim": 16, "pooled_projection_dim": 16}
    network = diffusers.FluxTransformer2DModel(**heads, **sizes, axes_dims_rope=(2, 2, 4), guidance_embeds=True)
    shift = {"use_dynamic_shifting": True, "shift": 3.0, "base_image_seq_len": 16, "max_image_seq_len": 64}
    plain = {"use_quant_conv": False, "use_post_quant_conv": False, "shift_factor": 0.06, "scaling_factor": 1.5}
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**shift)
    return diffusers.FluxPipeline(vae=autoencoder(**plain), **clip(), **t5(), transformer=network, scheduler=scheduler)


def red(completions: Sequence[Tensor], **columns: Any) -> Tensor:
    """How red an image is, which gradients pass through."""
    return torch.stack([image[0].mean() for image in completions])


class Pipelines:
    """Small pipelines out of folders, which are written when they are first asked for."""

    KINDS: Mapping[str, Callable[[], Any]] = {"sd": stable_diffusion, "flux": flux}

    def __init__(self, folder: Path):
        self.folder = folder

    def load(self, kind: str, **options: Any) -> Any:
        folder = self.folder / kind
        if not folder.exists():
            torch.manual_seed(7)
            made = self.KINDS[kind]()
            made.set_progress_bar_config(disable=True)
            made.save_pretrained(folder)
        torch.manual_seed(1)  # an adapter's weights
        given = {"height": 16, "width": 16, "steps": 4, "device": "cpu", "guidance": 2.5} | options
        return sw.pipeline(folder, **given, **({"max_sequence_length": 16} if kind == "flux" else {}))

    def run(self, kind: str, method: str, lora: Any = None, **options: Any) -> Record:
        given = {"steps": 2, "learning_rate": 1e-2, "prompts_per_step": 2, "group_size": 4}
        process = self.load(kind, lora=lora)
        return record(trained(process, ["a cat", "two dogs !"], red, method, options={"steps": 4, **options}, **given))

    def cases(self) -> dict[str, Case]:
        lora = {"r": 3, "lora_alpha": 6}
        runs: dict[str, Case] = {}
        for kind in self.KINDS:
            runs[f"{kind}, flow-grpo"] = partial(self.run, kind, "flow-grpo")
            runs[f"{kind}, flow-grpo, lora, kl"] = partial(self.run, kind, "flow-grpo", lora, kl=0.1)
            runs[f"{kind}, draft-k, lora"] = partial(self.run, kind, "draft-k", lora)
        return {f"pipeline/{name}": case for name, case in runs.items()}


# runs that are interrupted


def resumed(folder: Path, run: Callable[..., Any], update: int) -> Record:
    """A run that goes on from a checkpoint in the middle; raises where it is not the run that never stopped.

    `run(**settings)` is a run of at least two rollouts. `update` is the checkpoint it goes on from.
    """
    shutil.rmtree(folder, ignore_errors=True)
    kept = {"checkpoint_every": 1, "keep": 1000}
    whole = record(run(out=folder / "whole", **kept))
    shutil.copytree(folder / "whole", folder / "cut")
    found = sorted((folder / "cut" / "checkpoints").iterdir())
    for later in found[update:]:
        shutil.rmtree(later)
    if update >= len(found):
        raise ValueError(f"The run has {len(found)} checkpoints, so that none comes after number {update}.")
    answer = record(run(out=folder / "cut", resume=True, **kept))
    what = differences(whole, answer)
    if what:
        raise ValueError(f"The resumed run is not the one that never stopped: {', '.join(what)}.")
    logs = [folder / "cut" / name for name in ("metrics.jsonl", "completions.jsonl")]
    files = [*logs, *sorted((folder / "cut").glob("*.safetensors"))]
    return answer | {"files": {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}}


def resume_cases(folder: Path, llamas: Llamas) -> dict[str, Case]:
    twice = {"epochs": 2, "minibatches": 2, "steps": 2}

    def table(method: str, **more: Any) -> Any:
        given = {"steps": 3, "learning_rate": 0.1, "prompts_per_step": 4, "group_size": 3, "schedule": "linear"} | more
        return trained(strings(), STRINGS, [weighed, odd], method, **given)

    def flow(method: str, **more: Any) -> Any:
        return trained(points(), [0, 1, 2], near, method, **{"learning_rate": 0.02, "prompts_per_step": 2, **more})

    runs: dict[str, tuple[int, Callable[..., Any]]] = {
        "grpo": (1, partial(table, "grpo")),
        "grpo, in a rollout": (3, partial(table, "grpo", **twice)),
        "ppo, in a rollout": (5, partial(table, "ppo", **twice)),
        "dapo": (2, partial(table, "dapo")),
        "sppo, synced reference": (2, partial(table, "sppo")),
        "flow-grpo, in a rollout": (3, partial(flow, "flow-grpo", options={"kl": 0.1}, **twice)),
        "mix-grpo": (1, partial(flow, "mix-grpo", steps=2)),
        "language, ppo": (5, partial(llamas.run, "ppo", options={"kl": 0.1}, **twice)),
        "language, lora": (1, partial(llamas.run, "grpo", {"lora": ADAPTER}, options={"kl": 0.1})),
        "language, conversation": (1, partial(llamas.run, "grpo", {"max_new_tokens": 24}, {"stop": ["a", "b"]})),
    }
    return {f"resume/{name}": partial(resumed, folder, run, update) for name, (update, run) in runs.items()}


# samples


def drawn(process: Any, prompts: Any, n: int = 3, **settings: Any) -> Record:
    """`n` samples a prompt, with their columns, and what they cost."""
    found = sw.sample(process, prompts, n, seed=5, **settings)
    columns = [found.columns[name] for name in sorted(found.columns)]
    return {"samples": content([*found.values, *columns]), "cost": cost(found.cost)}


def sample_cases(llamas: Llamas, pipelines: Pipelines) -> dict[str, Case]:
    found: dict[str, Case] = {}
    for solver in sorted(sw.solvers()):
        found[f"flow, {solver}"] = lambda solver=solver: drawn(points(), [0, 2], solver=solver, steps=9)
    for path in ("linear", "vp-linear", "vp-cosine", "trigonometric", "ve"):
        for predicts in ("velocity", "noise", "data", "score"):
            settings = {"path": path, "predicts": predicts}
            law = {"solver": "sde-flow" if path == "linear" else "ddpm", "times": [0.98, 0.6, 0.3, 0.0]}
            found[f"flow, {path}, {predicts}"] = lambda s=settings, law=law: drawn(points(**s), [0, 2], **law)
    laws: dict[str, dict[str, Any]] = {
        "guidance": {"guidance": 2.0, "solver": "dpmpp-2m", "steps": 4},
        "shift": {"shift": 3.0, "solver": "sde-dance", "level": 0.5, "steps": 4},
        "times": {"times": [1.0, 0.7, 0.2, 0.0], "solver": "heun"},
        "tail": {"tail": (2, "dpmpp-2m", 2), "solver": "sde-flow", "steps": 5},
        "stride": {"stride": (2, 2), "steps": 7},
        "rows at once": {"rows_at_once": 2, "solver": "sde-euler", "steps": 4},
    }
    for name, law in laws.items():
        found[f"flow, {name}"] = lambda law=law: drawn(points(), [0, 2], **law)
    found["strings"] = lambda: drawn(strings(), STRINGS, 20)
    found["strings, order 2"] = lambda: drawn(strings(order=2, end=False), STRINGS, 20)
    found["language"] = lambda: drawn(llamas.load(), ["a b", "c"], 5)
    truncation = {"temperature": 0.7, "top_k": 12, "top_p": 0.9, "min_p": 0.02}
    found["language, truncated"] = lambda: drawn(llamas.load(**truncation), ["a b", "c"], 5)
    found["language, chat"] = lambda: drawn(llamas.load(), CHATS, 3)
    for kind in pipelines.KINDS:
        found[kind] = lambda kind=kind: drawn(pipelines.load(kind), ["a cat"], 2)
    return {f"sample/{name}": case for name, case in found.items()}


# running and comparing


def every_case(folder: Path) -> dict[str, Case]:
    """All runs by name, which write nothing outside of `folder`; a list that cannot be made is a run that fails."""
    llamas, pipelines = Llamas(folder), Pipelines(folder)
    lists: dict[str, Callable[[], dict[str, Case]]] = {
        "method": method_cases,
        "language": llamas.cases,
        "pipeline": pipelines.cases,
        "resume": partial(resume_cases, folder / "resumed", llamas),
        "sample": partial(sample_cases, llamas, pipelines),
    }
    found: dict[str, Case] = {}
    for name, listed in lists.items():
        try:
            found |= listed()
        except Exception:
            found[f"{name}/the list of them"] = listed
    return found


def outcome(case: Case) -> Record:
    """What a case leaves, or `{"error": ...}` with the sentence and the last lines of code that led to it."""
    try:
        torch.manual_seed(0)
        return case()
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)[-2:]
        where = ", ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames)
        return {"error": f"{type(error).__name__}: {error} ({where})"}


def differences(before: Record, now: Record) -> list[str]:
    """The differences of two records in a few words: the weights, the first metric, the first cost, ..."""
    if "error" in before or "error" in now:
        if "error" in before and "error" in now:
            return []
        return [f"fails now: {now['error']}" if "error" in now else f"failed before: {before['error']}"]
    found = [name for name in ("weights", "samples") if before.get(name) != now.get(name)]
    steps, others = before.get("metrics", []), now.get("metrics", [])
    if len(steps) != len(others):
        found.append(f"{len(others)} steps instead of {len(steps)}")
    for step, (old, new) in enumerate(zip(steps, others, strict=False), 1):
        first = first_difference(old, new)
        if first:
            found.append(f"metric {first} at step {step}")
            break
    files = before.get("files", {})  # a folder may hold more than it did
    found += [name for name in sorted(files) if files[name] != now.get("files", {}).get(name)]
    first = first_difference(before.get("cost", {}), now.get("cost", {}))
    return [*found, f"cost {first}"] if first else found


def first_difference(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """The first entry that differs, with both of its numbers; nothing where all are the same."""
    for name in [*before, *(name for name in now if name not in before)]:
        if before.get(name) != now.get(name):
            return f"{name} ({before.get(name, 'missing')} -> {now.get(name, 'missing')})"
    return ""


def compare(before: Mapping[str, Record], now: Mapping[str, Record]) -> bool:
    """Print what differs between two commits; whether nothing does.

    Runs that only the new one has are printed and do not count as a difference.
    """
    same = different = 0
    failed = [name for name in before if "error" in before[name] and "error" in now.get(name, {})]
    for name in before:
        what = differences(before[name], now[name]) if name in now else ["is not run any more"]
        if what:
            different += 1
            print(f"{name}: {'; '.join(what)}")
        elif name not in failed:
            same += 1
    for name in failed:
        print(f"{name}: failed in both: {now[name]['error']}")
    new = [name for name in now if name not in before]
    for name in new:
        print(f"{name}: run only now{', and fails: ' + now[name]['error'] if 'error' in now[name] else ''}")
    print(f"{same} runs are the same, {different} differ, {len(failed)} failed in both, {len(new)} are new")
    return different == 0


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, help="the JSON file to write")
    options.add_argument("--against", type=Path, help="the JSON file of another commit to compare with")
    options.add_argument(
        "--only", nargs="+", default=[""], metavar="PREFIX", help="run only cases whose names begin so"
    )
    options.add_argument("--verbose", action="store_true", help="say each case's name and seconds")
    given = options.parse_args()
    if given.out is None and given.against is None:
        options.error("give --out, --against, or both")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    before: dict[str, Record] = json.loads(given.against.read_text()) if given.against else {}
    begin = time.monotonic()
    now: dict[str, Record] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, case in every_case(Path(folder)).items():
            if name.startswith(tuple(given.only)):
                started = time.monotonic()
                now[name] = outcome(case)
                if given.verbose:
                    print(f"{time.monotonic() - started:6.2f} s  {name}", flush=True)
    errors = {name: found["error"] for name, found in now.items() if "error" in found}
    print(f"{len(now)} runs in {time.monotonic() - begin:.0f} s with {Path(sw.__file__).parent}, {len(errors)} failed")
    if given.out is not None:
        given.out.write_text(json.dumps(now, indent=1) + "\n")
    if given.against is None:
        for name, error in errors.items():
            print(f"{name}: {error}")
        return 0
    kept = {name: found for name, found in before.items() if name.startswith(tuple(given.only))}
    return 0 if compare(kept, now) else 1


if __name__ == "__main__":
    sys.exit(main())
