"""The cost of a step without the network, compared with diffusers, and the savings of windows and batched scoring."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from models import Network
from torch import Tensor

from stepwell import Prompt, Recipe, Request, Rng, flow, rollout, train
from stepwell.objective.policy import Policy
from stepwell.objective.reduction import Reduction
from stepwell.planning.groups import Groups
from stepwell.planning.windows import Windows
from stepwell.process.flow.process import Flow

SHAPES = {"SD3 latents": (16, 64, 64), "16 numbers": (16,)}
PEERS: dict[str, tuple[str, dict[str, Any]]] = {
    "unipc-2": ("UniPCMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}),
    "dpmpp-2m": ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}),
    "euler": ("FlowMatchEulerDiscreteScheduler", {}),
}


def fastest(works: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """Seconds of each, the best of `repeats` after one that warms up; in turns, so that a busy machine slows all."""
    times = [math.inf] * len(works)
    for run in range(repeats + 1):
        for place, work in enumerate(works):
            begin = time.perf_counter()
            work()
            if run:
                times[place] = min(times[place], time.perf_counter() - begin)
    return times


def overhead(steps: int = 20, repeats: int = 30) -> list[tuple[str, str, float, float]]:
    """(solver, what is drawn, theirs, ours): seconds a step of drawing one sample, with a model that costs nothing.

    Theirs makes the calls of a pipeline, `set_timesteps` and `step`; ours is a rollout of a flow.
    """
    import diffusers

    rows = []
    for what, shape in SHAPES.items():
        answer = Rng(0).normal(1, *shape)
        for solver, (kind, options) in PEERS.items():
            scheduler = getattr(diffusers, kind)(**options)
            process = flow(lambda x, t, answer=answer: answer, shape, solver=solver, steps=steps)
            request, generator = [Request(Prompt(0, None), 1)], torch.Generator().manual_seed(0)

            def theirs(scheduler: Any = scheduler, answer: Tensor = answer, generator: Any = generator) -> None:
                scheduler.set_timesteps(steps)
                x = torch.randn(answer.shape, generator=generator)
                for timestep in scheduler.timesteps:
                    x = scheduler.step(answer, timestep, x, return_dict=False)[0]

            def ours(process: Flow = process, request: list[Request] = request) -> None:
                rollout(process, request, Rng(0))

            seconds = fastest([theirs, ours], repeats)
            rows.append((solver, what, seconds[0] / steps, seconds[1] / steps))
    return rows


def _trained_flow(width: int) -> Flow:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Network(64, width, blocks=3)
    return flow(network, (64,), solver="sde-flow", steps=10)


def window(width: int = 1024, group: int = 16, steps: int = 2, repeats: int = 3) -> list[float]:
    """Seconds of a training step on all of 10 steps, and on a window of 3."""
    planners = [Groups(4, group), Windows(4, group, steps=10, width=3, begin=3)]

    def work(planner: Groups) -> Callable[[], object]:
        recipe = Recipe(Policy(reduction=Reduction("row-sum")), planner, sampler={"solver": "sde-flow", "steps": 10})
        process = _trained_flow(width)

        def closer(completions: Sequence[Tensor], **_: Any) -> list[float]:
            return [-float(x.square().mean()) for x in completions]

        prompts = [{"prompt": place} for place in range(4)]
        return lambda: train(process, prompts, closer, recipe, steps=steps, learning_rate=1e-4)

    return [seconds / steps for seconds in fastest([work(planner) for planner in planners], repeats)]


def replay(width: int = 192, rows: int = 8, repeats: int = 5) -> list[float]:
    """Seconds of scoring 10 trained steps with their gradient, one step at a time and all at once."""
    process = _trained_flow(width)
    drawn = rollout(process, [Request(Prompt(0, None), rows)], Rng(0)).trajectories
    trained = drawn.mask.any(0).nonzero()[:, 0].tolist()

    def in_turn() -> None:
        for step in trained:
            alone = torch.zeros_like(drawn.mask)
            alone[:, step] = drawn.mask[:, step]
            process.score(drawn.replace(mask=alone)).log_prob.sum().backward()

    def at_once() -> None:
        process.score(drawn).log_prob.sum().backward()

    return fastest([in_turn, at_once], repeats)
