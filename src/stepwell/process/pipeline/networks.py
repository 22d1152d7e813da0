"""The denoising networks of diffusers' pipelines, each called as network(x, t, **condition) with t from 0 to 1."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stepwell.errors import InputError
from stepwell.process.base import refuse_no_adapter
from stepwell.process.language.description import in_values
from stepwell.solver.path import Path

Write = Callable[[Any, str | os.PathLike[str], str], None]
"""Writes the pipeline around a network: (network, folder, what), with what one of `adapter`, `merged`, `base`."""


class PipelineNetwork(nn.Module):
    """The base of all: a network of diffusers, always in evaluation mode, in a number format of its own.

    `forward` takes latents x (N, C, H, W), the time t (N,) and the condition, and returns a prediction like x.
    `widths` are the entries of the condition by name, each with the size of its last dimension. Dropout is never on:
    it would draw other numbers when scoring than when sampling.
    """

    def __init__(self, model: Any, shape: tuple[int, int, int], widths: Mapping[str, int], write: Write):
        super().__init__()
        self.model = model.eval()
        self.shape, self.widths, self.write = shape, dict(widths), write
        # an adapter may be in another format than the network it is in
        self.dtype = next(value.dtype for name, value in model.named_parameters() if "lora_" not in name)

    @property
    def adapted(self) -> bool:
        return bool(getattr(self.model, "peft_config", None))

    def forward(self, x: Tensor, t: Tensor, **condition: Tensor) -> Tensor:
        """Raises `InputError` for latents or a condition of another shape than the network was made for."""
        if tuple(x.shape[1:]) != self.shape:
            raise InputError(f"Latents of this pipeline must be of shape {self.shape}, got {tuple(x.shape[1:])}.")
        self.check(condition)
        entries = {name: value.to(x.device, self.dtype) for name, value in condition.items()}
        if self.model.training:
            self.model.eval()
        return self.predict(x, t, entries).to(x.dtype)

    def predict(self, x: Tensor, t: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        """The network's configuration, its adapter, and what is handed to it besides states and conditions."""
        own = {name: getattr(self, name, None) for name in ("guidance", "time_ids", "steps", "kind")}
        adapter = self.model.peft_config["default"].to_dict() if self.adapted else None
        return {**own, "format": str(self.dtype), **in_values(dict(self.model.config), adapter)}

    def check(self, condition: Mapping[str, Tensor]) -> None:
        """Raise `InputError` unless the condition has the entries, and the widths, that the network reads."""
        if condition.keys() != self.widths.keys():
            given = ", ".join(sorted(condition)) or "nothing"
            raise InputError(f"The pipeline's condition must be {', '.join(sorted(self.widths))}, got {given}.")
        for name, width in self.widths.items():
            if condition[name].shape[-1] != width:
                raise InputError(
                    f"The pipeline's {name} must be of width {width} for its network, got {condition[name].shape[-1]} "
                    "from its text encoders."
                )

    @contextlib.contextmanager
    def without_adapter(self) -> Iterator[None]:
        """The network as it was before any training, for an adapted one."""
        self.model.disable_adapters()
        try:
            yield
        finally:
            self.model.enable_adapters()

    def frozen(self) -> nn.Module:
        """A twin that cannot learn: a copy, or for an adapted network its base, on the same weights."""
        if self.adapted:
            return Base(self)
        twin = copy.copy(self)
        twin._modules = {"model": copy.deepcopy(self.model).requires_grad_(False)}
        return twin

    def save(self, folder: str | os.PathLike[str], merged: bool | None = None) -> None:
        """The adapter as `pytorch_lora_weights.safetensors`, which `pipe.load_lora_weights(folder)` of diffusers reads.

        Without an adapter, or with `merged=True`, the whole pipeline, which `from_pretrained` of diffusers reads. What
        else the folder holds stays. Raises `InputError` where it cannot be written.
        """
        refuse_no_adapter(merged, self.adapted)
        self.write(self.model, folder, "adapter" if self.adapted and not merged else "merged")


class Base(nn.Module):
    """An adapted network with its adapter left out. It has no parameters: all of them are the adapted network's."""

    def __init__(self, adapted: PipelineNetwork):
        super().__init__()
        self._adapted = (adapted,)  # in a tuple, so that torch does not take it for a part of this module

    def forward(self, x: Tensor, t: Tensor, **condition: Tensor) -> Tensor:
        with self._adapted[0].without_adapter():
            prediction: Tensor = self._adapted[0](x, t, **condition)
            return prediction

    def frozen(self) -> Base:
        return self

    def describe(self) -> dict[str, Any]:
        """The network's own description."""
        return self._adapted[0].describe()

    def save(self, folder: str | os.PathLike[str], merged: bool | None = None) -> None:
        """The whole pipeline without the adapter."""
        refuse_no_adapter(merged, False)
        self._adapted[0].write(self._adapted[0].model, folder, "base")


