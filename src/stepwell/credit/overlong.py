"""The soft penalty on long samples of DAPO."""

from __future__ import annotations

from stepwell.errors import InputError
from stepwell.tensors import Tensor


def overlong_penalty(length: Tensor, maximum: float, buffer: float) -> Tensor:
    """The penalty (N,), in [-1, 0], of samples of `length` (N,) steps that come near the maximum or go beyond it.

    0 up to `maximum - buffer`, then falling linearly to -1 at `maximum`:
    R = ((L_max - L_cache) - |y|) / L_cache, with L_cache = `buffer` (DAPO, arXiv 2503.14476, eq. 13).
    Float64 for whole-number lengths. Raises `InputError` unless 0 < buffer <= maximum.

    Example:
        >>> import torch
        >>> overlong_penalty(torch.tensor([80, 90, 100, 120]), maximum=100, buffer=20).tolist()
        [0.0, -0.5, -1.0, -1.0]
    """
    if not 0 < buffer <= maximum:
        raise InputError(f"buffer must be above 0 and at most maximum = {maximum}, got {buffer}.")
    length = length if length.is_floating_point() else length.double()
    left = maximum - buffer - length
    return (left / buffer).clamp(-1.0, 0.0)
