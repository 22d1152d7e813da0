"""Text-to-image pipelines of `diffusers` as a process: a step denoises latents, a sample is the decoded image."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from stepwell.errors import InputError
from stepwell.process.flow.denoiser import Denoiser
from stepwell.process.flow.process import Flow
from stepwell.process.flow.sampler import sampler_with
from stepwell.process.language import loading
from stepwell.process.pipeline import loading as pipeline_loading
from stepwell.process.pipeline.networks import SD3, Flux, PipelineNetwork, UNet
from stepwell.process.pipeline.text import ImageDecoder, TextEncoder
from stepwell.ranges import checked
from stepwell.solver.path import Path
from stepwell.solver.table import Table

PREDICTS = {"epsilon": "noise", "v_prediction": "data", "sample": "data", "velocity": "velocity"}


@checked("model", "lora", "solver")
def pipeline(
    model: str | os.PathLike[str],
    *,
    lora: Mapping[str, Any] | str | os.PathLike[str] | None = None,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device | None = None,
    height: int | None = None,
    width: int | None = None,
    guidance: float | None = None,
    negative_prompt: str | None = None,
    solver: str | Table | None = None,
    steps: int | None = None,
    times: Sequence[float] | None = None,
    shift: float | None = None,
    max_sequence_length: int | None = None,
    checkpointing: bool = False,
    variant: str | None = None,
    states_at_once: int | None = None,
) -> Flow:
    """A text-to-image pipeline of diffusers as a process: Stable Diffusion 1.x and 2.x, SDXL, SD3, FLUX.1.

    `model` is a folder that holds a `model_index.json`, or a hub id. Weights come from safetensors only, of those that
    `variant` names if it is given, and no code that comes with a pipeline is ever run. Prompts are texts, samples are
    images (3, height, width) from 0 to 1. The path, the time shift and the kind of prediction are those of the
    pipeline's scheduler; solver (`ddim`, or `euler` on the linear path), steps and guidance default to the pipeline's
    own, and the grid is uniform in time after the `shift`, unless `times` gives it.

    `guidance` is diffusers' `guidance_scale`: none up to 1, and for FLUX.1-dev an input of the network, which guides by
    a second evaluation `with_sampler(guidance=...)`. `negative_prompt` is the text that guidance compares with.
    `lora`: options of `peft.LoraConfig`, `{}` for the defaults, or a folder with an adapter; then only the adapter
    learns and `frozen()` is the base. Without it the whole network learns. `checkpointing` computes activations again
    in the backward pass to save memory. Text encoders and the autoencoder never learn. `process.save(folder)` writes
    what diffusers loads: an adapter by `load_lora_weights`, a network that learned as a whole by `from_pretrained`.
    A safety checker is neither loaded nor run nor saved.

    Raises `InputError` for a pipeline or an option that cannot be used.
    """
    format_ = loading.dtype_named(dtype)
    if device is None:
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        device = "cpu" if accelerator is None else accelerator
    loaded, family = pipeline_loading.load(model, format_, loading.device_named(device), variant)
    part = "unet" if family in ("sd", "sdxl") else "transformer"
    path, kind = pipeline_loading.path_of(loaded.scheduler, family)
    shape = _shape(loaded, family, part, height, width)
    defaults = {name: entry.default for name, entry in inspect.signature(type(loaded).__call__).parameters.items()}
    scale = float(defaults["guidance_scale"] if guidance is None else guidance)
    if max_sequence_length is not None and "max_sequence_length" not in defaults:
        raise InputError("max_sequence_length must be left out: this pipeline's prompts have a fixed length.")
    if lora is not None:
        pipeline_loading.add_adapter(loaded, part, lora)
    else:
        getattr(loaded, part).requires_grad_(True)
    if checkpointing:
        getattr(loaded, part).enable_gradient_checkpointing()
    embedded = scale if family == "flux" and loaded.transformer.config.guidance_embeds else None
    if family == "flux" and embedded is None and guidance is not None:
        raise InputError("guidance must be left out: this FLUX.1 has no guidance scale as an input.")
    network = _network(loaded, family, part, shape, path, kind, embedded)
    encode = TextEncoder(loaded, family, max_sequence_length)
    unconditional = encode.unconditional(negative_prompt)
    network.check(unconditional)
    settings: dict[str, Any] = {"guidance": 1.0 if family == "flux" else max(scale, 1.0)}
    settings["solver"] = solver or ("ddim" if family in ("sd", "sdxl") else "euler")
    if times is not None:
        settings["times"] = times
    settings |= {name: value for name, value in (("steps", steps), ("shift", shift)) if value is not None}
    if times is None:
        settings.setdefault("steps", defaults["num_inference_steps"])
    if times is None and family in ("sd3", "flux"):
        settings.setdefault("shift", pipeline_loading.shift_of(loaded.scheduler, _tokens(shape, network)))
    denoiser = Denoiser.of(
        network,
        shape,
        path,
        PREDICTS[kind],
        dtype=torch.float64 if format_ == torch.float64 else torch.float32,
        encode=encode,
        unconditional=unconditional,
        decode=ImageDecoder(loaded.vae),
        states_at_once=states_at_once,
    )
    return Flow(denoiser, sampler_with(None, path, settings))


def _shape(loaded: Any, family: str, part: str, height: int | None, width: int | None) -> tuple[int, int, int]:
    """(C, H, W) of the latents of images of this size; the pipeline's own size where none is given."""
    config, scale = getattr(loaded, part).config, int(loaded.vae_scale_factor)
    patch = {"sd": 1, "sdxl": 1, "sd3": config.get("patch_size") or 1, "flux": 2}[family]
    size = config.sample_size if family == "sd" else loaded.default_sample_size
    usual = (size, size) if isinstance(size, int) else tuple(size)
    pixels = [side * scale if given is None else given for given, side in zip((height, width), usual, strict=True)]
    for name, side in zip(("height", "width"), pixels, strict=True):
        if not isinstance(side, int) or side < 1 or side % (scale * patch):
            raise InputError(f"{name} must be a positive multiple of {scale * patch} for this pipeline, got {side}.")
    channels = config.in_channels // 4 if family == "flux" else config.in_channels
    if channels != loaded.vae.config.latent_channels:
        raise InputError(
            f"The network denoises {channels} channels, but the autoencoder's latents have "
            f"{loaded.vae.config.latent_channels}; give a pipeline that makes images from text alone."
        )
    largest = config.get("pos_embed_max_size") if family == "sd3" else None
    if largest and max(pixels) > largest * scale * patch:
        raise InputError(
            f"height and width must be at most {largest * scale * patch} for this pipeline, got {pixels[0]} and "
            f"{pixels[1]}."
        )
    return channels, pixels[0] // scale, pixels[1] // scale


