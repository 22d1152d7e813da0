"""The mean reward of a process on given prompts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stepwell.process.base import Process
from stepwell.reward.mixing import Rewards
from stepwell.rng import Rng
from stepwell.sampling.record import Drawn
from stepwell.sampling.request import Prompt, Request
from stepwell.sampling.rollout import rollout
from stepwell.training.collect import with_rewards


@dataclass(frozen=True)
class Evaluation:
    """The mean reward of a process, that of each prompt (P,), and the samples that were drawn."""

    reward: float
    each: Tensor
    drawn: Drawn


@torch.no_grad()
def evaluate(
    process: Process,
    prompts: list[Prompt],
    rewards: Rewards,
    rng: Rng,
    samples: int = 1,
    rows_at_once: int | None = None,
) -> Evaluation:
    """Mean reward over `samples` draws a prompt. Its cost is not on the process's meter."""
    requests = [Request(prompt, samples) for prompt in prompts]
    with process.meter.paused():
        drawn = rollout(process, requests, rng, rows_at_once=rows_at_once)
        drawn, _ = with_rewards(drawn, requests, rewards, process.meter)
    assert drawn.trajectories.reward is not None
    each = drawn.trajectories.reward.double().reshape(len(prompts), samples).mean(1)
    return Evaluation(float(each.mean()), each, drawn)
