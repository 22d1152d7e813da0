"""The first half of a step: plan, roll out, reward, ask again, and score what credit will read."""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from stepwell.errors import RewardError, StepwellError
from stepwell.plan.base import Planner
from stepwell.plan.prompts import PromptStream
from stepwell.process.base import Process, Scores
from stepwell.reward.mixing import Rewards
from stepwell.rng import Rng
from stepwell.rollout import Drawn, Prompt, Request, rollout
from stepwell.train.distribute import World
from stepwell.train.update import score_in_pieces
from stepwell.trajectories import Trajectories


@dataclass(frozen=True)
class Rewarded:
    """Rows with their rewards filled in, and the names of the reward functions."""

    drawn: Drawn
    names: tuple[str, ...]
    seconds: dict[str, float]


def draw_rewarded(
    process: Process,
    requests: list[Request],
    rewards: Rewards,
    rng: Rng,
    rows_at_once: int | None = None,
    **origin: int,
) -> Rewarded:
    """Draw the requests and judge every row: `reward` (N,) and `rewards` (N, K) of the trajectories are filled."""
    begin = time.monotonic()
    drawn = rollout(process, requests, rng, rows_at_once=rows_at_once, **origin)  # type: ignore[arg-type]
    drawing = time.monotonic()
    scored = rewards(drawn, process.meter)
    kind = drawn.trajectories.log_prob.dtype
    rows = drawn.trajectories.replace(reward=scored.total.to(kind), rewards=scored.each.to(kind))
    seconds = {"rollout": drawing - begin, "reward": time.monotonic() - drawing}
    return Rewarded(Drawn(rows, drawn.samples, drawn.prompts), scored.names, seconds)


def collect(
    process: Process,
    planner: Planner,
    stream: PromptStream,
    rewards: Rewards,
    rng: Rng,
    step: int,
    *,
    version: int = 0,
    rows_at_once: int | None = None,
    world: World | None = None,
) -> Rewarded:
    """All rows of one step: the planner is asked until it is done, and keeps the rows that credit is given on."""
    world = world or World()
    total: Drawn | None = None
    names: tuple[str, ...] = ()
    seconds = {"rollout": 0.0, "reward": 0.0}
    for part in range(10_000):
        requests = planner.plan(step, None if total is None else total.trajectories, stream)
        if not requests:
            break
        first = world.rank * 2**40 + (0 if total is None else int(total.trajectories.node.max()) + 1)
        mine = world.share(requests)
        found: Rewarded | None = None
        failure: StepwellError | None = None
        if mine:
            own = rng.split("rollout", step, part, world.rank)
            try:
                found = draw_rewarded(process, mine, rewards, own, rows_at_once, version=version, first_node=first)
            except StepwellError as error:  # every process has to hear of it, or the others would wait for ever
                failure = error
        for other, said in world.gather((found, None if failure is None else str(failure))):
            if said is not None:
                raise failure or RewardError(said)
            if other is not None:
                total = other.drawn if total is None else total + other.drawn
                names = other.names
                seconds = {phase: seconds[phase] + other.seconds[phase] for phase in seconds}
    assert total is not None, "the planner asked for nothing"
    return Rewarded(total[planner.keep(total.trajectories)], names, seconds)


def fill(
    process: Process, rows: Trajectories, reads: Collection[str], *, tokens: int | None, world: World | None = None
) -> Trajectories:
    """The rows with the fields that credit reads: `old_log_prob`, `value`, `entropy`, `reference_log_prob`."""
    own = sorted(set(reads) & {"value", "entropy"})
    wanted = [name for name in ("old_log_prob", "reference_log_prob", *own) if name in reads]
    if not wanted:
        return rows

    def scored(index: Tensor) -> dict[str, Tensor]:
        answer: dict[str, Tensor] = {}
        if own or "old_log_prob" in reads:
            scores = score_in_pieces(process, rows[index], own, tokens)
            answer |= {"old_log_prob": scores.log_prob, **{name: scores[name] for name in own}}
        if "reference_log_prob" in reads:
            reference = process.reference  # type: ignore[attr-defined]
            answer["reference_log_prob"] = score_in_pieces(reference, rows[index], (), tokens).log_prob
        return answer

    found = (world or World()).map_rows(len(rows), scored)
    return rows.replace(**{name: found[name] for name in wanted})


def score_everywhere(
    process: Process, rows: Trajectories, needs: Collection[str], tokens: int | None, world: World
) -> Scores:
    """Scores as numbers of all rows, each computed by one process and known to all."""
    others = sorted(set(needs) - {"log_prob"})

    def scored(index: Tensor) -> dict[str, Tensor]:
        scores = score_in_pieces(process, rows[index], others, tokens)
        return {"log_prob": scores.log_prob, **scores.extra}

    found = world.map_rows(len(rows), scored)
    return Scores(found.pop("log_prob"), found)


@dataclass(frozen=True)
class Evaluation:
    """How good a process is on given prompts: the mean reward, each prompt's, and what was drawn."""

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
    """Mean reward over `samples` draws a prompt; what it costs is not on the run's meter."""
    requests = [Request(prompt, samples) for prompt in prompts]
    with process.meter.paused():
        drawn = draw_rewarded(process, requests, rewards, rng, rows_at_once).drawn
    assert drawn.trajectories.reward is not None
    each = drawn.trajectories.reward.double().reshape(len(prompts), samples).mean(1)
    return Evaluation(float(each.mean()), each, drawn)
