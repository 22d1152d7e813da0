"""The laws of a process's states, one function each: forks, and rows that are done. The largest deviation found."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from stepwell.check.processes.bench import Bench, broken
from stepwell.check.replay import hashable
from stepwell.errors import Unenumerable
from stepwell.process.base import Process, Samples, State
from stepwell.rng import Replay, Rng

_WALK = 6  # steps along which forks, and rows that are done, are compared
_OTHERS = 3  # further actions that a state is advanced by, and must not be changed by
_END = 64  # steps in which rows are drawn to their end


@torch.no_grad()
def fork(bench: Bench) -> tuple[float, float, bool]:
    """Deviations of forks and of rows drawn alone; and whether prompt and actions determine every state."""
    process, rng = bench.process, bench.rng
    state = process.start(bench.values, rng.split("start"))
    determined = not _random(lambda any_rng: process.start(bench.values, any_rng))
    alone: list[State] = [  # after a random start, only a fork of the row itself can be compared with it
        process.start([value], rng.split("start")) if determined else state[torch.tensor([row])]
        for row, value in enumerate(bench.values)
    ]
    worst = rows_apart = 0.0
    stepwise = True  # the action determines the next state
    for step in range(_WALK):
        going = _going(state)
        if not len(going):
            break
        state, alone = state[going], [alone[row] for row in going.tolist()]
        distribution, everyone = process.propose(state), torch.arange(len(going))
        index = torch.cat([everyone.flip(0), everyone])
        fork = state[index]
        sentence = f"after {step} steps, state[{index.tolist()}] proposes otherwise than its rows did"
        worst = max(worst, bench.hold_distribution("fork", process.propose(fork), distribution[index], sentence))
        _continue(process, fork, rng.split("elsewhere", step))
        sentence = f"after {step} steps, continuing a fork changed the original"
        worst = max(worst, bench.hold_distribution("fork", process.propose(state), distribution, sentence))
        action, twin = distribution.sample(rng.split("act", step)), state[everyone]
        sentence = f"after {step} steps, advancing a state changed the state itself or a fork of it"
        for other in range(_OTHERS):  # a state that is overwritten may be so with what it held already
            process.advance(state, distribution.sample(rng.split("other", step, other)), rng.split("advance", step))
            worst = max(worst, bench.hold_distribution("fork", process.propose(state), distribution, sentence))
        following = process.advance(state, action, rng.split("advance", step))
        for kept in (state, twin):
            worst = max(worst, bench.hold_distribution("fork", process.propose(kept), distribution, sentence))
        before = state
        stepwise = stepwise and not _random(lambda any_rng: process.advance(before, action, any_rng))  # noqa: B023
        if stepwise:
            twin = process.advance(twin, action, rng.split("advance", step, "twin"))
            going = _going(following)
            if not torch.equal(following.done, twin.done):
                broken("fork", f"after {step} steps, a fork and its original differ in what the same action ends.")
            if len(going):
                sentence = f"after {step} steps, a fork goes on otherwise than its original does by the same action"
                pair = process.propose(twin[going]), process.propose(following[going])
                worst = max(worst, bench.hold_distribution("fork", *pair, sentence))
            for row, single in enumerate(alone):
                sentence = f"after {step} steps, a row proposes otherwise alone than beside other rows"
                beside = distribution[torch.tensor([row])]
                rows_apart = max(rows_apart, bench.hold_distribution("rows", process.propose(single), beside, sentence))
                alone[row] = process.advance(single, action[row : row + 1], rng.split("advance", step))
        state = following
    return worst, rows_apart, determined and stepwise


def _going(state: State) -> Tensor:
    """The places of rows that are not done."""
    return (~state.done).nonzero()[:, 0].cpu()


def _random(act: Callable[[Rng], object]) -> bool:
    """True for an act that draws from the `Rng` it is given: a `Replay` takes note of every draw, or refuses it."""
    replay = Replay()
    try:
        act(replay)
    except Unenumerable:
        return True
    return bool(replay.choices)


def _continue(process: Process, state: State, rng: Rng) -> None:
    """Two steps onwards, with draws of its own."""
    for _ in range(2):
        state = process.advance(state, process.propose(state).sample(rng), rng)
        going = _going(state)
        if not len(going):
            return
        state = state[going]


@torch.no_grad()
def absorbing(bench: Bench, forks: bool, determined: bool) -> float | str:
    """Deviations of rows that are done, advanced beside rows that go on; a sentence where no row is done soon enough.

    Rows are drawn to their end where that takes at most 64 steps, else for as many as the check draws. Where prompt
    and actions determine every state (`determined`), rows that go on are compared with the same rows by themselves. A
    process that cannot fork is advanced by its rows that are done alone.
    """
    process, rng = bench.process, bench.rng
    longest = process.horizon or bench.horizon or _END  # of its own steps; an environment's come on top
    steps = _END if longest <= _END else bench.horizon or _END
    state = process.start(bench.values, rng.split("start"))
    if bench.group > 1:
        state = state[torch.arange(len(bench.values)).repeat_interleave(bench.group)]
    worst, tried = 0.0, 0
    for step in range(steps + 1):
        over = bool(state.done.all())
        if bool(state.done.any()) and (over or tried < _WALK):
            kept = state if forks else state[state.done.nonzero()[:, 0].cpu()]
            worst, tried = max(worst, _stays(bench, kept, step, determined)), tried + 1
        if over or step == steps:
            break
        action = process.propose(state).sample(rng.split("absorbing", step))
        state = process.advance(state, action, rng.split("absorbing", step, "advance"))
    return worst if tried else f"no row was done within {steps} steps"


def _stays(bench: Bench, state: State, step: int, determined: bool) -> float:
    """Advance a state some of whose rows are done."""
    process, rng, worst = bench.process, bench.rng.split("stays", step), 0.0
    ended, going = state.done.nonzero()[:, 0].cpu(), _going(state)
    distribution, seen = process.propose(state), _shown(process.finish(state[ended]))
    if len(going):
        sentence = f"after {step} steps, a row that goes on proposes otherwise beside rows that are done"
        pair = distribution[going], process.propose(state[going])
        worst = max(worst, bench.hold_distribution("absorbing", *pair, sentence))
    for other in range(_OTHERS):
        action = distribution.sample(rng.split("act", other)).clone()
        action[ended] = action.roll(other, 0)[ended]  # any action, such as another row's
        after = process.advance(state, action, rng.split("advance"))
        if not bool(after.done[ended.to(after.done.device)].all()):
            broken("absorbing", f"after {step} steps, a row that was done goes on once the state is advanced.")
        if _shown(process.finish(after[ended])) != seen:
            broken("absorbing", f"after {step} steps, advancing a row that was done changed what `finish` gives of it.")
        proposed = process.propose(after)
        sentence = f"after {step} steps, advancing a row that was done changed what it proposes"
        worst = max(worst, bench.hold_distribution("absorbing", proposed[ended], distribution[ended], sentence))
        if not determined or not len(going):
            continue
        alone = process.advance(state[going], action[going], rng.split("advance"))
        if not torch.equal(alone.done, after.done[going.to(after.done.device)]):
            broken("absorbing", f"after {step} steps, rows that are done decide where another row ends.")
        left = _going(alone)
        if len(left):
            sentence = f"after {step} steps, rows that are done changed how another row goes on"
            pair = proposed[going[left]], process.propose(alone[left])
            worst = max(worst, bench.hold_distribution("absorbing", *pair, sentence))
    return worst


def _shown(samples: Samples) -> list[Any]:
    """Samples and columns as far as they can be compared: texts, numbers, tensors, and lists and tables of them."""
    columns = [samples.values, *samples.columns.values(), samples.truncated]
    return [hashable(column) if _comparable(column) else None for column in columns]


def _comparable(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(map(_comparable, value.values()))
    if isinstance(value, Sequence) and not isinstance(value, str):
        return all(map(_comparable, value))
    return value is None or isinstance(value, str | int | float | Tensor)
