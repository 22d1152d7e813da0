"""A flow of two numbers, small enough for scores by hand."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stepwell.process.flow.build import flow
from stepwell.process.flow.process import Flow
from stepwell.rng import Rng
from stepwell.sampling.request import Prompt, Request
from stepwell.sampling.rollout import rollout

STEPS = 6


class Net(nn.Module):
    """A velocity of two numbers, their time and a label, that remembers how many states it was shown at once."""

    def __init__(self, seed: int = 1):
        super().__init__()
        self.inner, self.outer = nn.Linear(3, 6, dtype=torch.float64), nn.Linear(6, 2, dtype=torch.float64)
        self.names = nn.Embedding(3, 6, dtype=torch.float64)
        self.shown: list[int] = []
        for place, parameter in enumerate(self.parameters()):
            parameter.data.copy_(0.5 * Rng(seed).split(place).normal(*parameter.shape, dtype=torch.float64))

    def forward(self, x: Tensor, time: Tensor, label: Tensor) -> Tensor:
        self.shown.append(len(x))
        return self.outer((self.inner(torch.cat([x, time[:, None]], 1)) + self.names(label)).tanh())


def small(solver="sde-flow", seed: int = 1, **settings) -> Flow:
    return flow(Net(seed), (2,), **{"solver": solver, "steps": STEPS, "encode": "label"} | settings)


def draw(process, *requests, so_far=None, seed=0):
    requests = requests or (Request(Prompt(0, 0), 3), Request(Prompt(1, 1), 2))
    return rollout(process, requests, Rng(seed), so_far=so_far).trajectories
