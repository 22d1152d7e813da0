"""From requests to trajectories: every process is drawn from by this one loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from stepwell.distributions import Distribution
from stepwell.errors import InputError
from stepwell.process.base import Process, Samples, State, ability
from stepwell.rng import Rng
from stepwell.trajectories import Trajectories, concatenate, make, together


@dataclass(frozen=True)
class Prompt:
    """One row of the user's data: what the process starts from, and the columns that go to the reward."""

    id: int
    value: Any
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Snapshot:
    """A one-row state to continue from, with the trajectory that led there."""

    state: State
    trajectory: Trajectories


@dataclass(frozen=True)
class Completion:
    """What another than the policy wrote for a prompt, taken as it is: all its steps train, at log-probability 0."""

    value: Any


@dataclass(frozen=True)
class Request:
    """`count` samples for one prompt.

    `context` takes the prompt's place while drawing (a hint, a prefix); the rows are scored under the prompt
    unless told otherwise. `start` is None for the root, `(row, step)` of the trajectories drawn so far to branch
    after that row's first `step` steps, a `Snapshot`, or one row of an earlier rollout to go on with, for processes
    that are determined by their actions. `horizon` bounds the steps of a row, those before its start included. A
    `Completion` is a whole row that nothing is drawn for. `proposal` maps the process's law, the state and each row's
    prompt to the law drawn from; the row's log weight keeps the account. Rows that are not `judged` have no outcome:
    they are there to branch from.

    `window` (begin, end): only steps begin..end-1 are drawn at random and trained. Before its start a row keeps what
    it was drawn with, and elsewhere it takes the process's `deterministic` step: the likeliest token, the ODE's step.
    `sampler` names settings of the process for these rows alone (`process.with_sampler`): those of steps outside the
    window, since trained steps are scored under the law that all rows share.
    """

    prompt: Prompt
    count: int = 8
    context: Any = None
    start: tuple[int, int] | Snapshot | Trajectories | Completion | None = None
    horizon: int | None = None
    proposal: Callable[[Distribution, State, list[Prompt]], Distribution] | None = None
    source: int = 0
    window: tuple[int, int] | None = None
    sampler: Mapping[str, Any] | None = None
    judged: bool = True

    def __post_init__(self) -> None:
        if self.count < 1:
            raise InputError(f"A request asks for {self.count} samples of prompt {self.prompt.id}; 1 is the least.")
        if self.horizon is not None and self.horizon < 1:
            raise InputError(f"A request for prompt {self.prompt.id} has a horizon of {self.horizon}; 1 is the least.")
        if self.window is not None and not 0 <= self.window[0] <= self.window[1]:
            raise InputError(
                f"A request for prompt {self.prompt.id} has the window {self.window}; (begin, end) with "
                "0 <= begin <= end is right."
            )


@dataclass(frozen=True)
class Drawn:
    """Trajectories and, row by row, what the user sees of them and the prompts they answer."""

    trajectories: Trajectories
    samples: Samples
    prompts: list[Prompt]

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: Tensor) -> Drawn:
        """The rows at the given places, or where a bool tensor is True."""
        index = index.nonzero()[:, 0] if index.dtype == torch.bool else index
        rows = index.tolist()
        return Drawn(self.trajectories[index], self.samples[rows], [self.prompts[row] for row in rows])

    def __add__(self, other: Drawn) -> Drawn:
        """Both, with the rows of `other` after these; both belong to one step's rollout."""
        columns = {name: value + other.samples.columns[name] for name, value in self.samples.columns.items()}
        return Drawn(
            concatenate([self.trajectories, other.trajectories]),
            Samples(self.samples.values + other.samples.values, columns),
            self.prompts + other.prompts,
        )


