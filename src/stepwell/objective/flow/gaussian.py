"""Parts for steps that are Gaussian in many dimensions: per-dimension and regulated ratios, gates and weights."""

from __future__ import annotations

from dataclasses import dataclass

from stepwell.batch import Batch, Read
from stepwell.objective.gates.step import Gate
from stepwell.objective.ratio import Ratio
from stepwell.parts import Part
from stepwell.ranges import Width
from stepwell.tensors import Tensor, torch


def step_divergence(batch: Batch) -> Tensor:
    """KL(old || pi) = |mu - mu_old|^2 / (2 q^2) of each trained step, (N, T) float64, a sum over dimensions."""
    moved = (batch.present("mean") - batch.field("old_mean")).flatten(2).double()
    squares = moved.square().sum(2)
    deviation = batch.present("deviation").double()
    return torch.where(batch.rows.mask, squares / (2 * deviation.square()).clamp(min=1e-300), 0.0)


@dataclass(frozen=True)
class PerDimensionRatio(Ratio):
    """log r / D, the ratio of mean log-densities that flow repositories take.

    It is no importance ratio: its mean under the old policy is exp(-K / D + K / D^2) < 1, with
    K = |mu - mu_old|^2 / (2 q^2), q the step's deviation and D the number of dimensions.
    """

    def __call__(self, batch: Batch, advantage: Tensor | None = None) -> Tensor:
        return super().__call__(batch, advantage) / batch.dimensions


@dataclass(frozen=True)
class RegulatedRatio(Ratio):
    """log r = q (l / D + K / D): the mean log-ratio l / D without its bias, on a scale that is no step's own.

    q is the step's deviation, l its log-ratio, K = |mu - mu_old|^2 / (2 q^2). E_old[r] = exp(|mu - mu_old|^2 /
    (2 D^2)). Source: GRPO-Guard, arXiv 2510.22319 (RatioNorm).
    """

    needs = frozenset({"mean", "deviation"})
    reads = frozenset({Read("policy", "mean")})

    def __call__(self, batch: Batch, advantage: Tensor | None = None) -> Tensor:
        difference = super().__call__(batch, advantage)
        return batch.present("deviation") * (difference + step_divergence(batch)) / batch.dimensions


@dataclass(frozen=True)
class DivergenceBound(Gate):
    """Drop a step once its divergence K / D from the old policy exceeds `threshold` in the direction of its advantage.

    Dropped iff K / D >= threshold and ((r > 1 and A > 0) or (r < 1 and A < 0)), with K = |mu - mu_old|^2 / (2 q^2).
    The rule is that of Flow-DPPO; the threshold is yours to choose.
    """

    threshold: Width = 1e-4
    when = "step"
    needs = frozenset({"mean", "deviation"})
    reads = frozenset({Read("policy", "mean")})

    def __call__(self, batch: Batch, log_ratio: Tensor | None, advantage: Tensor) -> Tensor:
        assert log_ratio is not None
        far = step_divergence(batch) / batch.dimensions >= self.threshold
        onwards = ((log_ratio > 0) & (advantage > 0)) | ((log_ratio < 0) & (advantage < 0))
        return (~(far & onwards)).to(batch.mask.dtype)


@dataclass(frozen=True)
class NoiseAware(Gate):
    """Weights in proportion to each step's deviation q, their mean over all trained steps 1.

    Source: TempFlow-GRPO, arXiv 2508.04324, whose code has the constant that does this for one schedule.
    """

    reads = frozenset({Read("policy", "deviation")})

    def __call__(self, batch: Batch, log_ratio: Tensor | None, advantage: Tensor) -> Tensor:
        deviation = batch.field("old_deviation").to(batch.mask.dtype) * batch.mask
        return deviation * batch.counts.steps / deviation.sum().clamp(min=1e-30)


@dataclass(frozen=True)
class PerStepSize(Gate):
    """1 / |dt|: equal weight to equal steps of the mean, whatever the grid (GRPO-Guard, arXiv 2510.22319)."""

    reads = frozenset({Read("policy", "step_size")})

    def __call__(self, batch: Batch, log_ratio: Tensor | None, advantage: Tensor) -> Tensor:
        size = batch.field("old_step_size").to(batch.mask.dtype)
        return torch.where(batch.rows.mask, 1 / size.clamp(min=1e-12), 0.0)


@dataclass(frozen=True)
class StepSize(Part):
    """|dt| (N, T): Flow-GRPO's KL divided by the exact one.

    With squares averaged over dimensions, the former is |mu - mu_ref|^2 / (2 sigma^2) and the latter
    |mu - mu_ref|^2 / (2 sigma^2 |dt|).
    """

    reads = frozenset({Read("policy", "step_size")})

    def __call__(self, batch: Batch) -> Tensor:
        return batch.field("old_step_size").to(batch.mask.dtype)


@dataclass(frozen=True)
class PerDimension(Part):
    """1 / D (N, T): turns a sum over dimensions into their mean."""

    def __call__(self, batch: Batch) -> Tensor:
        return torch.full_like(batch.mask, 1 / batch.dimensions)
