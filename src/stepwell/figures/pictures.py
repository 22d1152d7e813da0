"""Tensors for people to look at: a few numbers or words for any of them, and a PNG for images."""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

LEAST_SIDE = 4
"""The shortest side of an image; a smaller matrix is shown as numbers."""
TILE = (64, 256)
"""The sides, in pixels, that the tiles of a grid are magnified or reduced to lie between."""
COLUMNS = 8
"""Tiles side by side in a grid."""
NUMBERS = 8
"""The longest vector that is written out."""


def due(step: int) -> bool:
    """True at the steps whose images are drawn: often at first, then ever more rarely, so that a long run draws few.

    Example:
        >>> [step for step in range(1, 1001) if due(step)]
        [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000]
    """
    return str(step).rstrip("0") in ("1", "2", "5")


def is_image(value: object) -> bool:
    """True for an image: a tensor (H, W) or (C, H, W) of one or three channels, float in [0, 1] or uint8.

    Example:
        >>> [is_image(torch.zeros(shape)) for shape in ((8, 8), (3, 16, 16), (2,), (50, 2))]
        [True, True, False, False]
    """
    if not isinstance(value, Tensor) or not (value.is_floating_point() or value.dtype == torch.uint8):
        return False
    channels = value.shape[0] if value.dim() == 3 else 1
    return value.dim() in (2, 3) and channels in (1, 3) and min(value.shape[-2:]) >= LEAST_SIDE


def described(value: Tensor) -> str | list[float]:
    """A tensor as a value for JSON: the numbers of a short vector to four digits, else shape, mean and range in words.

    Example:
        >>> described(torch.tensor([0.5, -1.25])), described(torch.eye(8))
        ([0.5, -1.25], '8×8, mean 0.125, from 0 to 1')
    """
    value = value.detach().cpu().double()
    if value.dim() <= 1 and value.numel() <= NUMBERS:
        return [float(f"{number:.4g}") for number in value.reshape(-1).tolist()]
    shape = "×".join(map(str, value.shape))
    if value.numel() == 0:
        return f"{shape}, empty"
    return f"{shape}, mean {value.mean():.3g}, from {value.min():.3g} to {value.max():.3g}"


def pixels(image: Tensor) -> Tensor:
    """An image (`is_image`) as uint8 (H, W, C); values outside [0, 1] are clipped, NaN is black."""
    image = image.detach().cpu()
    image = image[None] if image.dim() == 2 else image
    if image.is_floating_point():
        image = (image.double().nan_to_num(0.0).clamp(0.0, 1.0) * 255.0).round().to(torch.uint8)
    return image.permute(1, 2, 0).contiguous()


def reduced(image: Tensor, most: int) -> Tensor:
    """The image with its longer side at most `most` pixels, by averages over areas; a small image as it is."""
    height, width = image.shape[-2:]
    if max(height, width) <= most:
        return image
    down, across = (max(1, round(side * most / max(height, width))) for side in (height, width))
    shown = image.double() / (255.0 if image.dtype == torch.uint8 else 1.0)
    return adaptive_avg_pool2d(shown[None], (down, across))[0]


def grid(images: Sequence[Tensor]) -> Tensor:
    """Images side by side in rows of `COLUMNS`, as one image (C, H, W) with margins, all at one scale.

    Small ones are magnified by whole numbers, large ones reduced (`TILE`).
    """
    shown = [reduced(image, TILE[1]) for image in images]
    shown = [pixels(image).permute(2, 0, 1) for image in shown]
    channels = max(image.shape[0] for image in shown)
    height, width = (max(image.shape[axis] for image in shown) for axis in (1, 2))
    scale = max(1, math.ceil(TILE[0] / max(height, width)))
    gap = 4
    across = min(len(shown), COLUMNS)
    down = -(-len(shown) // across)
    step_down, step_across = scale * height + gap, scale * width + gap
    whole = torch.full((channels, down * step_down + gap, across * step_across + gap), 128, dtype=torch.uint8)
    for place, image in enumerate(shown):
        top, left = gap + place // across * step_down, gap + place % across * step_across
        large = image.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
        whole[:, top : top + large.shape[1], left : left + large.shape[2]] = large
    return whole


def png(image: Tensor) -> bytes:
    """An image (`is_image`) as a PNG file of 8 bits, grey or RGB, no filter; the same pixels give the same bytes.

    Source: the PNG specification, ISO 15948.

    Example:
        >>> png(torch.zeros(8, 8))[:4]
        b'\\x89PNG'
    """
    shown = pixels(image)
    height, width, channels = shown.shape
    lines = torch.cat([torch.zeros(height, 1, dtype=torch.uint8), shown.reshape(height, -1)], 1)
    header = struct.pack(">IIBBBBB", width, height, 8, {1: 0, 3: 2}[channels], 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(lines.numpy().tobytes(), 6)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in parts
    )