class UNet(PipelineNetwork):
    """Stable Diffusion's UNet: trained on T discrete steps, of which step k is t = (k + 1) / T.

    `kind` is that of its prediction: `epsilon` is noise and `sample` data. A `v_prediction` v = alpha E - sigma D
    (Salimans and Ho 2022, arXiv 2202.00512) is returned as the data it stands for, D = alpha x - sigma v, which exists
    at every time. `time_ids` (6,) is SDXL's: the original size, the crop's corner and the target size.
    """

    def __init__(
        self,
        model: Any,
        shape: tuple[int, int, int],
        widths: Mapping[str, int],
        write: Write,
        path: Path,
        steps: int,
        kind: str,
        time_ids: tuple[int, ...] | None = None,
    ):
        super().__init__(model, shape, widths, write)
        self.path, self.steps, self.kind, self.time_ids = path, steps, kind, time_ids

    def predict(self, x: Tensor, t: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        extra = {}
        if self.time_ids is not None:
            ids = torch.tensor([self.time_ids], dtype=self.dtype, device=x.device).expand(len(x), -1)
            extra["added_cond_kwargs"] = {"text_embeds": condition["pooled_prompt_embeds"], "time_ids": ids}
        raw = self.model(
            x.to(self.dtype),
            timestep(t, self.steps),
            encoder_hidden_states=condition["prompt_embeds"],
            return_dict=False,
            **extra,
        )[0].to(x.dtype)
        if self.kind != "v_prediction":
            return raw
        t = t.reshape(-1, 1, 1, 1)
        return self.path.alpha(t) * x - self.path.sigma(t) * raw


def timestep(t: Tensor, steps: int) -> Tensor:
    """The training step, from 0 to T - 1, at time t (N,): whole where t is a training time up to its own rounding.

    Example:
        >>> timestep(torch.tensor([1 / 1000, 0.7, 1.0, 0.7003]), 1000).tolist()
        [0.0, 699.0, 999.0, 699.2999877929688]
    """
    place = (t * steps - 1.0).clamp(min=0.0)
    near = place.round()
    return torch.where((place - near).abs() <= 2.0 * steps * torch.finfo(t.dtype).eps, near, place)


class SD3(PipelineNetwork):
    """Stable Diffusion 3's transformer: the velocity, at timestep 1000 t."""

    def __init__(
        self, model: Any, shape: tuple[int, int, int], widths: Mapping[str, int], write: Write, steps: int = 1000
    ):
        super().__init__(model, shape, widths, write)
        self.steps = steps

    def predict(self, x: Tensor, t: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        prediction: Tensor = self.model(
            hidden_states=x.to(self.dtype),
            timestep=t * self.steps,
            encoder_hidden_states=condition["prompt_embeds"],
            pooled_projections=condition["pooled_prompt_embeds"],
            return_dict=False,
        )[0]
        return prediction


class Flux(PipelineNetwork):
    """FLUX.1's transformer: the velocity of latents that are packed two by two into tokens with positions.

    Latents are (C, H, W) outside, as the autoencoder has them; packing only reorders. `guidance` is the scale that
    guidance-distilled networks have as an input; None for the others.
    """

    def __init__(
        self,
        model: Any,
        shape: tuple[int, int, int],
        widths: Mapping[str, int],
        write: Write,
        guidance: float | None = None,
    ):
        super().__init__(model, shape, widths, write)
        self.guidance = guidance

    def predict(self, x: Tensor, t: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        _, height, width = self.shape
        text = condition["prompt_embeds"]
        rows, columns = torch.meshgrid(torch.arange(height // 2), torch.arange(width // 2), indexing="ij")
        positions = torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(-1, 3)
        raw = self.model(
            hidden_states=pack(x).to(self.dtype),
            timestep=(t * 1000).to(self.dtype) / 1000,  # rounded as diffusers rounds it
            guidance=None if self.guidance is None else t.new_full((len(x),), self.guidance, dtype=torch.float32),
            pooled_projections=condition["pooled_prompt_embeds"],
            encoder_hidden_states=text,
            txt_ids=torch.zeros(text.shape[1], 3, device=x.device, dtype=self.dtype),
            img_ids=positions.to(x.device, self.dtype),
            return_dict=False,
        )[0]
        return unpack(raw, height, width)


def pack(x: Tensor) -> Tensor:
    """(N, C, H, W) as (N, H/2 W/2, 4 C): each token a patch of two by two."""
    n, c, h, w = x.shape
    return x.reshape(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(n, h * w // 4, 4 * c)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `pack`: (N, H/2 W/2, 4 C) as (N, C, H, W).

    Example:
        >>> x = torch.arange(2 * 3 * 4 * 6.0).reshape(2, 3, 4, 6)
        >>> bool((unpack(pack(x), 4, 6) == x).all())
        True
    """
    n, _, c = tokens.shape
    patches = tokens.reshape(n, height // 2, width // 2, c // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(n, c // 4, height, width)
