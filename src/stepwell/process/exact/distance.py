"""The distance of samples to a known mixture, without sampling the mixture, and that of perfect samples."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from stepwell.errors import InputError
from stepwell.process.exact.mixture import Mixture
from stepwell.rng import Rng

DIRECTIONS = 32
"""Directions of a sliced distance."""


def sliced_wasserstein(samples: Tensor, mixture: Mixture, directions: int = DIRECTIONS) -> float:
    """The sliced Wasserstein-2 distance of samples (n, D) to the mixture itself, D = 1 or 2, which is not sampled.

    The root of the mean over evenly spaced directions u of the squared distance W^2 between the samples' u.x and the
    mixture's u.y: in one dimension int_0^1 (F_n^-1 - F^-1)^2 = mean(x^2) - 2 sum_i x_(i) g_i + E[y^2], with x_(i) in
    order and g_i the integral of the mixture's quantile function over ((i - 1) / n, i / n): a difference of partial
    expectations, which are closed forms. n perfect samples are not at 0 but at `sampling_floor`.
    """
    if samples.dim() != 2 or samples.shape[1] != mixture.dimension or not len(samples):
        raise InputError(f"samples must be (n, {mixture.dimension}), got {tuple(samples.shape)}.")
    axes = _axes(mixture.dimension, directions)
    projected = (axes @ samples.detach().cpu().double().mT).sort(1).values
    integrals, squares = _quantile_integrals(mixture, len(samples), directions)
    squared = (projected**2).mean(1) - 2 * (projected * integrals).sum(1) + squares
    return math.sqrt(max(float(squared.mean()), 0.0))


def sampling_floor(
    mixture: Mixture, count: int, rng: Rng, directions: int = DIRECTIONS, repeats: int = 100
) -> tuple[float, float]:
    """The mean `sliced_wasserstein` of `count` perfect samples, and its standard error, over `repeats` simulations."""
    distances = [sliced_wasserstein(mixture.sample(count, rng), mixture, directions) for _ in range(repeats)]
    values = torch.tensor(distances, dtype=torch.float64)
    return float(values.mean()), float(values.std() / repeats**0.5)


def _axes(dimension: int, directions: int) -> Tensor:
    """(directions, D) unit vectors, evenly over the half circle; opposite ones give the same distance."""
    if dimension == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if dimension > 2 or directions < 1:
        raise InputError(
            f"directions must be at least 1, in 1 or 2 dimensions; got {directions} in {dimension} dimensions."
        )
    angles = math.pi * torch.arange(directions, dtype=torch.float64) / directions
    return torch.stack([angles.cos(), angles.sin()], 1)


@lru_cache(maxsize=64)
def _quantile_integrals(mixture: Mixture, count: int, directions: int) -> tuple[Tensor, Tensor]:
    """g (A, count) and E[y^2] (A,) along each direction, as `sliced_wasserstein` has them."""
    axes = _axes(mixture.dimension, directions)
    means = axes @ mixture.means.mT  # (A, K)
    scales = torch.einsum("ad,kde,ae->ak", axes, mixture.covariances, axes).sqrt()
    levels = torch.arange(1, count, dtype=torch.float64) / count
    low = (means - 40.0 * scales).amin(1, keepdim=True).expand(-1, count - 1)
    high = (means + 40.0 * scales).amax(1, keepdim=True).expand(-1, count - 1)
    for _ in range(64):  # bisection: safe where a density is nearly 0 between two modes
        middle = 0.5 * (low + high)
        below = _partial(means, scales, mixture.weights, middle)[0] < levels
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    inner = _partial(means, scales, mixture.weights, 0.5 * (low + high))[1]
    whole = (means @ mixture.weights)[:, None]
    ends = torch.cat([torch.zeros_like(whole), inner, whole], 1)
    return ends.diff(dim=1), (means**2 + scales**2) @ mixture.weights


def _partial(means: Tensor, scales: Tensor, weights: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """P(Y <= y) and E[Y; Y <= y] of 1-D mixtures (A, K) at y (A, n)."""
    standard = (y[:, None] - means[:, :, None]) / scales[:, :, None]
    below = torch.special.ndtr(standard)
    density = torch.exp(-0.5 * standard**2) / math.sqrt(2 * math.pi)
    parts = means[:, :, None] * below - scales[:, :, None] * density
    return torch.einsum("k,akn->an", weights, below), torch.einsum("k,akn->an", weights, parts)
