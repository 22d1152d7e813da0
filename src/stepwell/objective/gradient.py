"""Transforms of the gradients, applied between the backward pass and the optimiser."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from stepwell.tensors import Tensor, torch


class GradientTransform(ABC):
    """Maps the gradients of one update to those the optimiser sees; frozen data, pure."""

    @abstractmethod
    def __call__(self, gradients: Sequence[Tensor]) -> list[Tensor]: ...


def global_norm(gradients: Sequence[Tensor]) -> Tensor:
    """The Euclidean norm of all gradients together."""
    return torch.stack([gradient.norm() for gradient in gradients]).norm() if gradients else torch.zeros(())


@dataclass(frozen=True)
class ClipByNorm(GradientTransform):
    """Scale the gradients down so that their norm is at most `maximum` (Pascanu et al. 2013)."""

    maximum: float = 1.0

    def __call__(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        scale = (self.maximum / (global_norm(gradients) + 1e-6)).clamp(max=1.0)
        return [gradient * scale for gradient in gradients]


@dataclass(frozen=True)
class SkipAbove(GradientTransform):
    """Drop an update whose gradient norm is not finite or above `maximum`."""

    maximum: float = float("inf")

    def __call__(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        norm = global_norm(gradients)
        keep = bool(norm.isfinite()) and float(norm) <= self.maximum
        return list(gradients) if keep else [torch.zeros_like(gradient) for gradient in gradients]
