"""A cache for groups: their prompt's keys and values are kept once and attended to once, and rows grow without copying.

The layers derive from ones of `transformers`, so this is imported inside functions, never at the head of a module.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from stepwell.process.language.truncation import in_full

ROOM = 64
"""The least number of columns that are allocated at once; more columns double it."""


class _Room:
    """Keys and values (N, H, capacity, D), of which the first `used` columns are written."""

    def __init__(self, keys: Tensor, values: Tensor, columns: int, capacity: int):
        rows, heads, _, size = keys.shape
        self.keys = keys.new_empty(rows, heads, capacity, size)
        self.values = values.new_empty(rows, heads, capacity, values.shape[-1])
        self.keys[:, :, :columns], self.values[:, :, :columns] = keys[:, :, :columns], values[:, :, :columns]
        self.used = columns


class SharedLayer(DynamicLayer):
    """One layer: the prompts' keys and values (B, H, P, D), which never change, and N rows' own (N, H, c, D).

    Forks with the same rows write into one room: the first to go on takes its next columns, and any other sees that
    they are taken and makes a room of its own. So none ever changes what another reads.
    """

    def __init__(self, prefix_keys: Tensor, prefix_values: Tensor):
        super().__init__()
        self.prefix_keys, self.prefix_values = prefix_keys, prefix_values
        self.columns = 0
        self.room: _Room | None = None
        self.dtype, self.device, self.is_initialized = prefix_keys.dtype, prefix_keys.device, True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        end = self.columns + key_states.shape[2]
        room = self.room
        if room is None:
            room = self.room = _Room(key_states, value_states, 0, max(ROOM, 2 * end))
        elif room.used != self.columns or end > room.keys.shape[2]:
            room = self.room = _Room(room.keys, room.values, self.columns, max(ROOM, 2 * end))
        room.keys[:, :, self.columns : end], room.values[:, :, self.columns : end] = key_states, value_states
        room.used = self.columns = end
        return self.own()

    def own(self) -> tuple[Tensor, Tensor]:
        """Keys and values (N, H, c, D) of the rows themselves."""
        assert self.room is not None
        return self.room.keys[:, :, : self.columns], self.room.values[:, :, : self.columns]

    def get_seq_length(self) -> int:
        return self.prefix_keys.shape[2] + self.columns

    def chosen(self, index: Tensor | None) -> SharedLayer:
        """A layer of the rows `index` (M,), or of the same rows where it is None."""
        twin = SharedLayer(self.prefix_keys, self.prefix_values)
        twin.columns, twin.room = self.columns, self.room
        if index is not None and self.room is not None:
            keys, values = (x.index_select(0, index) for x in self.own())
            twin.room = _Room(keys, values, self.columns, self.room.keys.shape[2])
        return twin


class SharedCache(Cache):
    """N rows that go on from B prompts: row i from prompt `origin[i]`; `mask` (B, P) is True at real columns."""

    def __init__(self, layers: Sequence[SharedLayer], origin: Tensor, mask: Tensor):
        super().__init__(layers=list(layers))
        self.shared = list(layers)  # the same objects, by their own kind
        self.origin, self.mask = origin, mask
        self.padded = not bool(mask.all())
        self._arranged: tuple[Tensor, Tensor] | None = None

    def chosen(self, index: Tensor | None) -> SharedCache:
        """The rows `index` (M,), each to go on by itself; all of them where it is None."""
        origin = self.origin if index is None else self.origin[index]
        return SharedCache([layer.chosen(index) for layer in self.shared], origin, self.mask)

    def arranged(self) -> tuple[Tensor, Tensor]:
        """The rows of each prompt (B, G), filled up with row 0, and the place of each row in it, flattened (N,)."""
        if self._arranged is None:
            order = self.origin.argsort(stable=True)
            count = torch.bincount(self.origin, minlength=len(self.mask))
            first = count.cumsum(0) - count
            place = torch.empty_like(order)
            place[order] = torch.arange(len(order), device=order.device) - first[self.origin[order]]
            rows = torch.zeros(len(count), int(count.max()), dtype=torch.long, device=order.device)
            rows[self.origin, place] = torch.arange(len(order), device=order.device)
            self._arranged = rows, self.origin * rows.shape[1] + place
        return self._arranged

    def plain(self) -> DynamicCache:
        """The same as an ordinary cache, with a copy of its prompt's keys and values for each row."""
        cache = DynamicCache()
        for place, layer in enumerate(self.shared):
            keys, values = layer.prefix_keys[self.origin], layer.prefix_values[self.origin]
            if layer.columns:
                own_keys, own_values = layer.own()
                keys, values = torch.cat([keys, own_keys], 2), torch.cat([values, own_values], 2)
            cache.update(keys, values, place)
        return cache

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, cap: float | None
    ) -> Tensor:
        """(N, n, heads, D) causal attention of the newest n columns (N, heads, n, D) to their prompt and their row.

        With s the scores, softmax(s) v over both parts is the mean of the parts' own, weighted with the parts'
        sums of exp(s) (Milakov & Gimelshein 2018; over shared prefixes, Juravsky et al. 2024).
        """
        prefix = self.shared[layer]
        rows, place = self.arranged()
        count, heads, new, size = query.shape
        kv_heads = key.shape[1]
        share = heads // kv_heads
        grouped = query.reshape(count, kv_heads, share * new, size)
        spread = grouped.index_select(0, rows.flatten()).unflatten(0, rows.shape).transpose(1, 2).flatten(2, 3)
        mask = self.mask[:, None, None] if self.padded else None
        seen, sums = _attention(spread, prefix.prefix_keys, prefix.prefix_values, scaling, cap, mask)
        shape = (*rows.shape, kv_heads, share * new)
        seen = seen.unflatten(2, (rows.shape[1], -1)).transpose(1, 2).reshape(-1, *shape[2:], seen.shape[-1])[place]
        sums = sums.unflatten(2, (rows.shape[1], -1)).transpose(1, 2).reshape(-1, *shape[2:])[place]
        late = None
        if new > 1:
            columns = torch.arange(key.shape[2], device=key.device)
            late = columns <= columns[-new:, None]
            late = late.repeat(share, 1)
        own, own_sums = _attention(grouped, key, value, scaling, cap, late)
        portion = torch.sigmoid(sums - own_sums)[..., None]
        whole = own + portion * (seen - own)
        return whole.to(query.dtype).unflatten(2, (share, new)).flatten(1, 2).transpose(1, 2)


