"""The first half of a step: plan, roll out, reward, ask again, and score what credit will read."""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stepwell.columns import Columns
from stepwell.data.stream import PromptStream
from stepwell.errors import RewardError, StepwellError
from stepwell.planning.base import Planner
from stepwell.process.abilities import Segmented, ability
from stepwell.process.base import AT_POINTS, Process, Scores
from stepwell.process.models import Models
from stepwell.reward.differentiable import Judge
from stepwell.reward.mixing import Rewards
from stepwell.rng import Rng
from stepwell.sampling.record import Drawn
from stepwell.sampling.request import Prompt, Request
from stepwell.sampling.rollout import rollout
from stepwell.steering.guide import RewardGuide
from stepwell.training.distribute import World
from stepwell.training.update import score_in_pieces
from stepwell.trajectories import FIELDS, Trajectories


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
    so_far: Trajectories | None = None,
    version: int = 0,
    first_node: int = 0,
) -> Rewarded:
    """Draw the requests and judge the rows: `reward` (N,) and `rewards` (N, K) are filled, 0 without an outcome."""
    begin = time.monotonic()
    origin = {"version": version, "first_node": first_node}
    drawn = rollout(process, requests, rng, so_far=so_far, rows_at_once=rows_at_once, **origin)
    drawing = time.monotonic()
    judged = drawn.trajectories.outcome
    scored = rewards(drawn[judged], process.meter)
    kind = drawn.trajectories.log_prob.dtype
    total = torch.zeros(len(drawn), dtype=kind, device=judged.device)
    each = torch.zeros(len(drawn), len(scored.names), dtype=kind, device=judged.device)
    total[judged], each[judged] = scored.total.to(total), scored.each.to(each)
    rows = drawn.trajectories.replace(reward=total, rewards=each)
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
    guide: RewardGuide | None = None,
) -> Rewarded:
    """All rows of one step: the planner is asked until it is done, and keeps the rows that credit is given on.

    A `guide` moves every random step by the gradient of the rewards, which have to be differentiable then.
    """
    world = world or World()
    judge = Judge(rewards, stream.prompts, process.meter)
    total: Drawn | None = None
    names: tuple[str, ...] = ()
    seconds = {"rollout": 0.0, "reward": 0.0}
    for part in range(10_000):
        requests = planner.plan(step, None if total is None else total.trajectories, stream)
        if not requests:
            break
        if guide is not None:
            requests = guide.applied(requests, process, judge)
        known = None if total is None else total.trajectories
        first = world.rank * 2**40
        mine = world.share(requests)
        found: Rewarded | None = None
        failure: StepwellError | None = None
        if mine:
            own = rng.split("rollout", step, part, world.rank)
            try:
                found = draw_rewarded(process, mine, rewards, own, rows_at_once, known, version, first)
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
    kept = _noted(planner, total)[planner.keep(total.trajectories)]
    return Rewarded(kept, names, seconds)


def _noted(planner: Planner, drawn: Drawn) -> Drawn:
    """The rows with what the planner notes of them in their `info`."""
    note = getattr(planner, "note", None)
    if note is None:
        return drawn
    rows = drawn.trajectories
    known = {} if rows.info is None else dict(rows.info.items())
    info = Columns({**known, **note(rows)}, len(rows))
    return Drawn(rows.replace(info=info), drawn.samples, drawn.prompts)


def fill(
    models: Models, rows: Trajectories, reads: Collection[str], *, tokens: int | None, world: World | None = None
) -> Trajectories:
    """The rows with what credit and losses read of the parameters before the update, and of the reference.

    `value`, `entropy` and `old_x` are scores under the present parameters, `reference_x` under the reference and
    `teacher_x` under the teacher, for any need x (`process.base.NEEDS`). Fields of the rows are filled; of
    anything else `rows.info` takes what there is of each step, and `rows.points` what was scored at points that a term
    drew. `segment` is asked of the process where the rows do not have it.
    """
    if "segment" in reads:
        if rows.segment is None:
            rows = rows.replace(
                segment=ability(models.policy, Segmented, "A method that goes by sentences").segments(rows)
            )
        reads = set(reads) - {"segment"}
    reads = {name for name in reads if rows.points is None or name not in rows.points}
    if not reads:
        return rows
    then, told = (
        {name: name.removeprefix(prefix) for name in sorted(reads) if name.startswith(prefix)}
        for prefix in ("reference_", "teacher_")
    )
    now = {name: name.removeprefix("old_") for name in sorted(reads) if name not in then | told}
    scorers: list[tuple[Models, dict[str, str]]] = [(models, now)]
    scorers += [(Models(models.of("reference")), then)] if then else []
    scorers += [(Models(models.of("teacher")), told)] if told else []

    def scored(index: Tensor) -> dict[str, Tensor]:
        answer: dict[str, Tensor] = {}
        for scorer, wanted in scorers:
            if wanted:
                needs = sorted(set(wanted.values()) - {"log_prob"})
                scores = score_in_pieces(scorer, rows[index], needs, tokens)
                answer |= {name: scores[need] for name, need in wanted.items()}
        return answer

    found = (world or World()).map_rows(len(rows), scored)
    fields: dict[str, Any] = {name: value for name, value in found.items() if name in FIELDS}
    tables: dict[str, dict[str, Tensor]] = {"info": {}, "points": {}}
    for name in found.keys() - fields.keys():
        need = {**now, **then, **told}[name]
        tables["points" if need in AT_POINTS else "info"][name] = found[name]
    for table, entries in tables.items():
        if entries:
            known = getattr(rows, table)
            kept = {} if known is None else dict(known.items())
            fields[table] = Columns({**kept, **entries}, len(rows))
    return rows.replace(**fields)


def score_everywhere(
    models: Models, rows: Trajectories, needs: Collection[str], tokens: int | None, world: World
) -> Scores:
    """Scores as numbers of all rows, each computed by one process and known to all."""
    others = sorted(set(needs) - {"log_prob"})

    def scored(index: Tensor) -> dict[str, Tensor]:
        scores = score_in_pieces(models, rows[index], others, tokens)
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
