"""Pipelines of diffusers from folders and back: refusals, the scheduler's settings, adapters, whole folders."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path as FilePath
from typing import Any

import torch
from torch import nn

from stepwell.errors import InputError
from stepwell.guarded import first_line_of
from stepwell.process.language import loading
from stepwell.process.language.folders import check_loaded, check_numbers, place_of, reading
from stepwell.solver.path import Linear, Path
from stepwell.solver.tabulated import Tabulated
from stepwell.writing import writable_folder, write_whole, writing

FAMILIES = {
    "StableDiffusionPipeline": "sd",
    "StableDiffusionXLPipeline": "sdxl",
    "StableDiffusion3Pipeline": "sd3",
    "FluxPipeline": "flux",
}
LORA_FILE = "pytorch_lora_weights.safetensors"
UNUSED = ("safety_checker", "feature_extractor", "image_encoder")
"""Components that take no part in making latents or turning them into images."""
OPTIONAL = ("text_encoder_3", "tokenizer_3")
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
JOINT_ATTENTION = [*ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]


def load(
    model: str | os.PathLike[str], dtype: torch.dtype, device: torch.device, variant: str | None
) -> tuple[Any, str]:
    """A pipeline of diffusers and its family: weights from safetensors alone, never code that comes with them.

    The autoencoder stays in float32, since SDXL's overflows in half precision; nothing learns yet.
    """
    try:
        import diffusers
    except ImportError as error:
        raise InputError("Pipelines need diffusers, which is not installed: pip install 'stepwell[flow]'.") from error
    _check_place(model)
    with reading(f"The pipeline '{model}'"):
        index = diffusers.DiffusionPipeline.load_config(model)
    name = str(index.get("_class_name"))
    if name not in FAMILIES:
        raise InputError(f"The pipeline '{model}' must be one of {', '.join(FAMILIES)}, got a {name}.")
    family = FAMILIES[name]
    _check_components(model, index, variant)
    options: dict[str, Any] = {part: None for part in UNUSED if part in index}
    if family == "sd":
        options["requires_safety_checker"] = False
    if family == "sd3":
        options |= {part: None for part in OPTIONAL if (index.get(part) or [None])[0] is None}
    options |= _text_encoders(model, index, dtype, variant)
    formats = {"default": dtype, "vae": torch.float64 if dtype == torch.float64 else torch.float32}
    try:
        with quiet():
            made = getattr(diffusers, name).from_pretrained(
                model, dtype=formats, use_safetensors=True, variant=variant, **options
            )
    except Exception as error:  # the libraries raise errors of many types for a folder that is damaged
        raise InputError(f"The pipeline '{model}' cannot be loaded: {first_line_of(error)}.") from error
    made.set_progress_bar_config(disable=True)
    for part, module in made.components.items():
        if isinstance(module, nn.Module):
            module.requires_grad_(False).eval()
            check_numbers(f"The {part} of the pipeline '{model}'", module)
    return made.to(device), family


def _text_encoders(model: Any, index: Mapping[str, Any], dtype: torch.dtype, variant: str | None) -> dict[str, Any]:
    """The text encoders by name, each of which has all its weights from its files."""
    import transformers

    made: dict[str, Any] = {}
    for part, entry in index.items():
        kind = getattr(transformers, str(entry[1]), None) if part.startswith("text_encoder") and entry[0] else None
        if not isinstance(kind, type) or not issubclass(kind, transformers.PreTrainedModel):
            continue
        name = f"The {part} of the pipeline '{model}'"
        chosen: dict[str, Any] = {"subfolder": part, "dtype": dtype, "use_safetensors": True, "variant": variant}
        with reading(name), quiet():
            found: Any = kind.from_pretrained(model, output_loading_info=True, ignore_mismatched_sizes=True, **chosen)
        check_loaded(name, *found)
        made[part] = found[0]
    return made


def _check_place(model: Any) -> None:
    """Raise `InputError` for a folder without a pipeline, and for a name that can only be a folder and is none."""
    if not isinstance(model, (str, os.PathLike)):
        raise InputError(f"model must be a folder or a hub id, got a {type(model).__name__}.")
    folder = FilePath(place_of(model, "pipeline"))
    if folder.is_file():
        raise InputError(f"The pipeline '{model}' is a file; name the folder that a pipeline was saved to.")
    if not folder.is_dir():
        return
    if not (folder / "model_index.json").is_file():
        raise InputError(f"The folder '{model}' holds no model_index.json, so it is not a pipeline of diffusers.")


def _check_components(model: Any, index: Mapping[str, Any], variant: str | None) -> None:
    """Raise `InputError` for code from outside the two libraries, and for networks without weights as safetensors."""
    for part, entry in index.items():
        if part.startswith("_") or part in UNUSED or not isinstance(entry, (list, tuple)) or entry[0] is None:
            continue
        if entry[0] not in ("diffusers", "transformers"):
            raise InputError(
                f"The {part} of the pipeline '{model}' comes from '{entry[0]}'; code that is not of diffusers or "
                "transformers is never run."
            )
        folder = FilePath(model) / part
        if not FilePath(model).is_dir() or part.startswith(("tokenizer", "scheduler")):
            continue
        if not folder.is_dir():
            raise InputError(f"The pipeline '{model}' has no folder '{part}', which its model_index.json names.")
        if not any(folder.glob(f"*.{variant}*.safetensors" if variant else "*.safetensors")):
            raise InputError(f"The folder '{folder}' holds no weights as *.safetensors, the only kind that is loaded.")


def path_of(scheduler: Any, family: str) -> tuple[Path, str]:
    """The path that a pipeline was trained on, and the kind of its network's prediction, in its scheduler's own word.

    Raises `InputError` for a scheduler of another kind than the family's, and for settings that are not a path.
    """
    name, config = type(scheduler).__name__, scheduler.config
    if family in ("sd3", "flux"):
        if not name.startswith(("FlowMatchEuler", "FlowMatchHeun")):
            raise InputError(f"The scheduler of this pipeline must be a FlowMatchEulerDiscreteScheduler, got a {name}.")
        return Linear(), "velocity"
    levels = getattr(scheduler, "alphas_cumprod", None)
    if levels is None:
        raise InputError(f"The scheduler of this pipeline must have betas; a {name} has no alphas_cumprod.")
    kind = config.get("prediction_type", "epsilon")
    if kind not in ("epsilon", "v_prediction", "sample"):
        raise InputError(f"prediction_type of the scheduler must be epsilon, v_prediction or sample, got '{kind}'.")
    for setting in ("clip_sample", "thresholding"):
        if config.get(setting):
            raise InputError(
                f"The scheduler cuts off what the network predicts ({setting}), after which no step has a density; "
                f"set {setting} to false in scheduler_config.json."
            )
    return Tabulated(tuple(levels.double().tolist())), str(kind)


def shift_of(scheduler: Any, tokens: int) -> float:
    """The factor of the time shift that a flow-matching scheduler has for images of this many tokens.

    Static, or with `use_dynamic_shifting` exp(mu) (or mu, for the type "linear"), mu linear in the tokens.
    """
    config = scheduler.config
    for setting in ("shift_terminal", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"):
        if config.get(setting):
            raise InputError(f"The scheduler's '{setting}' is not supported; give the flow its `times`.")
    if config.get("invert_sigmas"):
        raise InputError("The scheduler's time runs the other way (invert_sigmas), which is not supported.")
    if not config.get("use_dynamic_shifting"):
        return float(config.get("shift", 1.0))
    low, high = config["base_image_seq_len"], config["max_image_seq_len"]
    slope = (config["max_shift"] - config["base_shift"]) / (high - low)
    mu = config["base_shift"] + slope * (tokens - low)
    return mu if config.get("time_shift_type") == "linear" else math.exp(mu)


def add_adapter(pipeline: Any, part: str, lora: Mapping[str, Any] | str | os.PathLike[str]) -> None:
    """Add a LoRA adapter (Hu et al. 2021, arXiv 2106.09685) to the network: it alone learns, in float32 at least.

    `lora`: options of `peft.LoraConfig`, by default on the projections of all attention layers, or a folder that an
    adapter was saved to. A new adapter's random start is the same in every run and leaves torch's global generator as
    it was.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise InputError("LoRA needs peft, which is not installed: pip install 'stepwell[lora]'.") from error
    model = getattr(pipeline, part)
    if isinstance(lora, (str, os.PathLike)):
        if not (FilePath(lora) / LORA_FILE).is_file():
            raise InputError(f"lora must be options or the folder of a saved adapter; '{lora}' holds no {LORA_FILE}.")
        _check_adapter(FilePath(lora) / LORA_FILE)
        try:
            with quiet(warnings=False):  # of text encoders without an adapter
                pipeline.load_lora_weights(
                    str(lora), weight_name=LORA_FILE, adapter_name="default", use_safetensors=True
                )
        except Exception as error:  # whatever diffusers and peft raise
            raise InputError(f"The adapter '{lora}' does not fit this pipeline: {first_line_of(error)}.") from error
    else:
        default = {"target_modules": ATTENTION if part == "unet" else JOINT_ATTENTION}
        try:
            with loading.fixed_start():
                model.add_adapter(LoraConfig(**{**default, **lora}))  # type: ignore[arg-type]
        except (TypeError, ValueError) as error:
            reason = f"{first_line_of(error)}."
            raise InputError(f"The LoRA options {dict(lora)} do not fit this network: {reason}") from error
    if not getattr(model, "peft_config", None):
        raise InputError(f"The adapter '{lora}' has nothing for the pipeline's {part}.")
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            if parameter.dtype in (torch.float16, torch.bfloat16):
                parameter.data = parameter.data.float()
            parameter.requires_grad_(True)


