"""Load a model and its tokenizer from a folder, a hub id or objects at hand, or say in one sentence what is wrong."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stepwell.errors import InputError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "*.tiktoken", "tekken.json")
SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp64": "float64"}


def dtype_named(dtype: str | torch.dtype) -> torch.dtype:
    """A floating-point type by its name, also by a short one such as bf16."""
    if isinstance(dtype, torch.dtype) and dtype in DTYPES.values():
        return dtype
    name = SHORT.get(str(dtype), str(dtype))
    if name not in DTYPES:
        raise InputError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype}.")
    return DTYPES[name]


def device_named(device: str | torch.device | int) -> torch.device:
    """A device of this machine, by its name."""
    try:
        named = torch.device(device)
        torch.empty(0, device=named)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        there = "cpu" if accelerator is None else f"cpu and {accelerator}"
        raise InputError(f"There is no device '{device}' here; there is {there}.") from error
    return named


def load_model(model: Any, dtype: torch.dtype) -> nn.Module:
    """A causal language model of `transformers`, its weights from safetensors; code that comes with it is never run.

    A model that is already built is cast in place.
    """
    from transformers import AutoModelForCausalLM, PreTrainedModel

    if isinstance(model, PreTrainedModel):
        if model.get_output_embeddings() is None:
            raise InputError(
                f"model must be a causal language model, got {type(model).__name__}, which has no output head over "
                "tokens."
            )
        return model.to(dtype)  # type: ignore[arg-type]
    if not isinstance(model, (str, os.PathLike)):
        raise InputError(f"model must be a folder, a hub id or a PreTrainedModel, got {type(model).__name__}.")
    _check_folder(model)
    try:
        with quiet():
            loaded: nn.Module = AutoModelForCausalLM.from_pretrained(
                model, dtype=dtype, use_safetensors=True, trust_remote_code=False
            )
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"The model '{model}' cannot be loaded: {_first_sentence(error)}") from error
    return loaded


def load_tokenizer(tokenizer: Any, model: Any) -> Any:
    """The tokenizer that was given, or the one in the model's folder."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    source = tokenizer if tokenizer is not None else model
    if not isinstance(source, (str, os.PathLike)):
        if tokenizer is None:
            raise InputError("A model that is already built needs its tokenizer: language(model, tokenizer).")
        return tokenizer
    folder = Path(source)
    if folder.is_dir() and not any(file for kind in TOKENIZER_FILES for file in folder.glob(kind)):
        raise InputError(f"The folder '{source}' holds no tokenizer; give one: language(model, tokenizer).")
    # a tokenizer of no special class is wholly in its tokenizer.json; for some kinds of model, such as Qwen2,
    # AutoTokenizer would silently replace its splitting of words by that model's usual one
    plain = _tokenizer_class(folder) in ("TokenizersBackend", "PreTrainedTokenizerFast")
    kind = PreTrainedTokenizerFast if plain and (folder / "tokenizer.json").is_file() else AutoTokenizer
    try:
        return kind.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"The tokenizer of '{source}' cannot be loaded: {_first_sentence(error)}") from error


def _check_folder(model: str | os.PathLike[str]) -> None:
    """Raise `InputError` for a folder without configuration or safetensors, and for a name that can only be a folder's
    and is none.
    """
    folder = Path(model)
    if folder.is_file():
        raise InputError(f"The model '{model}' is a file; name the folder that it lies in.")
    if not str(model).strip():
        raise InputError("The model has an empty name; give a folder or a hub id.")
    if not folder.is_dir():
        # an id of the hub is 'name' or 'owner/name'; everything else can only mean a folder
        if folder.is_absolute() or str(model).startswith((".", "~")) or len(folder.parts) > 2:
            raise InputError(f"There is no model folder '{model}'.")
        return
    if not (folder / "config.json").is_file():
        raise InputError(f"The folder '{model}' holds no config.json, so it is not a model of transformers.")
    if not any(folder.glob("*.safetensors")):
        raise InputError(f"The folder '{model}' holds no weights as *.safetensors, the only kind that is loaded.")


def _tokenizer_class(folder: Path) -> str | None:
    settings = folder / "tokenizer_config.json"
    declared = json.loads(settings.read_text(encoding="utf-8")).get("tokenizer_class") if settings.is_file() else None
    return None if declared is None else str(declared)


def _first_sentence(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(" .:") + "."


def padding_token(tokenizer: Any, vocabulary: int) -> int:
    """The id that pads: the tokenizer's own, else its end of sequence. No number depends on it."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if pad is None:
        raise InputError("The tokenizer has neither a padding nor an end-of-sequence token; set tokenizer.pad_token.")
    return int(pad) if pad < vocabulary else 0


def end_tokens(model: nn.Module, tokenizer: Any, extra: Sequence[int | str] | int | str, vocabulary: int) -> list[int]:
    """Every id that ends a sample: the model's generation settings, the tokenizer's, and the `eos` option's."""
    extra = [extra] if isinstance(extra, (int, str)) else list(extra)
    declared: list[Any] = [tokenizer.eos_token_id, *(_token_id(token, tokenizer, vocabulary) for token in extra)]
    for settings in (getattr(model, "generation_config", None), model.config):
        eos = getattr(settings, "eos_token_id", None)
        declared += list(eos) if isinstance(eos, (list, tuple)) else [eos]
    ends = sorted({int(token) for token in declared if token is not None})
    if not ends:
        raise InputError("Neither the model nor its tokenizer has an end-of-sequence token; name one with eos=....")
    return ends


def _token_id(token: int | str, tokenizer: Any, vocabulary: int) -> int:
    if isinstance(token, int):
        if not 0 <= token < vocabulary:
            raise InputError(f"eos must be a token id from 0 to {vocabulary - 1}, got {token}.")
        return token
    if token not in tokenizer.get_vocab():
        raise InputError(f"eos must be one token of this tokenizer, got '{token}'.")
    return int(tokenizer.get_vocab()[token])


def with_adapter(model: nn.Module, options: Mapping[str, Any]) -> nn.Module:
    """The model with a LoRA adapter (Hu et al. 2021) of `peft.LoraConfig(**options)`; only the adapter learns.

    Its random start is the same in every run and leaves torch's global generator as it was.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise InputError("LoRA needs peft, which is not installed: pip install 'stepwell[lora]'.") from error
    try:
        with fixed_start():
            return get_peft_model(model, LoraConfig(**{"task_type": "CAUSAL_LM", **options}))  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise InputError(f"The LoRA options {dict(options)} do not fit this model: {_first_sentence(error)}") from error


@contextlib.contextmanager
def fixed_start() -> Iterator[None]:
    """Inside, adapters always get the same start: peft draws it from torch's global generator and takes no other.

    Afterwards the generator is as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Inside, `transformers` draws no progress bars over the messages of a run."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
