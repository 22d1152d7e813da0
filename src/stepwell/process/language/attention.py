"""Attention of our own inside a model of `transformers`, for one call of the model at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "stepwell"
"""What our attention is called among those of `transformers`."""

REFUSED = ("sliding_window", "position_bias", "s_aux", "cache")
"""What attention may be told that changes who sees whom, or how much, in a way that is not known here."""


class Attention(Protocol):
    """Who sees whom in one call of the model."""

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, cap: float | None
    ) -> Tensor: ...  # query (N, heads, n, D); the answer is (N, n, heads, D)


def _forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    own_attention: Attention | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    unknown = [name for name in REFUSED if others.get(name) is not None]
    if own_attention is None or unknown or attention_mask is not None:
        raise NotImplementedError(f"{type(module).__name__} has {' and '.join(unknown) or 'a mask of its own'}")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer: Any = module.layer_idx
    return own_attention.attend(layer, query, key, value, scaling, softcap), None


def can_take(model: PreTrainedModel) -> bool:
    """Whether the model lets others attend for it: full causal attention in every layer, and nothing else."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    return bool(getattr(model, "_supports_attention_backend", False)) and kinds == {"full_attention"}


@contextlib.contextmanager
def taken_over(model: PreTrainedModel) -> Iterator[None]:
    """While it is on, the model's attention is that of the `own_attention` its forward is given."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, _forward)
    config = model.config.get_text_config()
    before = config._attn_implementation
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before


def near(found: Tensor, right: Tensor, tolerance: float) -> bool:
    """Whether both are the same up to `tolerance`, relative to the largest or to 1."""
    gap = (found - right).abs().max()
    return bool(gap <= tolerance * right.abs().max().clamp(min=1)) and not bool(torch.isnan(gap))