def _check_adapter(file: FilePath) -> None:
    """Raise `InputError` for an adapter with layers for text encoders, which never learn and are not saved."""
    from safetensors import safe_open

    with reading(f"The adapter '{file}'"), safe_open(file, "pt") as tensors:
        theirs = [name for name in tensors.keys() if name.startswith(("text_encoder", "lora_te"))]  # noqa: SIM118
    if theirs:
        raise InputError(
            f"The adapter '{file}' also adapts text encoders (first '{theirs[0]}'), which would be lost on saving; "
            "fuse it into the pipeline with diffusers' fuse_lora(), save that, and give it as the model."
        )


def write(pipeline: Any, part: str, model: nn.Module, folder: str | os.PathLike[str], what: str) -> None:
    """Write `model`, the pipeline's `part`, so that diffusers loads it; what else the folder holds stays.

    `what` is `adapter`, one file, or the whole pipeline with the adapter `merged` into a copy of the network, or left
    out (`base`). Every part of a pipeline is there whole or not at all, and `model_index.json` comes last.
    """
    target = writable_folder(FilePath(folder))
    temporary = target / f".pipeline.tmp{os.getpid()}"
    with writing(target):
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            temporary.mkdir()
            with quiet():
                if what == "adapter":
                    _write_adapter(pipeline, part, model, temporary)
                else:
                    _write_pipeline(pipeline, part, model, temporary, keep=what == "merged")
            for made in sorted(temporary.iterdir(), key=lambda path: path.name == "model_index.json"):
                if made.is_dir():
                    before = temporary.with_name(f"{temporary.name}.{made.name}")
                    if (target / made.name).exists():
                        os.replace(target / made.name, before)
                    os.replace(made, target / made.name)
                    shutil.rmtree(before, ignore_errors=True)
                else:
                    write_whole(target / made.name, made.read_bytes())
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _write_adapter(pipeline: Any, part: str, model: Any, folder: FilePath) -> None:
    from peft.utils import get_peft_model_state_dict

    settings = {
        name: sorted(value) if isinstance(value, set) else value
        for name, value in model.peft_config["default"].to_dict().items()
    }
    weights = get_peft_model_state_dict(model)
    pipeline.save_lora_weights(
        folder, **{f"{part}_lora_layers": weights, f"{part}_lora_adapter_metadata": settings}, safe_serialization=True
    )
    _order_metadata(folder / LORA_FILE)


def _order_metadata(file: FilePath) -> None:
    """Put the metadata of a safetensors file in order: the library writes the same ones in another at each call."""
    content = file.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[end:])


def _write_pipeline(pipeline: Any, part: str, model: Any, folder: FilePath, keep: bool) -> None:
    whole = model
    if getattr(model, "peft_config", None):
        whole = copy.deepcopy(model)
        if keep:
            whole.fuse_lora()
        whole.unload_lora()
    before = getattr(pipeline, part)
    setattr(pipeline, part, whole)
    try:
        pipeline.save_pretrained(folder, safe_serialization=True)
    finally:
        setattr(pipeline, part, before)


@contextlib.contextmanager
def quiet(warnings: bool = True) -> Iterator[None]:
    """Hide the progress bars of diffusers and transformers, which would cover the lines that a run prints."""
    from diffusers.utils import logging

    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    if not warnings:
        logging.set_verbosity_error()
    try:
        with loading.quiet():
            yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()
