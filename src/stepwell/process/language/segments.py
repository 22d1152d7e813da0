"""Sentences in sampled tokens: the segments that ratios and credit may be aggregated over."""

from __future__ import annotations

from collections.abc import Callable

from stepwell.tensors import Tensor, torch

ENDINGS = (".", "!", "?", ";", "\n", "。", "！", "？", "；")
"""A token ends a sentence if its text, trailing spaces aside, ends with one of these."""


def segments(action: Tensor, ends: Tensor) -> Tensor:
    """(N, T) the number of each step's segment, from 0; a segment ends with a token of `ends`, and includes it.

    Example:
        >>> segments(torch.tensor([[5, 1, 4, 1, 3]]), torch.tensor([1])).tolist()
        [[0, 0, 1, 1, 2]]
    """
    over = torch.isin(action, ends.to(action.device)).long()
    return over.cumsum(1) - over


def sentence_ends(action: Tensor, decode: Callable[[list[int]], str]) -> Tensor:
    """Those of the tokens in `action` that end a sentence, by their text alone: the point of 3.14 ends one too."""
    tokens = action.unique().tolist()
    return torch.tensor([token for token in tokens if decode([token]).rstrip(" ").endswith(ENDINGS)], dtype=torch.long)
