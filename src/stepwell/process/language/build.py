"""Make a language process of a folder, a hub id, or a model at hand; `sw.language`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from stepwell.errors import InputError
from stepwell.process.language import loading
from stepwell.process.language.network import LanguageModule
from stepwell.process.language.process import Language
from stepwell.process.language.prompts import PromptEncoder
from stepwell.process.language.truncation import Truncation

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def language(
    model: str | os.PathLike[str] | PreTrainedModel,
    tokenizer: Any = None,
    *,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device | None = None,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    eos: Sequence[int | str] | int | str = (),
    lora: Mapping[str, Any] | None = None,
    system: str | None = None,
    chunk: int | None = None,
    tokens_at_once: int | None = None,
    compile: bool = False,
) -> Language:
    """A causal language model of `transformers` as a process.

    `model` is a folder, a hub id, or a built model with its `tokenizer` (a built model is cast and moved in place).
    Weights come from safetensors only, and no code that comes with a model is ever run. Samples end at an end token
    (the model's, the tokenizer's, and `eos`, ids or tokens) or after `max_new_tokens`. Tokens are drawn at
    `temperature`, then cut by `top_k`, `top_p` and `min_p` in this order (`Truncation`). `lora` is a dict of
    `peft.LoraConfig`'s options: only the adapter learns, and `frozen()` is the base. `system` is put before chats
    that have no system message. `chunk`: the number of steps whose logits are held at once when scoring;
    `tokens_at_once`: the number of padded tokens that are scored at once without a gradient. `compile`: score and
    learn with norms and perceptrons compiled by `torch.compile`, which takes less memory; rollouts are never compiled,
    since they gain nothing by it.

    `device` is, unless given, that of a built model, else the accelerator if there is one.

    Raises `InputError` for an option out of its range, and for a model or tokenizer that cannot be used.
    """
    for name, value in (("max_new_tokens", max_new_tokens), ("chunk", chunk), ("tokens_at_once", tokens_at_once)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise InputError(f"{name} must be a whole number of at least 1, got {value!r}.")
    if not isinstance(compile, bool):
        raise InputError(f"compile must be True or False, got {compile!r}.")
    truncation = Truncation(temperature, top_k, top_p, min_p)
    network: Any = loading.load_model(model, loading.dtype_named(dtype))
    words = loading.load_tokenizer(tokenizer, model)
    config = network.config.get_text_config()
    vocabulary = network.get_input_embeddings().weight.shape[0]
    pad = loading.padding_token(words, vocabulary)
    ends = loading.end_tokens(network, words, eos, vocabulary)
    limit = getattr(config, "max_position_embeddings", None)
    if device is None and isinstance(model, (str, os.PathLike)):
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        device = "cpu" if accelerator is None else accelerator
    if device is not None:
        device = loading.device_named(device)
    if lora is not None:
        network = loading.with_adapter(network, lora)
    process = Language(
        LanguageModule(network if device is None else network.to(device)),
        PromptEncoder(words, limit, vocabulary, system),
        ends=ends,
        pad=pad,
        truncation=truncation,
        max_new_tokens=max_new_tokens,
        chunk=chunk,
        tokens_at_once=tokens_at_once,
        compile=compile,
    )
    stored = Path(model) / "value_head.safetensors" if isinstance(model, (str, os.PathLike)) else None
    if stored is not None and stored.is_file():
        from safetensors.torch import load_file

        process = process.with_value_head()
        head = process.network.value_head
        assert head is not None
        head.load_state_dict(load_file(stored))
    return process
