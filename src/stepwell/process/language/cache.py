"""Caches and recurrent states that fork: a row goes on several times, and what it came from stays as it was."""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from stepwell.errors import InputError

NAMES = ("cache", "past_key_values", "state")
"""The names that models have for the argument that holds what they have read; `transformers` 5.24 renamed it."""

IN_MODULES = ("conv1d_state", "recurrent_states")
"""The attributes in which modules keep their states between two calls."""

ROWS = {"indexer_position_ids": 1}
"""The dimension that lists the rows, of tensors in a cache where it is not the first."""


def cache_argument(model: Any) -> str:
    """The name of the model's argument for what it has read; `InputError` for a model that has none."""
    names = inspect.signature(model.forward).parameters
    for name in NAMES:
        if name in names:
            return name
    raise InputError(f"{type(model).__name__} takes no cache, so it cannot be read token by token.")


def empty_cache(model: Any) -> Any:
    """A fresh dynamic cache for a causal language model of `transformers`; None for one that makes a kind of its own.

    A kind of its own is a class of a cache in the model's module, or a bare list of states.
    """
    from transformers.cache_utils import CacheLayerMixin, DynamicCache

    module = type(model).__module__
    own = [
        kind
        for kind in vars(sys.modules[module]).values()
        if isinstance(kind, type) and kind.__module__ == module and kind.__name__.endswith("Cache")
    ]
    if cache_argument(model) == "state" or any(not issubclass(kind, CacheLayerMixin) for kind in own):
        return None
    return DynamicCache(config=model.config)


def layer_kinds(cache: Any) -> set[type]:
    """The kinds of a cache's layers."""
    return {type(layer) for layer in getattr(cache, "layers", ())}


def keeps_attention_only(cache: Any) -> bool:
    """True for a cache of keys and values alone, which are never overwritten and which a mask can leave out."""
    from transformers.cache_utils import DummyLayer, DynamicIndexedLayer, DynamicLayer, DynamicSlidingWindowLayer

    attention = {DynamicLayer, DynamicSlidingWindowLayer, DynamicIndexedLayer, DummyLayer}
    return cache is not None and bool(layer_kinds(cache)) and layer_kinds(cache) <= attention


def forked(cache: Any, index: Tensor | None) -> Any:
    """The cache with the rows at `index` (N,), or all of them if it is None.

    With all rows of keys and values, only the layer objects are copied: the next forward pass concatenates to new
    tensors, so the cache that was forked never changes. Recurrent states are overwritten in place, and so are copied.
    """
    from stepwell.process.language.shared_prefix import SharedCache

    if isinstance(cache, SharedCache):
        return cache.chosen(index)
    if index is not None:
        return _mapped(lambda dim, tensor: tensor.index_select(dim, index), cache)
    return _mapped(lambda _, tensor: tensor, cache) if keeps_attention_only(cache) else _mapped(_copied, cache)


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
    return _mapped(lambda dim, *tensors: torch.cat(tensors, dim), *caches)


def swap_states(model: Any, states: Any) -> Any:
    """Put states (None: fresh ones) into the modules of a model that keeps them there, and return what was there."""
    kept = []
    for number, (module, name) in enumerate((m, n) for m in model.modules() for n in IN_MODULES if n in vars(m)):
        kept.append(getattr(module, name))
        setattr(module, name, states[number] if states else None)
    return kept


def _copied(_: int, tensor: Tensor) -> Tensor:
    return tensor.clone()


def _mapped(change: Callable[..., Tensor], *values: Any, name: str = "") -> Any:
    """Caches of one structure as one, with `change(dimension of the rows, tensor of each)` in place of each tensor.

    Objects of `transformers`, dicts, lists and tuples are entered; anything else, and numbers, are the first's.
    """
    first = values[0]
    if isinstance(first, Tensor):
        return change(ROWS.get(name, 0), *values) if first.dim() > 1 else first
    if isinstance(first, dict):
        return {key: _mapped(change, *(value[key] for value in values), name=name) for key in first}
    if isinstance(first, list | tuple):
        return type(first)(_mapped(change, *parts, name=name) for parts in zip(*values, strict=True))
    if not type(first).__module__.startswith("transformers.") or type(first).__name__.endswith("Config"):
        return first
    twin = copy.copy(first)
    for key in vars(first):
        setattr(twin, key, _mapped(change, *(vars(value)[key] for value in values), name=key))
    return twin
