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
"""The name under which `transformers` finds our attention."""

REFUSED = ("sliding_window", "position_bias", "s_aux", "cache")
"""Attention arguments that change masking or scores and that this implementation does not support."""


class Attention(Protocol):
    """The attention of one call of the model."""

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, cap: float | None
    ) -> Tensor: ...  # (N, n, heads, D) from query (N, heads, n, D)


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
    refused = [name for name in REFUSED if others.get(name) is not None]
    if own_attention is None or refused or attention_mask is not None:
        raise NotImplementedError(f"{type(module).__name__} has {' and '.join(refused) or 'a mask of its own'}")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer: Any = module.layer_idx
    return own_attention.attend(layer, query, key, value, scaling, softcap), None


def can_take(model: PreTrainedModel) -> bool:
    """True for a model whose attention can be replaced: full causal attention in every layer, and nothing else."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    return bool(getattr(model, "_supports_attention_backend", False)) and kinds == {"full_attention"}


@contextlib.contextmanager
def taken_over(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the model attends through the `own_attention` that its forward is given."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, _forward)
    config = model.config.get_text_config()
    before = config._attn_implementation
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before


def near(fast: Tensor, plain: Tensor, tolerance: float) -> bool:
    """True if both are the same up to `tolerance`, relative to the largest of `plain` or to 1."""
    gap = (fast - plain).abs().max()
    return bool(gap <= tolerance * plain.abs().max().clamp(min=1)) and not bool(torch.isnan(gap))