def _tokens(shape: tuple[int, int, int], network: PipelineNetwork) -> int:
    patch = 2 if isinstance(network, Flux) else network.model.config.patch_size
    return (shape[1] // patch) * (shape[2] // patch)


def _network(
    loaded: Any, family: str, part: str, shape: tuple[int, int, int], path: Path, kind: str, guidance: float | None
) -> PipelineNetwork:
    model = getattr(loaded, part)
    config = model.config

    def write(model: Any, folder: str | os.PathLike[str], what: str) -> None:
        pipeline_loading.write(loaded, part, model, folder, what)

    if part == "transformer":
        widths = {"prompt_embeds": config.joint_attention_dim, "pooled_prompt_embeds": config.pooled_projection_dim}
        if family == "flux":
            return Flux(model, shape, widths, write, guidance)
        return SD3(model, shape, widths, write, loaded.scheduler.config.num_train_timesteps)
    if config.time_cond_proj_dim is not None:
        raise InputError("A UNet with the guidance scale as an input (time_cond_proj_dim) is not supported.")
    widths, time_ids = {"prompt_embeds": config.cross_attention_dim}, None
    if family == "sdxl":
        if config.addition_embed_type != "text_time" or loaded.config.get("requires_aesthetics_score"):
            raise InputError(
                "An SDXL UNet must be conditioned on its pooled text and six sizes; this one has other inputs."
            )
        widths["pooled_prompt_embeds"] = (
            config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        )
        size = (shape[1] * int(loaded.vae_scale_factor), shape[2] * int(loaded.vae_scale_factor))
        time_ids = (*size, 0, 0, *size)
    elif config.addition_embed_type is not None:
        raise InputError(f"A UNet with addition_embed_type '{config.addition_embed_type}' needs an SDXL pipeline.")
    return UNet(model, shape, widths, write, path, loaded.scheduler.config.num_train_timesteps, kind, time_ids)
