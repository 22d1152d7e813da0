"""Numbers that a method keeps between updates: adaptive coefficients, multipliers, log Z."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from stepwell.batch import Batch
from stepwell.errors import UnknownName
from stepwell.ranges import Checked, NotNegative, Positive, Share, Size, Width


@dataclass(frozen=True)
class Coefficient(Checked):
    """A number by name that changes as training goes on, kept by the training loop and saved in checkpoints.

    `update(value, metrics)` is pure: it gives the next value from the metrics of the update just made. A term whose
    coefficient is a `Coefficient` reads the present value from the batch.
    """

    name: str
    initial: float = 0.0

    def read(self, batch: Batch) -> float:
        """The present value, as the loop keeps it."""
        return batch.states.get(self.name, self.initial)

    def first_number(self) -> float:
        """The first value: ranges are checked against it."""
        return self.initial

    def update(self, value: float, metrics: Mapping[str, float]) -> float:
        """The next value."""
        return value


def _metric(metrics: Mapping[str, float], name: str) -> float:
    if name not in metrics:
        raise UnknownName("metric for a coefficient to follow", name, metrics)
    return metrics[name]


@dataclass(frozen=True)
class AdaptiveCoefficient(Coefficient):
    """A penalty's coefficient that steers a metric to a target.

    value *= 1 + clip(metric / target - 1, -0.2, 0.2) * rate, where rate is rows an update / horizon (Ziegler et al.
    2019, section 2.2).
    """

    metric: str = "kl"
    target: Positive = 0.1
    rate: NotNegative = 0.1

    def update(self, value: float, metrics: Mapping[str, float]) -> float:
        error = min(max(_metric(metrics, self.metric) / self.target - 1.0, -0.2), 0.2)
        return value * (1.0 + error * self.rate)


@dataclass(frozen=True)
class Multiplier(Coefficient):
    """A constraint's dual variable: value <- max(0, value + rate (threshold - metric)), for metric >= threshold.

    `ceiling` bounds it from above, for constraints that cannot be kept.
    """

    initial: NotNegative = 0.0
    metric: str = "reward"
    threshold: float = 0.0
    rate: NotNegative = 0.01
    ceiling: Width = math.inf

    def update(self, value: float, metrics: Mapping[str, float]) -> float:
        return min(max(0.0, value + self.rate * (self.threshold - _metric(metrics, self.metric))), self.ceiling)


@dataclass(frozen=True)
class Ramp(Coefficient):
    """A schedule: from `initial` to `final` by equal steps, over so many updates."""

    final: float = 1.0
    updates: Size = 100

    def update(self, value: float, metrics: Mapping[str, float]) -> float:
        step = (self.final - self.initial) / self.updates
        return min(value + step, self.final) if step > 0 else max(value + step, self.final)


@dataclass(frozen=True)
class RunningMean(Coefficient):
    """value <- decay value + (1 - decay) metric."""

    metric: str = "reward"
    decay: Share = 0.9

    def update(self, value: float, metrics: Mapping[str, float]) -> float:
        return self.decay * value + (1.0 - self.decay) * _metric(metrics, self.metric)


@dataclass(frozen=True)
class LogPartition(Coefficient):
    """Trajectory balance's learned log Z: value <- value - rate * mean residual, its own gradient step."""

    metric: str = "residual"
    rate: NotNegative = 0.1

    def update(self, value: float, metrics: Mapping[str, float]) -> float:
        return value - self.rate * _metric(metrics, self.metric)


def value_of(coefficient: float | Coefficient, batch: Batch) -> float:
    """The present value of a coefficient, which may be a plain number."""
    return coefficient.read(batch) if isinstance(coefficient, Coefficient) else coefficient
