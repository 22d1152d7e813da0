"""Flows by hand, for oracles: the papers' steps on the linear path, and a velocity that keeps them affine.

Every step is x' = state x + velocity v(x) + noise z. The formulas are the papers' own, in the coordinates
x_t = (1 - t) x_0 + t e, and share nothing with `stepwell.solver`, which they are there to check.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stepwell.errors import UnknownName
from stepwell.rng import Rng
from stepwell.sampling.request import Prompt

KINDS = ("ode", "flow", "flow-published", "dance", "ddpm")


@dataclass(frozen=True)
class ChainStep:
    """x' = state x + velocity v + noise z from `time` to `target`; `place` numbers the time on the whole grid."""

    place: int
    time: float
    target: float
    state: float
    velocity: float
    noise: float


def uniform_times(steps: int) -> list[float]:
    """1, 1 - 1/n, ..., 0."""
    return [1.0 - step / steps for step in range(steps + 1)]


def step_by_hand(kind: str, level: float, time: float, target: float, steps: int) -> ChainStep:
    """One step of a kind, s to s', dt = s' - s < 0.

    ode: x + dt v. The SDE with the ODE's marginals is dx = [v + g^2 / (2 t) (x + (1 - t) v)] dt + g dW.
    flow-published, dance: its Euler step with g^2 = a^2 s / (1 - s), 1 - s' in place of 1 - s = 0 in the first step
    (Flow-GRPO), and with g = a (DanceGRPO). flow: the same SDE as flow-published, with x_0hat = x - s v held fixed,
    solved exactly: the noise e in x keeps r = [s' (1 - s) / (s (1 - s'))]^(a^2 / 2), so that
    mu = (1 - s') x_0hat + s' r ehat and q = s' sqrt(1 - r^2). ddpm: DDIM's eta,
    q^2 = eta^2 s'^2 (1 - s'^2 (1 - s)^2 / (s^2 (1 - s')^2)), mu = (1 - s') x_0hat + sqrt(s'^2 - q^2) ehat.
    """
    place, dt = round((1.0 - time) * steps), target - time
    if kind == "ode":
        return ChainStep(place, time, target, 1.0, dt, 0.0)
    if kind in ("flow-published", "dance"):
        clear = 1.0 - (target if time == 1.0 else time)
        squared = level**2 if kind == "dance" else level**2 * time / clear
        pull = squared * dt / (2.0 * time)
        return ChainStep(place, time, target, 1.0 + pull, dt + (1.0 - time) * pull, math.sqrt(-squared * dt))
    kept = target * (1.0 - time) / (time * (1.0 - target))
    if kind == "flow":
        noise = target * math.sqrt(1.0 - kept ** (level**2))
    elif kind == "ddpm":
        noise = level * target * math.sqrt(1.0 - kept**2)
    else:
        raise UnknownName("kind of step", kind, KINDS)
    rest = math.sqrt(target**2 - noise**2)  # of ehat = x + (1 - s) v, and 1 - s' of x_0hat = x - s v
    return ChainStep(place, time, target, 1.0 - target + rest, rest * (1.0 - time) - (1.0 - target) * time, noise)


def chain_by_hand(kinds: Sequence[str], level: float, times: Sequence[float], steps: int) -> list[ChainStep]:
    """A step of each of the kinds, one after another along the times of a grid of `steps` equal steps."""
    pairs = zip(kinds, itertools.pairwise(times), strict=True)
    return [step_by_hand(kind, level, time, target, steps) for kind, (time, target) in pairs]


class Affine(nn.Module):
    """v(x, t) = slope x + shift, with a matrix and a vector of its own at each time of a uniform grid.

    Then the steps of a chain are affine, each has parameters of its own, and dv / d slope = x. Every prompt's number
    is accepted and makes no difference.
    """

    def __init__(self, steps: int, dimension: int, seed: int = 0, scale: float = 0.4):
        super().__init__()
        rng = Rng(seed).split("affine")
        slope, shift = (
            scale * rng.normal(steps, *shape, dtype=torch.float64) for shape in ((dimension,) * 2, (dimension,))
        )
        self.slope, self.shift = nn.Parameter(slope), nn.Parameter(shift)

    def forward(self, x: Tensor, time: Tensor, label: Tensor | None = None) -> Tensor:
        place = self.place(time)
        return torch.einsum("nij,nj->ni", self.slope[place], x) + self.shift[place]

    def place(self, time: Tensor) -> Tensor:
        """The steps that begin at these times, or nearest to them."""
        last = len(self.shift) - 1
        return ((1.0 - time) * (last + 1)).round().long().clamp(0, last)

    @torch.no_grad()
    def move(self, width: float, seed: int) -> None:
        """Every parameter by normal noise."""
        rng = Rng(seed).split("move")
        for parameter in (self.slope, self.shift):
            parameter.add_(width * rng.normal(*parameter.shape, dtype=torch.float64))


@dataclass(frozen=True)
class Matrices:
    """The parameters of an `Affine`, apart from it: slope (n, D, D) and shift (n, D)."""

    slope: Tensor
    shift: Tensor

    @classmethod
    def of(cls, network: Any) -> Matrices:
        """A copy of a network's parameters as they are now."""
        return cls(network.slope.detach().clone(), network.shift.detach().clone())

    def velocity(self, x: Tensor, place: int) -> Tensor:
        """(..., D) at states (..., D)."""
        return x @ self.slope[place].T + self.shift[place]

    def mean(self, step: ChainStep, x: Tensor) -> Tensor:
        """mu (..., D) of a step from x (..., D)."""
        return step.state * x + step.velocity * self.velocity(x, step.place)


class Slopes:
    """A gradient in the parameters of an `Affine`, gathered by hand: dv_i / d slope_ij = x_j, dv_i / d shift_i = 1."""

    def __init__(self, numbers: Matrices):
        self.slope, self.shift = torch.zeros_like(numbers.slope), torch.zeros_like(numbers.shift)

    def add(self, place: int, x: Tensor, pull: Tensor) -> None:
        """Add sum_n pull_n . dv(x_n) / d theta, for the derivatives by the velocity pull (N, D) at x (N, D)."""
        self.slope[place] += pull.T @ x
        self.shift[place] += pull.sum(0)

    @property
    def flat(self) -> Tensor:
        """In the order of the network's parameters."""
        return torch.cat([self.slope.reshape(-1), self.shift.reshape(-1)])


TARGET = 0.7


def near(*wanted: float) -> Callable[..., Tensor]:
    """A reward: minus the squared distance of each sample (D,) from `wanted`, D numbers or one for all."""

    def nearness(completions: Sequence[Tensor], **_: Any) -> Tensor:
        points = torch.stack(list(completions))
        return -(points - points.new_tensor(wanted)).square().sum(1)

    return nearness


nearness = near(TARGET)
"""The reward of oracles of flows."""


def prompts(count: int) -> list[Prompt]:
    """Prompts that are their own numbers."""
    return [Prompt(number, number) for number in range(count)]