def _attention(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, cap: float | None, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """softmax(s) v (..., n, D) and log sum exp(s) (..., n), in full precision, with s = scaling q k."""
    scores = in_full((query * scaling) @ key.transpose(-1, -2))
    if cap is not None:
        scores = cap * torch.tanh(scores / cap)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    peak = scores.amax(-1, keepdim=True)
    powers = scores.sub_(peak).exp_()
    total = powers.sum(-1, keepdim=True)
    return in_full(powers.to(value.dtype) @ value) / total, (peak + total.log())[..., 0]


def shared(cache: Any, mask: Tensor) -> Any:
    """A cache that was just filled with prompts, whose real columns are `mask` (B, P), as one whose rows share them.

    The cache itself, if some layer is not of the plain kind.
    """
    layers: list[SharedLayer] = []
    for layer in cache.layers:
        if type(layer) is not DynamicLayer or layer.keys is None or layer.values is None:
            return cache
        layers.append(SharedLayer(layer.keys, layer.values))
    return SharedCache(layers, torch.arange(len(mask), device=mask.device), mask)


def together(caches: Sequence[SharedCache]) -> SharedCache | None:
    """The rows of several caches, one after another, or None if they do not share the same prompts' keys."""
    first = caches[0].shared[0]
    if any(cache.shared[0].prefix_keys is not first.prefix_keys for cache in caches):
        return None
    layers: list[SharedLayer] = []
    for parts in zip(*(cache.shared for cache in caches), strict=True):
        layer = SharedLayer(parts[0].prefix_keys, parts[0].prefix_values)
        if parts[0].columns:
            layer.update(*(torch.cat(pair) for pair in zip(*(part.own() for part in parts), strict=True)))
        layers.append(layer)
    return SharedCache(layers, torch.cat([cache.origin for cache in caches]), caches[0].mask)
