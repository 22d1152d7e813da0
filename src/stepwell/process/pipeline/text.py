"""The two ends of a pipeline: prompts into embeddings, each once, and latents into images."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stepwell.digests import stored, weights_digest
from stepwell.errors import InputError, StepwellError


class TextEncoder:
    """Prompts as the condition of the pipeline's network: `prompt_embeds` (N, L, D), and `pooled_prompt_embeds` (N, P).

    The pipeline's own text encoders make it, without gradients. Each text is encoded once, by itself, so that its
    embedding is the same to the last bit whatever it is drawn beside, and is kept in the host's memory.
    """

    def __init__(self, pipeline: Any, family: str, max_sequence_length: int | None = None):
        self.pipeline, self.family = pipeline, family
        self.options = {} if max_sequence_length is None else {"max_sequence_length": max_sequence_length}
        self.embeddings: dict[str, dict[str, Tensor]] = {}
        self.negative_prompt: str | None = None

    def __call__(self, prompts: Sequence[Any]) -> dict[str, Tensor]:
        """One row a prompt. Raises `InputError` for a prompt that is not a text."""
        for prompt in prompts or [""]:
            self.check(prompt)
            if prompt not in self.embeddings:
                self.embeddings[prompt] = self._checked(self._encoded(prompt)[0], prompt)
        rows = [self.embeddings[prompt] for prompt in prompts or [""]]
        return {name: torch.cat([row[name] for row in rows])[: len(prompts)] for name in rows[0]}

    def check(self, prompt: Any) -> None:
        """Raise `InputError` for a prompt that is not a text."""
        if not isinstance(prompt, str):
            raise InputError(f"A prompt of a pipeline must be a text, got {prompt!r:.60}.")

    def unconditional(self, negative_prompt: str | None = None) -> dict[str, Tensor]:
        """The condition that guidance compares with, one row: of the negative prompt, or of the pipeline's default."""
        self.negative_prompt = negative_prompt
        return self._checked(self._encoded("", negative_prompt)[1], negative_prompt or "")

    @functools.cached_property
    def weights(self) -> str:
        """A digest of the text encoders' weights, which never change."""
        parts = [getattr(self.pipeline, name, None) for name in ("text_encoder", "text_encoder_2", "text_encoder_3")]
        return " ".join(weights_digest(stored(part)) for part in parts if part is not None)

    def describe(self) -> dict[str, Any]:
        """All that decides an embedding."""
        return {"weights": self.weights, "negative_prompt": self.negative_prompt, **self.options}

    @torch.no_grad()
    def _encoded(self, prompt: str, negative: str | None = None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The embeddings of a prompt, and those of its negative prompt."""
        encode, device = self.pipeline.encode_prompt, self.pipeline.device
        common = {"device": device, "num_images_per_prompt": 1, **self.options}
        if self.family == "flux":
            pairs = [encode(text, text, **common)[:2] for text in (prompt, negative or "")]
            return _named(*pairs[0]), _named(*pairs[1])
        common |= {"do_classifier_free_guidance": True, "negative_prompt": negative}
        if self.family == "sd":
            text, bare = encode(prompt, **common)
            return {"prompt_embeds": text}, {"prompt_embeds": bare}
        others = {"prompt_2": prompt} if self.family == "sdxl" else {"prompt_2": prompt, "prompt_3": prompt}
        text, bare, pooled, bare_pooled = encode(prompt, **others, **common)
        return _named(text, pooled), _named(bare, bare_pooled)

    def _checked(self, entries: dict[str, Tensor], prompt: str) -> dict[str, Tensor]:
        for name, value in entries.items():
            if not bool(torch.isfinite(value).all()):
                raise StepwellError(
                    f"The text encoders' {name} of '{prompt[:60]}' has values that are NaN or infinite."
                )
        return {name: value.cpu() for name, value in entries.items()}


def _named(text: Tensor, pooled: Tensor) -> dict[str, Tensor]:
    return {"prompt_embeds": text, "pooled_prompt_embeds": pooled}


class ImageDecoder:
    """Latents (N, C, H, W) as images (N, 3, H', W') in [0, 1], by the pipeline's autoencoder, one row at a time.

    Differentiable in the latents where gradients are on, but for values cut off at 0 and 1; the autoencoder itself
    never learns.
    """

    def __init__(self, autoencoder: Any):
        self.autoencoder = autoencoder
        config = autoencoder.config
        self.shift = float(config.get("shift_factor") or 0.0)
        self.scale = float(config.scaling_factor)
        mean, deviation = config.get("latents_mean"), config.get("latents_std")
        self.moments = None if mean is None or deviation is None else (torch.tensor(mean), torch.tensor(deviation))

    @functools.cached_property
    def weights(self) -> str:
        """A digest of the autoencoder's weights, which never change."""
        return weights_digest(stored(self.autoencoder))

    def describe(self) -> dict[str, Any]:
        """All that decides an image."""
        return {"weights": self.weights, "shift": self.shift, "scale": self.scale}

    def __call__(self, latents: Tensor) -> Tensor:
        x = latents.to(self.autoencoder.dtype)
        if self.moments is not None:
            mean, deviation = (value.to(x).reshape(1, -1, 1, 1) for value in self.moments)
            x = x * deviation / self.scale + mean
        else:
            x = x / self.scale + self.shift
        images = torch.cat([self.autoencoder.decode(row, return_dict=False)[0] for row in x.split(1)])
        if not bool(torch.isfinite(images).all()):
            raise StepwellError("The decoded images have values that are NaN or infinite: the latents diverged.")
        return (images.float() / 2.0 + 0.5).clamp(0.0, 1.0)
