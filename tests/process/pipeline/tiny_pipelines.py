"""Tiny random text-to-image pipelines of diffusers in folders, and latents drawn from them by diffusers and by us."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepwell.rng import Rng

KINDS = ("sd", "sdxl", "sd3", "flux")
NAMES = {
    "sd": "StableDiffusionPipeline",
    "sdxl": "StableDiffusionXLPipeline",
    "sd3": "StableDiffusion3Pipeline",
    "flux": "FluxPipeline",
}
PROMPTS = ["a cat", "two dogs, 2!"]
SHORT = {"max_sequence_length": 16}
BETAS = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def clip_tokenizer() -> Any:
    """CLIP's tokenizer over letters, with one merge, for texts of up to 16 tokens."""
    from transformers import CLIPTokenizer

    letters = [*string.ascii_lowercase, *string.digits, "!", ",", "."]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "ca", "cat</w>"]
    vocabulary = {word: i for i, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocabulary, merges=[("c", "a"), ("ca", "t</w>")], model_max_length=16)


def t5_tokenizer() -> Any:
    from transformers import T5Tokenizer

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), ("▁cat", -1.5)]
    pieces += [(letter, -3.0) for letter in string.ascii_lowercase]
    return T5Tokenizer(vocab=pieces, extra_ids=0, additional_special_tokens=[], model_max_length=16)


def clip_model(size: int, projection: int | None = None) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    words = len(clip_tokenizer())
    config = CLIPTextConfig(
        vocab_size=words,
        hidden_size=size,
        intermediate_size=2 * size,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        projection_dim=projection or size,
        bos_token_id=words - 2,
        eos_token_id=words - 1,
        pad_token_id=words - 1,
    )
    return CLIPTextModel(config) if projection is None else CLIPTextModelWithProjection(config)


def t5_model(size: int) -> Any:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(vocab_size=40, d_model=size, d_ff=2 * size, d_kv=8, num_layers=1, num_heads=2)
    return T5EncoderModel(config)


def autoencoder(latents: int, **changes: Any) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=latents,
        norm_num_groups=4,
        layers_per_block=1,
        sample_size=16,
        **changes,
    )


def unet(text: int, **changes: Any) -> Any:
    from diffusers import UNet2DConditionModel

    sizes = {
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 4,
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": text,
    }
    return UNet2DConditionModel(**(sizes | changes))


def components(kind: str, **scheduler: Any) -> dict[str, Any]:
    """What the pipeline's class is built from."""
    import diffusers

    if kind == "sd":
        return {
            "vae": autoencoder(4),
            "text_encoder": clip_model(16),
            "tokenizer": clip_tokenizer(),
            "unet": unet(16),
            "scheduler": diffusers.DDIMScheduler(**(BETAS | {"clip_sample": False, "steps_offset": 1} | scheduler)),
            "safety_checker": None,
            "feature_extractor": None,
        }
    if kind == "sdxl":
        extra = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4}
        extra |= {"projection_class_embeddings_input_dim": 6 * 4 + 12}
        return {
            "vae": autoencoder(4),
            "text_encoder": clip_model(16),
            "text_encoder_2": clip_model(16, 12),
            "tokenizer": clip_tokenizer(),
            "tokenizer_2": clip_tokenizer(),
            "unet": unet(32, **extra),
            "scheduler": diffusers.EulerDiscreteScheduler(**(BETAS | scheduler)),
        }
    plain = {"use_quant_conv": False, "use_post_quant_conv": False, "shift_factor": 0.06, "scaling_factor": 1.5}
    if kind == "sd3":
        return {
            "vae": autoencoder(4, **plain),
            "text_encoder": clip_model(16, 16),
            "text_encoder_2": clip_model(16, 16),
            "text_encoder_3": t5_model(32),
            "tokenizer": clip_tokenizer(),
            "tokenizer_2": clip_tokenizer(),
            "tokenizer_3": t5_tokenizer(),
            "transformer": diffusers.SD3Transformer2DModel(
                sample_size=8,
                patch_size=2,
                in_channels=4,
                num_layers=2,
                attention_head_dim=8,
                num_attention_heads=2,
                caption_projection_dim=16,
                joint_attention_dim=32,
                pooled_projection_dim=32,
                out_channels=4,
                pos_embed_max_size=8,
            ),
            "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(**({"shift": 3.0} | scheduler)),
        }
    assert kind == "flux"
    dynamic = {"use_dynamic_shifting": True, "shift": 3.0, "base_image_seq_len": 16, "max_image_seq_len": 64}
    return {
        "vae": autoencoder(4, **plain),
        "text_encoder": clip_model(16),
        "text_encoder_2": t5_model(16),
        "tokenizer": clip_tokenizer(),
        "tokenizer_2": t5_tokenizer(),
        "transformer": diffusers.FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=16,
            pooled_projection_dim=16,
            axes_dims_rope=(2, 2, 4),
            guidance_embeds=True,
        ),
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(**(dynamic | scheduler)),
    }


