"""Models whose probability-flow ODE is known: an exact Gaussian mixture, and a small network that is trained here."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stepwell import Rng
from stepwell.solver.path import Linear, Path

Data = Callable[[Tensor, float], Tensor]
NEARLY_CLEAN = 12.0
"""log(alpha / sigma) at which the reference ends: the noise that is left is below 1e-5."""


@dataclass(frozen=True)
class Problem:
    """A model on a path: `data` is its data prediction E[x_0 | x_t = x] at (x (N, D), t). Data has variance one."""

    name: str
    path: Path
    dimension: int
    data: Data

    def noise(self, count: int, seed: int) -> Tensor:
        """(count, D), standard normal, in the precision that samplers run in."""
        return Rng(seed).normal(count, self.dimension)

    def exact(self, x: Tensor, start: float = 1.0, steps: int = 400) -> Tensor:
        """The end of the ODE from x (N, D) at time `start`, by Runge-Kutta of order four in double precision.

        On the linear path in t down to start / steps, as lambda is infinite at t = 1; from there, and on other paths
        all the way, in lambda, where d(x / sigma) / d lambda = exp(lambda) D.
        """
        x, time = x.double(), start
        if self.path.name == "linear":
            time = start / steps

            def velocity(state: Tensor, t: float) -> Tensor:
                return (state - self.data(state, t)) / t

            x = _runge_kutta(velocity, x, [start * (1.0 - step / steps) for step in range(steps)])
        return self.between(x, time, self.path.time(NEARLY_CLEAN), steps)

    def between(self, x: Tensor, start: float, end: float, steps: int = 400) -> Tensor:
        """The ODE from x (N, D) at `start` to `end`, where lambda is finite at both."""
        path = self.path
        first, last = path.log_snr(start), path.log_snr(end)

        def scaled(state: Tensor, log_snr: float) -> Tensor:
            t = path.time(log_snr)
            return math.exp(log_snr) * self.data(path.sigma(t) * state, t)

        places = [first + (last - first) * step / steps for step in range(steps + 1)]
        return path.sigma(end) * _runge_kutta(scaled, x.double() / path.sigma(start), places)


def _runge_kutta(rate: Data, x: Tensor, places: list[float]) -> Tensor:
    for place, target in itertools.pairwise(places):
        step = target - place
        first = rate(x, place)
        second = rate(x + step / 2 * first, place + step / 2)
        third = rate(x + step / 2 * second, place + step / 2)
        x = x + step / 6 * (first + 2 * second + 2 * third + rate(x + step * third, target))
    return x


def components_of(dimension: int, components: int) -> tuple[Tensor, Tensor]:
    """Means and variances (K, D): means ~ N(0, 1) and, in an order drawn for each component, variances from 0.01 to 1.

    All is scaled so that the mean variance of a coordinate of the mixture is one.
    """
    rng = Rng(0)
    means = rng.normal(components, dimension, dtype=torch.float64)
    spread = torch.logspace(-2, 0, dimension, dtype=torch.float64)
    variances = torch.stack([spread[rng.permutation(dimension)] for _ in range(components)])
    means = means - means.mean(0)
    total = variances.mean() + means.square().mean()
    return means / total.sqrt(), variances / total


def mixture(path: Path, dimension: int = 16, components: int = 8) -> Problem:
    """Components of equal weight (`components_of`), denoised exactly.

    Diagonal covariances leave two matrix products a prediction, so that the solvers' own time is measured.
    """
    means, variances = components_of(dimension, components)

    def data(x: Tensor, t: float) -> Tensor:
        alpha, wide = path.alpha(t), x.double()
        precisions = 1.0 / (alpha**2 * variances + path.sigma(t) ** 2)
        pulls = means * precisions
        logs = alpha * (wide @ pulls.T) - 0.5 * (wide.square() @ precisions.T)
        logs = logs - 0.5 * (alpha**2 * (means * pulls).sum(1) - precisions.log().sum(1))
        weights, gains = logs.softmax(1), alpha * variances * precisions
        return (weights @ (means - alpha * gains * means) + wide * (weights @ gains)).to(x.dtype)

    return Problem(f"mixture, {path.name}", path, dimension, data)


class Network(nn.Module):
    """A perceptron with residual blocks, conditioned on the time in sines: (x (N, D), t (N,)) -> velocity (N, D)."""

    def __init__(self, dimension: int, width: int, blocks: int = 2):
        super().__init__()
        self.enter = nn.Linear(dimension + 16, width)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))
        self.leave = nn.Linear(width, dimension)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        angles = t.reshape(-1, 1) * (2.0 ** torch.arange(8, dtype=x.dtype))
        hidden = self.enter(torch.cat([x, angles.sin().expand(len(x), 8), angles.cos().expand(len(x), 8)], 1))
        for block in self.blocks:
            hidden = hidden + block(nn.functional.silu(hidden))
        return self.leave(nn.functional.silu(hidden))


def digits(steps: int = 1200, width: int = 192) -> Problem:
    """A network trained by flow matching on 8 x 8 digits, on the linear path, in a few seconds; in float64."""
    from sklearn.datasets import load_digits

    images = torch.tensor(load_digits().data, dtype=torch.float32)
    images = (images - images.mean()) / images.std()
    rng = Rng(1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Network(images.shape[1], width)
    optimiser = torch.optim.AdamW(network.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps)
    for _ in range(steps):
        clean = images[rng.permutation(len(images))[:256]]
        noise, t = rng.normal(*clean.shape), rng.uniform(len(clean))
        x = Linear().noised(clean, noise, t[:, None])
        optimiser.zero_grad()
        (network(x, t) - (noise - clean)).square().mean().backward()
        optimiser.step()
        schedule.step()
    network.double().requires_grad_(False)

    def data(x: Tensor, t: float) -> Tensor:
        return (x - t * network(x.double(), torch.full((1,), t, dtype=torch.float64))).to(x.dtype)

    return Problem("digits network, linear", Linear(), images.shape[1], data)
