"""Digests of tensors: the same for the same bits in every run and on every device, another for any other bits."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn

BLOCK = 2**20
"""The words that are summed at once."""


def weights_digest(tensors: Mapping[str, Tensor]) -> str:
    """A digest of every bit of some tensors, by two sums a tensor: of its words, and of them times their places.

    Both wrap around at 64 bits, so that they do not depend on the order of summation, nor on the device.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}:{tuple(tensor.shape)}:{tensor.dtype}:{_sums(tensor)}".encode())
    return digest.hexdigest()


def stored(module: nn.Module) -> dict[str, Tensor]:
    """The tensors of a module that its folder holds: parameters, and buffers that are no scratch space."""
    import torch

    return {name: value for name, value in module.state_dict().items() if isinstance(value, torch.Tensor)}


def structure_digest(module: nn.Module) -> str:
    """A digest of the layers of a module and their settings, as it writes itself."""
    return hashlib.sha256(re.sub(r" at 0x[0-9a-fA-F]+", "", repr(module)).encode()).hexdigest()


def _sums(tensor: Tensor) -> tuple[int, int]:
    import torch

    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if tensor.numel() == 0 or tensor.is_meta:
        return 0, 0
    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    words = tensor.contiguous().view(whole[tensor.element_size()]).flatten()
    places = torch.arange(1, min(BLOCK, len(words)) + 1, device=words.device)
    plain = placed = torch.zeros((), dtype=torch.int64, device=words.device)
    for number, block in enumerate(words.split(BLOCK), 1):
        block = block.long()
        own = block.sum()
        plain, placed = plain + own, placed + (block * places[: len(block)]).sum() + number * BLOCK * own
    return int(plain), int(placed)