def tiny(kind: str, seed: int = 0, **scheduler: Any) -> Any:
    """A pipeline of diffusers in memory; the last layers are scaled up, so that what they predict is of order 1."""
    import diffusers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = components(kind, **scheduler)
    options = {"requires_safety_checker": False} if kind == "sd" else {}
    made = getattr(diffusers, NAMES[kind])(**parts, **options)
    made.set_progress_bar_config(disable=True)
    return made


def write(kind: str, folder: Path, **scheduler: Any) -> Path:
    """The folder of a tiny pipeline, as `save_pretrained` leaves it."""
    tiny(kind, **scheduler).save_pretrained(folder)
    return folder


def options(kind: str) -> dict[str, Any]:
    return {"height": 16, "width": 16, "steps": 4, "device": "cpu"} | (SHORT if kind in ("sd3", "flux") else {})


def ours(process: Any, noise: Tensor, prompts: list[str] = PROMPTS) -> Tensor:
    """Final latents (N, C, H, W) of the process's deterministic steps from given noise."""
    state = process.advance(process.start(prompts, Rng(0)), noise, Rng(0))
    while not bool(state.done.all()):
        state = process.advance(state, process.deterministic(state).sample(Rng(0)), Rng(0))
    return state.x


def theirs(made: Any, noise: Tensor, **settings: Any) -> Tensor:
    """What diffusers' own pipeline makes of the same prompts and noise; FLUX's latents are packed for it."""
    made.set_progress_bar_config(disable=True)
    packed = type(made).__name__ == NAMES["flux"]
    given = made._pack_latents(noise, len(noise), 4, 8, 8) if packed else noise
    options = {"output_type": "latent", "height": 16, "width": 16} | settings
    answer = made(PROMPTS, latents=given, **options).images
    return made._unpack_latents(answer, 16, 16, made.vae_scale_factor) if answer.dim() == 3 else answer


def loaded(kind: str, folder: Path) -> Any:
    import diffusers

    return getattr(diffusers, NAMES[kind]).from_pretrained(folder)


def distance(left: Tensor, right: Tensor) -> float:
    """The largest difference, relative to the largest number or to 1."""
    worst = float((left - right).abs().max() / right.abs().max().clamp(min=1.0))
    print(f"parity: {worst:.1e}")  # shown by pytest -s
    return worst


def noise_for(count: int = 2) -> Tensor:
    return Rng(3).normal(count, 4, 8, 8)


def ddim(made: Any) -> Any:
    """DDIM that starts where the noise is and ends without any: what the grid here does by itself."""
    config = made.scheduler.config
    changes = {"timestep_spacing": "trailing", "set_alpha_to_one": True, "steps_offset": 0, "clip_sample": False}
    import diffusers

    made.scheduler = diffusers.DDIMScheduler.from_config(config, **changes)
    return made


def settings_of(kind: str) -> dict[str, Any]:
    if kind == "flux":
        return {"num_inference_steps": 4, "guidance_scale": 2.5, **SHORT}
    if kind == "sd3":  # by itself diffusers shifts the ends of the grid too, and then all of it once more
        return {"sigmas": [1.0, 0.75, 0.5, 0.25], "num_inference_steps": 4, "guidance_scale": 2.5, **SHORT}
    return {"num_inference_steps": 4, "guidance_scale": 2.5}
