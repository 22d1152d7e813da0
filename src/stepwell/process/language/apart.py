"""Rows that a model must not read together, because what one of them gets would depend on the lengths of the others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stepwell.process.language.prompts import Packed


@dataclass(frozen=True)
class Apart:
    """The rows that a model can read together.

    `padless`: only rows of equal length, so that none is padded: a recurrent state would read the padding too.
    `switch`: rows of at most this many tokens apart from longer ones, for which the model changes its positions'
    frequencies (LongRoPE, Ding et al. 2024); a row that grows beyond it is read again from its beginning.
    """

    padless: bool = False
    switch: int | None = None

    @property
    def any(self) -> bool:
        return self.padless or self.switch is not None

    def key(self, length: Tensor) -> Tensor:
        """(N,) numbers that are equal for rows of `length` (N,) tokens which can be read together."""
        if self.padless:
            return length
        return torch.zeros_like(length) if self.switch is None else (length > self.switch).long()

    def groups(self, rows: Tensor, length: Tensor) -> Iterator[Tensor]:
        """The `rows` (M,) in groups that can be read together, given the `length` (M,) of each; in order."""
        if not self.any:
            yield rows
            return
        key = self.key(length)
        for value in key.unique().tolist():
            yield rows[key == value]

    def split(self, packed: Packed) -> list[tuple[Tensor, Packed]]:
        """The steps of `packed` in parts to be scored by themselves: the places (m,) of a part's steps, and its rows.

        A step was drawn from a row that ended before it, so those up to the switch belong to the row cut off there.
        """
        assert self.switch is not None
        early = packed.column < self.switch
        parts: list[tuple[Tensor, Packed]] = []
        for side, width in ((early, min(self.switch, packed.ids.shape[1])), (~early, packed.ids.shape[1])):
            places = side.nonzero()[:, 0]
            if len(places):
                rows, row = packed.row[places].unique(return_inverse=True)
                ids, mask = packed.ids[rows, :width], packed.mask[rows, :width]
                part = Packed(ids, mask, row, packed.step[places], packed.column[places], packed.action[places])
                parts.append((places, part))
        return parts


def long_rope_switch(config: Any) -> int | None:
    """The longest row that a model's configuration reads with LongRoPE's short factors; None without LongRoPE."""
    declared = getattr(config, "rope_parameters", None) or {}
    for rope in (declared, *(value for value in declared.values() if isinstance(value, Mapping))):
        if rope.get("rope_type") == "longrope":
            switch = rope.get("original_max_position_embeddings")
            return int(switch if switch is not None else config.original_max_position_embeddings)
    return None