@torch.no_grad()
def rollout(
    process: Process,
    requests: Sequence[Request],
    rng: Rng,
    *,
    so_far: Trajectories | None = None,
    version: int = 0,
    rows_at_once: int | None = None,
    first_node: int = 0,
) -> Drawn:
    """Draw what the requests ask for.

    A prompt is started once and forked for its whole request; rows leave the batch when they are done. Rows that
    branch from `so_far` keep the nodes of the steps they share with it. At most `rows_at_once` rows are in the
    batch at a time (a request is never split). New nodes are numbered from `first_node` beyond those of `so_far`.
    """
    if not requests:
        raise InputError("A rollout needs at least one request; none was made.")
    requests = [_taken(process, request) for request in requests]
    parts: list[Drawn] = []
    order: list[tuple[int, int]] = []
    known = [] if so_far is None else [so_far]
    known += [request.start.trajectory for request in requests if isinstance(request.start, Snapshot)]
    first_node += max((int(rows.node.max()) + 1 for rows in known if rows.node.numel()), default=0)
    for batch in _batches(requests, rows_at_once or sum(request.count for request in requests)):
        parts.append(_draw(process, [requests[i] for i in batch], rng, so_far, version, first_node))
        first_node += parts[-1].trajectories.mask.numel()
        order += [(i, copy) for i in batch for copy in range(requests[i].count)]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total if order == sorted(order) else total[torch.tensor(sorted(range(len(order)), key=order.__getitem__))]


def _taken(process: Process, request: Request) -> Request:
    """A request for a completion as one to go on with the row that it is, which is at its end."""
    if not isinstance(request.start, Completion):
        return request
    action = ability(process, "encode", "A completion that is given")(request.start.value)[None]
    row = make(action, torch.zeros(action.shape, device=action.device), torch.ones(action.shape, dtype=torch.bool))
    return replace(request, start=row, horizon=action.shape[1])


def _batches(requests: Sequence[Request], rows: int) -> list[list[int]]:
    """Requests that can be drawn side by side: alike in all but prompt and count, at most `rows` rows."""
    batches: dict[object, list[list[int]]] = {}
    sizes: dict[object, int] = {}  # how many rows the newest batch of a kind has
    for i, request in enumerate(requests):
        start = request.start
        if isinstance(start, Trajectories):
            kind: object = ("row", int(start.length[0]))
        else:
            step: Any = start if start is None or isinstance(start, Snapshot) else ("step", start[1])  # type: ignore[index]
            kind = id(step) if isinstance(step, Snapshot) else step
        law = None if request.sampler is None else repr(sorted(request.sampler.items()))
        alike = (kind, id(request.proposal), request.window, law, request.judged)
        open_batches, size = batches.setdefault(alike, [[]]), sizes.get(alike, 0)
        if size and size + request.count > rows:
            open_batches.append([])
            size = 0
        open_batches[-1].append(i)
        sizes[alike] = size + request.count
    return [batch for group in batches.values() for batch in group]


class _Record:
    """The steps of a rollout while it is drawn: rows come and go, so every step lists its rows."""

    def __init__(self, rows: int):
        self.steps: list[tuple[Tensor, int, Tensor, Tensor, Tensor]] = []
        self.position = torch.zeros(rows, dtype=torch.long)  # (N,) the next step of each row
        self.log_weight = torch.zeros(rows, dtype=torch.float64)

    def add(self, rows: Tensor, step: int, action: Tensor, log_prob: Tensor, random: Tensor) -> None:
        self.steps.append((rows, step, action, log_prob, random))

    def table(self, rows: int) -> tuple[Tensor, Tensor, Tensor]:
        """action (N, T, ...), log_prob (N, T), mask (N, T)."""
        for row, step, *_ in self.steps:
            self.position[row] = step + 1
        width = int(self.position.max())
        if not self.steps:  # every row was done at its start
            return torch.zeros(rows, 0, dtype=torch.long), torch.zeros(rows, 0), torch.zeros(rows, 0).bool()
        first, kinds = self.steps[0][2], [(step[2].dtype, step[3].dtype) for step in self.steps]
        action_kind, log_prob_kind = (reduce(torch.promote_types, column) for column in zip(*kinds, strict=True))
        if all(len(row) == rows for row, *_ in self.steps):  # nobody left before the end
            mask = torch.stack([random for *_, random in self.steps], 1)
            log_prob = torch.stack([log_p.to(log_prob_kind) for *_, log_p, _ in self.steps], 1)
            action = torch.stack([drawn.to(action_kind) for _, _, drawn, *_ in self.steps], 1)
            return action, log_prob.masked_fill(~mask.to(log_prob.device), 0.0), mask
        action = torch.zeros(rows, width, *first.shape[1:], dtype=action_kind, device=first.device)
        log_prob = torch.zeros(rows, width, dtype=log_prob_kind, device=first.device)
        mask = torch.zeros(rows, width, dtype=torch.bool)
        for row, step, drawn, log_p, random in self.steps:
            action[row, step], mask[row, step] = drawn.to(action_kind), random
            log_prob[row, step] = log_p.to(log_prob_kind).masked_fill(~random.to(log_p.device), 0.0)
        return action, log_prob, mask


