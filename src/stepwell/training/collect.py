"""The first half of a step: plan, roll out, reward, and ask the planner again."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stepwell.columns import Columns
from stepwell.data.stream import PromptStream
from stepwell.errors import InputError, RewardError, StepwellError
from stepwell.meter import Meter
from stepwell.planning.base import Planner
from stepwell.process.base import Process
from stepwell.reward.differentiable import Judge
from stepwell.reward.mixing import Rewards
from stepwell.rng import Rng
from stepwell.sampling.record import Drawn
from stepwell.sampling.request import Request
from stepwell.sampling.rollout import rollout
from stepwell.steering.guide import RewardGuide
from stepwell.training.distribute import World
from stepwell.trajectories import PROVENANCES, Trajectories

PARTS = 1000
"""The most parts that a planner may ask for in one step: one that never returns [] would go on for ever."""


@dataclass(frozen=True)
class Rewarded:
    """Rows with their rewards filled in, the names of the reward functions, and the seconds of each phase."""

    drawn: Drawn
    names: tuple[str, ...]
    seconds: dict[str, float]


def with_rewards(
    drawn: Drawn, requests: Sequence[Request], rewards: Rewards, meter: Meter
) -> tuple[Drawn, tuple[str, ...]]:
    """The rows that were drawn for the requests with `reward` (N,) and `rewards` (N, K), and the K functions' names.

    Rows without an outcome get 0. A row whose request carries its reward is not handed to the reward functions: that
    number is its `reward`, and stands in all K columns of `rewards`. Where there are no functions and no row brings its
    reward, both fields stay empty.
    """
    rows = drawn.trajectories
    numbers = [request.reward for request in requests for _ in range(request.count)]
    given = torch.tensor([number is not None for number in numbers], dtype=torch.bool, device=rows.outcome.device)
    stored, asked = given & rows.outcome, rows.outcome & ~given
    if not rewards.functions and not bool(stored.any()):
        return drawn, ()
    scored = rewards(drawn[asked], meter)
    total = torch.zeros(len(drawn), dtype=rows.log_prob.dtype, device=given.device)
    each = torch.zeros(len(drawn), len(scored.names), dtype=total.dtype, device=given.device)
    total[asked], each[asked] = scored.total.to(total), scored.each.to(each)
    number = torch.tensor([number or 0.0 for number in numbers], dtype=torch.float64).to(total)
    total[stored], each[stored] = number[stored], number[stored][:, None]
    return Drawn(rows.replace(reward=total, rewards=each), drawn.samples, drawn.prompts), scored.names


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
    first_node = world.rank * 2**40
    total: Drawn | None = None
    names: tuple[str, ...] = ()
    seconds = {"rollout": 0.0, "reward": 0.0}
    for part in itertools.count():
        so_far = None if total is None else total.trajectories
        requests = _planned(planner, step, part, so_far, stream)
        if not requests:
            break
        if guide is not None:
            requests = guide.applied(requests, process, judge)
        mine = world.share(requests)
        own = rng.split("rollout", step, part, world.rank)
        rewarded: Rewarded | None = None
        failure: StepwellError | None = None
        begin = time.monotonic()
        try:
            if mine:
                place = {"version": version, "first_node": first_node}
                drawn = rollout(process, mine, own, so_far=so_far, rows_at_once=rows_at_once, **place)
                drawn = drawn if guide is None else _as_own(drawn)
                judging = time.monotonic()
                drawn, functions = with_rewards(drawn, mine, rewards, process.meter)
                phases = {"rollout": judging - begin, "reward": time.monotonic() - judging}
                rewarded = Rewarded(drawn, functions, phases)
        except StepwellError as error:  # every rank has to hear of it, or the others would wait for ever
            failure = error
        for other, message in world.gather((rewarded, None if failure is None else str(failure))):
            if message is not None:
                raise failure or RewardError(message)
            if other is not None:
                total = other.drawn if total is None else total + other.drawn
                names = other.names
                seconds = {phase: seconds[phase] + other.seconds[phase] for phase in seconds}
    assert total is not None
    kept = _noted(planner, total)[planner.keep(total.trajectories)]
    return Rewarded(kept, names, seconds)


def _as_own(drawn: Drawn) -> Drawn:
    """Rows of a guided rollout as the policy's own: the guide is the method's way to draw from it while it trains."""
    rows = drawn.trajectories
    guided = rows.provenance == PROVENANCES.index("proposed")
    return Drawn(rows.replace(provenance=rows.provenance.masked_fill(guided, 0)), drawn.samples, drawn.prompts)


def _planned(
    planner: Planner, step: int, part: int, so_far: Trajectories | None, stream: PromptStream
) -> list[Request]:
    """The requests of one part of a step; raises `InputError` for a planner that does not plan, or does not end."""
    name = f"{type(planner).__name__}.plan"
    requests = planner.plan(step, so_far, stream)
    if not isinstance(requests, list) or not all(isinstance(request, Request) for request in requests):
        raise InputError(f"{name} must return a list of requests, got {requests!r:.60}.")
    if not requests and part == 0:
        raise InputError(f"{name} must ask for at least one request in step {step}, got none.")
    if requests and part == PARTS:
        raise InputError(f"{name} must return [] to end step {step}; it asked again {PARTS} times.")
    return requests


def _noted(planner: Planner, drawn: Drawn) -> Drawn:
    """The rows with the planner's notes on them in their `info`; raises `InputError` for notes of another shape."""
    rows = drawn.trajectories
    notes, shape = planner.note(rows), tuple(rows.mask.shape)
    right = f"{type(planner).__name__}.note must return tensors (N,) or (N, T, ...) by name, here N, T = {shape}"
    if not isinstance(notes, Mapping):
        raise InputError(f"{right}; got a {type(notes).__name__}.")
    for name, note in notes.items():
        if not isinstance(note, Tensor):
            raise InputError(f"{right}; got '{name}', a {type(note).__name__}.")
        if note.shape[:2] not in (shape[:1], shape):
            raise InputError(f"{right}; got '{name}' of shape {tuple(note.shape)}.")
    if not notes:
        return drawn
    info = Columns(notes, len(rows)) if rows.info is None else rows.info.replace(**notes)
    return Drawn(rows.replace(info=info), drawn.samples, drawn.prompts)
