"""Load a model and its tokenizer from a folder, a GGUF file, a hub id or objects at hand, or say what is wrong."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stepwell.errors import InputError
from stepwell.process.language.folders import (
    check_files,
    check_loaded,
    check_numbers,
    check_weights,
    place_of,
    read_object,
    reading,
)
from stepwell.terminal import one_line

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

    A model that is already built is cast in place. A GGUF file is dequantised. Of a vision-language model the whole is
    loaded, and texts are read. Raises `InputError` for whatever is not, wholly, a causal language model.
    """
    from transformers import PreTrainedModel

    if isinstance(model, PreTrainedModel):
        if model.get_output_embeddings() is None:
            raise InputError(
                f"model must be a causal language model, got {type(model).__name__}, which has no output head over "
                "tokens."
            )
        return model.to(dtype)  # type: ignore[arg-type]
    if not isinstance(model, (str, os.PathLike)):
        raise InputError(f"model must be a folder, a hub id or a PreTrainedModel, got {type(model).__name__}.")
    place = place_of(model)
    if isinstance(place, Path) and place.is_file():
        if place.suffix.lower() != ".gguf":
            raise InputError(f"The model '{model}' is a file; name the folder that it lies in, or a .gguf file.")
        return load_gguf(place, dtype)
    name = f"The model '{one_line(str(model), 80)}'"
    if not isinstance(place, Path):
        name += ", which is no folder here,"
    else:
        _check_folder(place)
    with reading(name), quiet():
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(place, trust_remote_code=False)
        kind = class_of(config, name)
        options: dict[str, Any] = {"dtype": dtype, "use_safetensors": True, "ignore_mismatched_sizes": True}
        loaded, info = kind.from_pretrained(place, config=config, output_loading_info=True, **options)
        check_loaded(name, loaded, info)
        check_numbers(name, loaded)
    whole: nn.Module = loaded
    return whole


