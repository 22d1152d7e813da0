"""Tensors in safetensors files, one at a time: written as they go, and read when they are asked for."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from stepwell.errors import CheckpointError

TYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
}
"""The names of number formats in safetensors files; tensors lie in a file from the last of these to the first."""

NAMES = {dtype: name for name, dtype in TYPES.items()}
LONGEST_HEADER = 100_000_000
"""The most bytes that safetensors reads as a header."""


def write_tensors(file: BinaryIO, tensors: Mapping[str, Tensor]) -> None:
    """Write the tensors as the bytes of a safetensors file (the format's specification is the README of
    huggingface/safetensors): the length of the header, the header, and each tensor's bytes.

    Beside the tensors, memory is taken for one of them at a time, and only if it is not contiguous or not the CPU's.
    """
    ranks = list(TYPES.values())
    order = sorted(tensors, key=lambda name: (-ranks.index(tensors[name].dtype), name))
    header, place = {}, 0
    for name in order:
        tensor = tensors[name]
        end = place + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [place, end]}
        place = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for name in order:
        file.write(_bytes(tensors[name].detach().cpu().contiguous()))


class TensorFile(Mapping[str, Tensor]):
    """The tensors of a safetensors file by name, each read from the file whenever it is asked for.

    Raises `CheckpointError` for a file that is none.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                length = int.from_bytes(file.read(8), "little")
                if not 2 <= length <= min(size - 8, LONGEST_HEADER):
                    raise ValueError(f"its header has {length} bytes")
                header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            self._entries = {str(name): _entry(name, entry, size - 8 - length) for name, entry in header.items()}
        except OSError as error:
            raise CheckpointError(f"'{path}' cannot be read: {error.strerror}.") from error
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"'{path}' is not a safetensors file: {str(error)[:80] or 'no header'}.") from error
        self._begin = 8 + length

    def __getitem__(self, name: str) -> Tensor:
        dtype, shape, place = self._entries[name]
        tensor = torch.empty(shape, dtype=dtype)
        with open(self.path, "rb") as file:
            file.seek(self._begin + place)
            file.readinto(_bytes(tensor))  # type: ignore[attr-defined]  # the size is known to be right
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def form(self, name: str) -> tuple[torch.dtype, torch.Size]:
        """The number format and the shape of a tensor, which is not read."""
        return self._entries[name][:2]

    @torch.no_grad()
    def fill(self, live: Mapping[str, Tensor]) -> None:
        """Copy the stored tensors into those of the same name.

        Raises `CheckpointError`, before anything is copied, where names, shapes or number formats are not the same.
        """
        for name in live.keys() ^ self.keys():
            raise CheckpointError(f"'{self.path}' holds {'no' if name in live else 'a'} tensor '{name:.80}'.")
        for name, tensor in live.items():
            if (tensor.dtype, tensor.shape) != self.form(name):
                dtype, shape = self.form(name)
                raise CheckpointError(
                    f"'{self.path}' holds '{name}' as {dtype} of shape {tuple(shape)}, which has to be {tensor.dtype} "
                    f"of shape {tuple(tensor.shape)}."
                )
        for name, tensor in live.items():
            tensor.copy_(self[name])


def _entry(name: str, entry: Any, room: int) -> tuple[torch.dtype, torch.Size, int]:
    """Number format, shape and place of a tensor, from its entry in a header before `room` bytes."""
    begin, end = entry["data_offsets"]
    dtype, shape = TYPES[entry["dtype"]], entry["shape"]
    if not all(type(number) is int and 0 <= number <= room for number in (begin, end)):
        raise ValueError(f"'{name}' lies outside of it")
    if len(shape) > 64 or not all(type(number) is int and 0 <= number < 2**48 for number in shape):
        raise ValueError(f"'{name}' has the shape {shape!s:.40}")
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"'{name}' has {end - begin} bytes for the shape {shape}")
    return dtype, torch.Size(shape), begin


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor of the CPU."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