def _draw(
    process: Process,
    requests: Sequence[Request],
    rng: Rng,
    so_far: Trajectories | None,
    version: int,
    first_node: int,
) -> Drawn:
    """Rows for requests that are alike in all but prompt and count."""
    if requests[0].sampler is not None:
        process = ability(process, "with_sampler", "A request with a law of its own")(**requests[0].sampler)
    window = requests[0].window
    owner = torch.tensor([i for i, request in enumerate(requests) for _ in range(request.count)])
    total = len(owner)
    horizon = torch.tensor([requests[i].horizon or 2**62 for i in owner.tolist()])
    proposal = requests[0].proposal
    record, truncated = _Record(total), torch.zeros(total, dtype=torch.bool)
    state, shared = _begin(process, requests, owner, rng, so_far, record)
    rows = torch.arange(total)  # which row of the answer each row of the state is
    finished: list[tuple[Tensor, Samples]] = []
    step, least = len(record.steps), int(horizon.min())  # rows that start together stay in step until they are done
    while True:
        over = done = state.done.cpu()
        if step >= least:
            cut = ~done & (step >= horizon[rows])
            truncated[rows[cut]] = True
            over = done | cut
        if over.any():
            if requests[0].judged:
                finished.append((rows[over], process.finish(state[over.nonzero()[:, 0]])))
            keep = (~over).nonzero()[:, 0]
            if len(keep) == 0:
                break
            state, rows = state[keep], rows[keep]
        if window is None or window[0] <= step < window[1]:
            law = process.propose(state)
        else:
            law = ability(process, "deterministic", "A window of random steps")(state)
        drawn_from = law
        if proposal is not None:
            drawn_from = proposal(law, state, [requests[i].prompt for i in owner[rows].tolist()])
        action = drawn_from.sample(rng)
        log_prob = drawn_from.log_prob(action)
        if proposal is not None:
            record.log_weight[rows] += (law.log_prob(action) - log_prob).double().cpu()
        record.add(rows, step, action, log_prob, drawn_from.random.cpu())
        state = process.advance(state, action, rng)
        step += 1
    action, log_prob, mask = record.table(total)
    node = first_node + torch.arange(mask.numel()).reshape(mask.shape)
    node = node.masked_fill(torch.arange(mask.shape[1]) >= record.position[:, None], -1)
    node[:, : shared.shape[1]] = shared.cpu()
    samples, own = _in_order(finished, total, log_prob)
    condition = process.condition([request.prompt.value for request in requests])
    trajectories = make(
        action,
        log_prob,
        mask,
        length=record.position,
        prompt=torch.tensor([requests[i].prompt.id for i in owner.tolist()]),
        node=node,
        truncated=truncated | own.pop("truncated"),
        outcome=torch.full((total,), requests[0].judged),
        weight=record.log_weight.to(log_prob.dtype),
        source=torch.tensor([requests[i].source for i in owner.tolist()]),
        version=torch.full((total,), version),
        condition=None if condition is None else condition[owner],
        **own,
    )
    if trajectories.mask.device != action.device:
        trajectories = trajectories.to(action.device)
    return Drawn(trajectories, samples, [requests[i].prompt for i in owner.tolist()])


