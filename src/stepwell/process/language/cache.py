"""Key-value caches that fork: a row can be continued several times, and the cache it came from stays as it was."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stepwell.errors import CannotFork


def empty_cache(model: Any) -> Any:
    """A fresh dynamic cache for a causal language model of `transformers`.

    Raises `CannotFork` for a model with a layer that keeps anything but keys and values (state-space, convolution,
    hybrid and linear-attention layers overwrite their state in place).
    """
    from transformers.cache_utils import DummyLayer, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    name = type(model).__name__
    if getattr(model, "_is_stateful", False):
        raise CannotFork(f"{name} keeps a recurrent state, not keys and values only, so its samples cannot be forked.")
    cache = DynamicCache(config=model.config)
    for layer in cache.layers:
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer, DummyLayer):
            raise CannotFork(
                f"{name} has a cache layer of type {type(layer).__name__}, which cannot be forked; "
                "only full and sliding-window attention can."
            )
    return cache


def forked(cache: Any, index: Tensor | None) -> Any:
    """The cache with the rows at `index` (N,), or all of them if it is None.

    With all rows, only the layer objects are copied: the next forward pass concatenates keys and values to new
    tensors, so the cache that was forked never changes.
    """
    from stepwell.process.language.shared_prefix import SharedCache

    if isinstance(cache, SharedCache):
        return cache.chosen(index)
    twin = copy.copy(cache)
    twin.layers = [copy.copy(layer) for layer in cache.layers]
    if index is not None:
        for layer in twin.layers:
            if layer.keys is not None:
                layer.keys, layer.values = layer.keys.index_select(0, index), layer.values.index_select(0, index)
    return twin


def joined(caches: Sequence[Any]) -> Any:
    """The rows of caches with equally many columns, one after another, in a cache of their own."""
    from stepwell.process.language.shared_prefix import SharedCache, together

    if len(caches) == 1:
        return caches[0]
    if any(isinstance(cache, SharedCache) for cache in caches):
        sharing = together(caches) if all(isinstance(cache, SharedCache) for cache in caches) else None
        if sharing is not None:
            return sharing
        caches = [cache.plain() if isinstance(cache, SharedCache) else cache for cache in caches]
    whole = copy.copy(caches[0])
    whole.layers = [copy.copy(layer) for layer in caches[0].layers]
    for place, layer in enumerate(whole.layers):
        if layer.keys is not None:
            layer.keys = torch.cat([cache.layers[place].keys for cache in caches])
            layer.values = torch.cat([cache.layers[place].values for cache in caches])
    return whole
