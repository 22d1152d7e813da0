"""Cut rows into batches by tokens: rows of like length together, so that little of a batch is padding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stepwell.errors import InputError


def token_batches(lengths: Tensor | Sequence[int], tokens: int) -> list[Tensor]:
    """Row indices, one tensor a batch, longest rows first; every row is in exactly one batch.

    `lengths` (N,) is the number of tokens of each row. A batch of n rows whose longest has L tokens takes n L
    tokens after padding, at most `tokens`; a row that is longer than that alone is a batch of its own. Rows of
    equal length keep their order. Raises `InputError` for `tokens` below 1.

    Example:
        >>> [batch.tolist() for batch in token_batches([3, 9, 4, 4], 8)]
        [[1], [2, 3], [0]]
    """
    if tokens < 1:
        raise InputError(f"tokens must be at least 1, got {tokens}.")
    sizes = torch.as_tensor(lengths, dtype=torch.long).cpu()
    order = sizes.argsort(descending=True, stable=True)
    batches: list[list[int]] = []
    longest = 0
    for row in order.tolist():
        if batches and longest * (len(batches[-1]) + 1) <= tokens:
            batches[-1].append(row)
        else:
            batches.append([row])
            longest = max(int(sizes[row]), 1)
    return [torch.tensor(batch, dtype=torch.long) for batch in batches]