def _begin(
    process: Process,
    requests: Sequence[Request],
    owner: Tensor,
    rng: Rng,
    so_far: Trajectories | None,
    record: _Record,
) -> tuple[State, Tensor]:
    """The rows where they start, their shared steps put on record, and the nodes (N, P) of those steps."""
    start = requests[0].start
    if isinstance(start, Snapshot):
        everywhere = torch.zeros(len(owner), dtype=torch.long)
        state, prefix, steps = start.state[everywhere], start.trajectory[everywhere], int(start.trajectory.length[0])
    else:
        values = [r.prompt.value if r.context is None else r.context for r in requests]
        data = {"columns": [r.prompt.columns for r in requests]} if getattr(process, "reads_columns", False) else {}
        state = process.start(values, rng, **data)
        if start is None:
            return state[owner], torch.zeros(len(owner), 0, dtype=torch.long)
        if isinstance(start, Trajectories):
            return _continue(process, requests, owner, rng, state, record)
        sources, steps = torch.tensor([request.start[0] for request in requests]), start[1]  # type: ignore[index]
        outside = so_far is None or int(sources.min()) < 0 or int(sources.max()) >= len(so_far) or steps < 0
        if so_far is None or outside or bool((so_far.length[sources] < steps).any()):
            raise InputError(f"A request branches at rows {sources.tolist()}, step {steps}, which were not all drawn.")
        prefix = so_far[sources]
        for request, prompt in zip(requests, prefix.prompt.tolist(), strict=True):
            if request.prompt.id != prompt:
                raise InputError(
                    f"A request for prompt {request.prompt.id} branches at row {request.start[0]}, "  # type: ignore[index]
                    f"which answers prompt {prompt}."
                )
        for step in range(steps):
            state = process.advance(state, prefix.action[:, step], rng)
        state, prefix = state[owner], prefix[owner]
    if bool((prefix.weight != 0).any()) and not isinstance(start, Snapshot):
        raise InputError("Rows with importance weights cannot be branched at a step; continue a Snapshot instead.")
    record.log_weight += prefix.weight.double().cpu()
    for step in range(steps):
        window = requests[0].window
        trained = prefix.mask[:, step].cpu() & (window is None or window[0] <= step < window[1])
        record.add(torch.arange(len(owner)), step, prefix.action[:, step], prefix.log_prob[:, step], trained)
    return state, prefix.node[:, :steps]


def _continue(
    process: Process, requests: Sequence[Request], owner: Tensor, rng: Rng, state: State, record: _Record
) -> tuple[State, Tensor]:
    """Rows of an earlier rollout, gone through again; their steps are nodes of this rollout's own."""
    rows = together([request.start for request in requests])  # type: ignore[misc]
    if bool((rows.weight != 0).any()):
        raise InputError("Rows with importance weights cannot be gone on with; continue a Snapshot instead.")
    steps = int(rows.length[0])
    for step in range(steps):
        state = process.advance(state, rows.action[:, step], rng)
        action, log_prob, mask = (getattr(rows, name)[owner, step] for name in ("action", "log_prob", "mask"))
        record.add(torch.arange(len(owner)), step, action, log_prob, mask.cpu())
    return state[owner], torch.zeros(len(owner), 0, dtype=torch.long)


def _in_order(
    finished: Sequence[tuple[Tensor, Samples]], total: int, log_prob: Tensor
) -> tuple[Samples, dict[str, Tensor]]:
    """The samples in the order of the rows, and those of their columns that are fields of the trajectories.

    `truncated` (N,): which rows the process itself cut short. Where the process says so, one number a step, also
    `segment` and `step_reward` (N, T).
    """
    values: list[Any] = [None] * total
    columns: dict[str, list[Any]] = {name: [None] * total for _, part in finished for name in part.columns}
    for rows, part in finished:
        for place, row in enumerate(rows.tolist()):
            values[row] = part.values[place]
            for name, column in part.columns.items():
                columns[name][row] = column[place]
    fields = {"truncated": torch.tensor([bool(value) for value in columns.pop("truncated", [False] * total)])}
    for name, kind in (("segment", torch.long), ("step_reward", log_prob.dtype)):
        if name in columns:
            steps = [torch.tensor(row, dtype=kind) for row in columns.pop(name)]
            fields[name] = torch.zeros(log_prob.shape, dtype=kind, device=log_prob.device)
            for row, numbers in enumerate(steps):
                fields[name][row, : len(numbers)] = numbers.to(log_prob.device)
    return Samples(values, columns), fields