def class_of(config: Any, name: str) -> Any:
    """The class of `transformers` that reads texts with a configuration: the one that it names, if that can.

    Raises `InputError` for a quantised model, an encoder with a decoder, a model without a head over tokens, and for
    attention that is code from elsewhere.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    if getattr(config, "quantization_config", None) is not None:
        raise InputError(f"{name} is quantised, and only floating-point weights can be trained; dequantise it first.")
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(
            f"{name} is an encoder with a decoder ({config.model_type}), which continues no prompt; a causal language "
            "model is needed."
        )
    if "/" in str(getattr(config, "_attn_implementation", None)):
        raise InputError(f"{name} asks for attention that is code from elsewhere, which is never run.")
    kinds: list[Any] = []
    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
        if type(config) in auto._model_mapping:
            found = auto._model_mapping[type(config)]
            kinds += list(found) if isinstance(found, (list, tuple)) else [found]
    if not kinds:
        raise InputError(f"{name} is a {config.model_type}, which has no head over tokens that continues a text.")
    named = getattr(config, "architectures", None) or [None]
    return next((kind for kind in kinds if kind.__name__ in named), kinds[0])


def load_gguf(file: Path, dtype: torch.dtype) -> nn.Module:
    """The model in a GGUF file, its weights dequantised, as one of `transformers` that was never quantised."""
    from transformers import AutoModelForCausalLM

    _check_gguf()
    with reading(f"The model '{file}'"), quiet():
        options: dict[str, Any] = {"gguf_file": file.name, "dtype": dtype, "output_loading_info": True}
        made: Any = AutoModelForCausalLM.from_pretrained(file.parent, **options)
        loaded, info = made
        check_loaded(f"The model '{file}'", loaded, info)
        check_numbers(f"The model '{file}'", loaded)
        config = copy.deepcopy(loaded.config)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        return rebuilt(loaded, config, loaded.state_dict())


def _check_gguf() -> None:
    if importlib.util.find_spec("gguf") is None:
        raise InputError("GGUF files need gguf, which is not installed: pip install 'stepwell[gguf]'.")


def rebuilt(model: Any, config: Any, weights: Mapping[str, torch.Tensor]) -> Any:
    """A model of the same class with another configuration, on the tensors of `weights`; none is copied.

    Buffers that no file holds are those of `model`. Raises `RuntimeError` unless the weights are exactly its own.
    """
    from transformers import GenerationConfig

    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        twin = type(model)(config)
    names = twin.state_dict().keys()
    twin.load_state_dict({name: value for name, value in weights.items() if name in names}, assign=True)
    buffers = dict(model.named_buffers())
    plain = {name.replace(".base_layer", ""): value for name, value in buffers.items()}
    for name, value in twin.named_buffers():
        if value.is_meta:
            owner, _, last = name.rpartition(".")
            setattr(twin.get_submodule(owner), last, plain[name])
    twin.tie_weights()
    for name, value in [*twin.named_parameters(), *twin.named_buffers()]:
        if value.is_meta:
            raise RuntimeError(f"{name} has no value")
    settings = getattr(model, "generation_config", None)
    if isinstance(settings, GenerationConfig):
        twin.generation_config = copy.deepcopy(settings)
    return twin.eval()


def load_tokenizer(tokenizer: Any, model: Any) -> Any:
    """The tokenizer that was given, or the one in the model's folder or GGUF file."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    source = tokenizer if tokenizer is not None else model
    if not isinstance(source, (str, os.PathLike)):
        if tokenizer is None:
            raise InputError("A model that is already built needs its tokenizer: language(model, tokenizer).")
        return tokenizer
    place = place_of(source, "tokenizer's")
    name = f"The tokenizer of '{one_line(str(source), 80)}'"
    if isinstance(place, Path) and place.is_file():
        if place.suffix.lower() != ".gguf":
            raise InputError(f"{name} must be in a folder or a .gguf file.")
        _check_gguf()
        with reading(name), quiet():
            return AutoTokenizer.from_pretrained(place.parent, gguf_file=place.name)
    kind: Any = AutoTokenizer
    if isinstance(place, Path):
        if not any(file for kind in TOKENIZER_FILES for file in place.glob(kind)):
            raise InputError(
                f"The folder '{source}' holds no tokenizer; copy that of its model into it, or in Python give one: "
                "language(model, tokenizer)."
            )
        check_files(place)
        # a tokenizer of no special class is wholly in its tokenizer.json; for some kinds of model, such as Qwen2,
        # AutoTokenizer would silently replace its splitting of words by that model's usual one
        plain = _tokenizer_class(place) in ("TokenizersBackend", "PreTrainedTokenizerFast")
        kind = PreTrainedTokenizerFast if plain and (place / "tokenizer.json").is_file() else AutoTokenizer
    with reading(name), quiet():
        return kind.from_pretrained(place, trust_remote_code=False)


def _check_folder(folder: Path) -> None:
    """Raise `InputError` for a folder that cannot be a whole model, as far as its files tell."""
    if (folder / "adapter_config.json").exists():
        raise InputError(
            f"The folder '{folder}' holds a LoRA adapter, not a whole model; merge it with its base first: "
            "peft.AutoPeftModelForCausalLM.from_pretrained(folder).merge_and_unload().save_pretrained(another)."
        )
    if not (folder / "config.json").exists() and not (folder / "config.json").is_symlink():
        if any(folder.glob("*.gguf")):
            raise InputError(f"The folder '{folder}' holds GGUF files; name the file itself.")
        raise InputError(f"The folder '{folder}' holds no config.json, so it is not a model of transformers.")
    check_files(folder)
    check_weights(folder, read_object(folder / "config.json"))


def _tokenizer_class(folder: Path) -> str | None:
    settings = folder / "tokenizer_config.json"
    declared = read_object(settings).get("tokenizer_class") if settings.is_file() else None
    return None if declared is None else str(declared)


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
    for token in declared:
        if token is not None and (not isinstance(token, int) or isinstance(token, bool)):
            raise InputError(f"eos_token_id of the model must be a token's id or a list of them, got {token!r:.60}.")
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
