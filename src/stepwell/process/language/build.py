"""Make a language process of a folder, a hub id, or a model at hand; `sw.language`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from stepwell.errors import InputError
from stepwell.process.language import loading
from stepwell.process.language.adapters import with_adapter
from stepwell.process.language.folders import place_of, reading
from stepwell.process.language.guard import check_reading, refuse_unreadable
from stepwell.process.language.network import LanguageModule
from stepwell.process.language.process import Language
from stepwell.process.language.prompts import PromptEncoder
from stepwell.process.language.template import chat_template as chat_template_of
from stepwell.process.language.truncation import Truncation
from stepwell.process.language.vocabulary import text_end
from stepwell.ranges import checked

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@checked("model")
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
    tools: Sequence[Any] | None = None,
    chat_template: str | os.PathLike[str] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    keep_special_tokens: bool | None = None,
    chunk: int | None = None,
    tokens_at_once: int | None = None,
    compile: bool = False,
) -> Language:
    """A causal language model of `transformers` as a process.

    `model` is a folder, a GGUF file, a hub id, or a built model with its `tokenizer` (it is cast and moved in place).
    Weights come from safetensors only, and no code that comes with a model is ever run. Samples end at an end token
    (the model's, the tokenizer's, the one by which the chat template closes a message, and `eos`, ids or tokens) or
    after `max_new_tokens`. Tokens are drawn at `temperature`, then cut by `top_k`, `top_p` and `min_p` in this order
    (`Truncation`); ids that the tokenizer has no token for are never drawn. `lora` is a dict of
    `peft.LoraConfig`'s options: only the adapter learns, and `frozen()` is the base. `system` is put before chats
    that have no system message, and `tools` (functions, or JSON schemas) are what every chat is told of that brings no
    tools of its own. `chat_template` takes the place of the tokenizer's, a text or a file, and `chat_template_kwargs`
    are further variables of it, such as `{"enable_thinking": False}`. `keep_special_tokens`: texts show special tokens
    such as `<think>`, and never the end token or padding; unless given, conversations do and single texts do not.

    `chunk`: the number of steps whose logits are held at once when scoring;
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
    if isinstance(model, (str, os.PathLike)):
        model = place_of(model)
    network: Any = loading.load_model(model, loading.dtype_named(dtype))
    refuse_unreadable(network)
    words = loading.load_tokenizer(tokenizer, model)
    template = chat_template_of(words, system, tools, chat_template, chat_template_kwargs)
    words = template.tokenizer
    config = network.config.get_text_config()
    vocabulary = network.get_input_embeddings().weight.shape[0]
    pad = loading.padding_token(words, vocabulary)
    ends = loading.end_tokens(network, words, eos, vocabulary)
    limit = getattr(config, "max_position_embeddings", None)
    end = text_end(words, network, eos, ends, vocabulary)
    encoder = PromptEncoder(words, limit, vocabulary, end, tuple(ends), template, keep_special_tokens).with_closing()
    head = network.get_output_embeddings()
    outputs = getattr(getattr(head, "weight", None), "shape", (vocabulary,))[0]
    truncation = replace(truncation, absent=encoder.words.absent(outputs))
    if device is None and isinstance(model, (str, os.PathLike)):
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        device = "cpu" if accelerator is None else accelerator
    if device is not None:
        device = loading.device_named(device)
    if lora is not None:
        network = with_adapter(network, lora)
    process = Language(
        LanguageModule(network if device is None else network.to(device)),
        encoder,
        ends=encoder.ends,
        pad=pad,
        truncation=truncation,
        max_new_tokens=max_new_tokens,
        chunk=chunk,
        tokens_at_once=tokens_at_once,
        compile=compile,
    )
    check_reading(process.network)
    stored = Path(model) / "value_head.safetensors" if isinstance(model, (str, os.PathLike)) else None
    if stored is not None and stored.is_file():
        from safetensors.torch import load_file

        process = process.with_value_head()
        head = process.network.value_head
        assert head is not None
        with reading(f"The value head '{stored}'"):
            head.load_state_dict(load_file(stored))
    return process
