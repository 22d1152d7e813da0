"""The reward of the digits task, and measures of samples that see what only pleases the judge of the reward.

Measures compare samples with a second judge and with digits that nothing has learnt from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from stepwell.errors import InputError
from stepwell.sampling.request import Prompt
from stepwell.tasks.digits.models import digits, distances, most_alike, read
from stepwell.tasks.digits.teaching import CLASSES, SHAPE


def recognised(prompts: Sequence[int], completions: Sequence[Tensor] | Tensor) -> Tensor:
    """The reward: the first judge's probability (N,) of the digit that was asked for, differentiable in the images.

    `completions` are images (1, 8, 8) in [0, 1], a list of them or a batch (N, 1, 8, 8).
    """
    images, wanted = _batch(prompts, completions)
    return read(images)[torch.arange(len(images), device=images.device), wanted]


def accuracy(prompts: Sequence[Prompt], samples: Sequence[Any]) -> float:
    """The share of samples in which the second judge, who has no part in the reward, sees the digit asked for.

    0.97 for real digits. A reward that rises above it pleases the first judge alone.
    """
    images, wanted = _asked(prompts, samples)
    return float((most_alike(images) == wanted).float().mean())


def diversity(prompts: Sequence[Prompt], samples: Sequence[Any]) -> float:
    """The mean distance of two samples of one prompted digit, relative to that of two real ones of one class.

    1 for real digits, 0 where all samples of a digit are the same; above 1 where prompts are not followed, since
    different digits differ more. Digits that only one sample answers are left out; raises `InputError` if all are.
    """
    images, wanted = _asked(prompts, samples)
    classes = [digit for digit in range(CLASSES) if int((wanted == digit).sum()) > 1]
    if not classes:
        raise InputError("samples must hold two samples of at least one digit, which diversity compares, got none.")
    spread = sum(_spread(images[wanted == digit]) for digit in classes)
    return spread / sum(_real_spread(digit) for digit in classes)


def distance(prompts: Sequence[Prompt], samples: Sequence[Any]) -> float:
    """The energy distance of the pixels of all samples from held-out digits, (2 A - B - C) / 2 A.

    A is the mean distance of a sample and a real digit, B of two samples, C of two real digits. B and C leave out pairs
    of one image with itself, so that real digits score 0 on average (a little to either side), whatever the number of
    samples. Not following prompts leaves it as it is; images that no hand writes and missing classes or styles raise
    it. Source: Rizzo and Szekely 2016, doi 10.1002/wics.1375; divided by 2 A, so that it has no unit.
    """
    images, _ = _asked(prompts, samples)
    if len(images) < 2:
        raise InputError(
            f"samples must be at least two, to measure their distance from real digits, got {len(images)}."
        )
    between = float(distances(images, digits("held out")[0]).mean())
    return (2.0 * between - _spread(images) - _real_spread()) / (2.0 * between)


def nearest(prompts: Sequence[Prompt], samples: Sequence[Any]) -> float:
    """The mean distance of a sample to the nearest held-out digit, relative to that of real digits, which score 1.

    Above 1: images unlike any real one. Below 1: images more typical than real ones.
    """
    images, _ = _asked(prompts, samples)
    return float(distances(images, digits("held out")[0]).amin(1).mean()) / _nearest_real()


MEASURES: Mapping[str, Callable[[Sequence[Prompt], Sequence[Any]], float]] = {
    "second judge (higher is better)": accuracy,
    "diversity (real digits: 1)": diversity,
    "distance from real digits (lower is better)": distance,
    "nearest real digit (real digits: 1)": nearest,
}
"""Measures of held-out samples for a report, besides their reward, each called as measure(prompts, samples)."""


def _batch(prompts: Sequence[int], completions: Sequence[Tensor] | Tensor) -> tuple[Tensor, Tensor]:
    """Images (N, 1, 8, 8) and the digits asked for (N,)."""
    images = completions if isinstance(completions, Tensor) else torch.stack(list(completions))
    if images.dim() != 4 or images.shape[1:] != SHAPE or len(images) != len(prompts):
        raise InputError(
            f"images must be of shape ({len(prompts)}, 1, 8, 8), one a prompt, got shape {tuple(images.shape)}."
        )
    return images, torch.tensor(list(prompts), dtype=torch.long, device=images.device)


@torch.no_grad()
def _asked(prompts: Sequence[Prompt], samples: Sequence[Any]) -> tuple[Tensor, Tensor]:
    images, wanted = _batch([prompt.value for prompt in prompts], samples)
    return images.detach().cpu().float(), wanted.cpu()


def _spread(images: Tensor) -> float:
    """The mean distance of two different rows."""
    return float(distances(images, images).sum()) / (len(images) * (len(images) - 1))


@lru_cache(maxsize=CLASSES + 1)
def _real_spread(digit: int | None = None) -> float:
    """The mean distance of two held-out digits, of one class where it is given."""
    images, classes = digits("held out")
    return _spread(images if digit is None else images[classes == digit])


@lru_cache(maxsize=1)
def _nearest_real() -> float:
    return float(distances(digits("judge")[0], digits("held out")[0]).amin(1).mean())
