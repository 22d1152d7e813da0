"""A Gaussian mixture whose data prediction is exact on every path, and its ODE solved by Runge-Kutta."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from stepwell.solver.path import Path

WEIGHTS = torch.tensor([0.3, 0.5, 0.2], dtype=torch.float64)
MEANS = torch.tensor([[-1.5, 0.5], [1.0, 1.0], [0.5, -1.5]], dtype=torch.float64)
VARIANCES = torch.tensor([0.2, 0.1, 0.3], dtype=torch.float64)

SOLVED: dict[Any, Tensor] = {}
"""Every test of an order asks for the same few solutions."""


@dataclass(frozen=True)
class Mixture:
    """Two-dimensional data on a path; `data(x, t)` is E[x_0 | x_t = x]."""

    path: Path

    def data(self, x: Tensor, t: float) -> Tensor:
        alpha, sigma = self.path.alpha(t), self.path.sigma(t)
        wide = x.double()
        variance = alpha**2 * VARIANCES + sigma**2
        offset = wide[:, None] - alpha * MEANS
        log = WEIGHTS.log() - variance.log() - (offset**2).sum(-1) / (2 * variance)
        conditional = MEANS + (alpha * VARIANCES / variance)[None, :, None] * offset
        return (log.softmax(1)[..., None] * conditional).sum(1).to(x.dtype)

    def solve(self, x: Tensor, start: float, end: float, steps: int = 1500) -> Tensor:
        """The ODE from `start` to `end`: d(x / sigma) / d lambda = exp(lambda) D, by fourth-order Runge-Kutta."""
        key = (self.path, x.dtype, tuple(x.flatten().tolist()), start, end, steps)
        if key not in SOLVED:
            SOLVED[key] = self._solve(x, start, end, steps)
        return SOLVED[key]

    def _solve(self, x: Tensor, start: float, end: float, steps: int) -> Tensor:
        first, last = self.path.log_snr(start), self.path.log_snr(end)
        h, scaled = (last - first) / steps, x / self.path.sigma(start)

        def rate(value: Tensor, place: float) -> Tensor:
            t = self.path.time(place)
            sigma = self.path.sigma(t)
            return self.path.alpha(t) / sigma * self.data(value * sigma, t)

        for step in range(steps):
            place = first + step * h
            k1 = rate(scaled, place)
            k2 = rate(scaled + h / 2 * k1, place + h / 2)
            k3 = rate(scaled + h / 2 * k2, place + h / 2)
            k4 = rate(scaled + h * k3, place + h)
            scaled = scaled + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        return scaled * self.path.sigma(end)


@pytest.fixture
def mixture() -> Callable[[Path], Mixture]:
    return Mixture
