"""From requests to trajectories: every process is drawn from by this one loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from stepwell.errors import InputError
from stepwell.process.abilities import Bulk, Likeliest, Redrawn, Segmented, ability
from stepwell.process.base import Process, Samples
from stepwell.ranges import checked
from stepwell.rng import Rng
from stepwell.sampling.record import Drawn, Record
from stepwell.sampling.request import Request, Root, Snapshot
from stepwell.trajectories import Trajectories


@checked("process")
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
    """Draw the rows that the requests ask for, in the requests' order.

    A prompt is started once and forked for its whole request; rows leave the batch when they are done. Rows that
    branch from `so_far` keep the nodes of the steps they share with it. At most `rows_at_once` rows are in the
    batch at a time (a request is never split). New nodes are numbered from `first_node` beyond those of `so_far`.
    Whole rows from their prompts are left to a process that draws in bulk (`abilities.Bulk`).

    Raises `InputError` for requests that cannot be drawn, `MissingAbility` for those that need a process with more
    abilities than this one has.
    """
    if not requests:
        raise InputError("A rollout needs at least one request; none was made.")
    requests = [request.start.prepared(process, request) for request in requests]
    parts: list[Drawn] = []
    order: list[tuple[int, int]] = []
    earlier = [] if so_far is None else [so_far]
    earlier += [request.start.trajectory for request in requests if isinstance(request.start, Snapshot)]
    first_node += max((int(rows.node.max()) + 1 for rows in earlier if rows.node.numel()), default=0)
    for batch in _batches(process, requests, rows_at_once or sum(request.count for request in requests)):
        parts.append(_draw(process, [requests[i] for i in batch], rng, so_far, version, first_node))
        first_node += parts[-1].trajectories.mask.numel()
        order += [(i, copy) for i in batch for copy in range(requests[i].count)]
    parts = _segmented(process, parts)
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total if order == sorted(order) else total[torch.tensor(sorted(range(len(order)), key=order.__getitem__))]


def _batches(process: Process, requests: Sequence[Request], rows: int) -> list[list[int]]:
    """Requests that can be drawn side by side: alike in all but prompt and count, at most `rows` rows."""
    batches: dict[object, list[list[int]]] = {}
    sizes: dict[object, int] = {}  # how many rows the newest batch of a kind has
    for i, request in enumerate(requests):
        whole = isinstance(process, Bulk) and _is_whole(request)
        alike = (request.start.key, id(request.proposal), request.window, request.sampler, request.judged, whole)
        open_batches, size = batches.setdefault(alike, [[]]), sizes.get(alike, 0)
        if size and size + request.count > rows:
            open_batches.append([])
            size = 0
        open_batches[-1].append(i)
        sizes[alike] = size + request.count
    return [batch for group in batches.values() for batch in group]


def _segmented(process: Process, parts: list[Drawn]) -> list[Drawn]:
    """The parts, all of them with segments where one has them."""
    bare = [part.trajectories.segment is None for part in parts]
    if not any(bare) or all(bare):
        return parts
    segments = ability(process, Segmented, "A rollout of which only some rows have segments").segments
    rows = [part.trajectories for part in parts]
    filled = [part.replace(segment=segments(part)) if lacks else part for part, lacks in zip(rows, bare, strict=True)]
    return [replace(part, trajectories=whole) for part, whole in zip(parts, filled, strict=True)]


def _draw(
    process: Process,
    requests: Sequence[Request],
    rng: Rng,
    so_far: Trajectories | None,
    version: int,
    first_node: int,
) -> Drawn:
    """Rows for requests that are alike in all but prompt and count."""
    first = requests[0]
    owner = torch.tensor([i for i, request in enumerate(requests) for _ in range(request.count)])
    record = Record(requests, owner)
    if isinstance(process, Bulk) and _is_whole(first):
        _generate(process, requests, rng, record)
        return record.drawn(process, version=version, first_node=first_node)
    if first.sampler is not None:
        process = ability(process, Redrawn, "A request with a sampler of its own").with_sampler(**first.sampler)
    window, proposal = first.window, first.proposal
    horizon = torch.tensor([requests[i].horizon or 2**62 for i in owner.tolist()])
    begun = first.start.begin(process, requests, owner, rng, so_far)
    record.begin(begun)
    state, rows = begun.state, torch.arange(len(owner))  # the row on record that each row of the state is
    step, least = begun.steps, int(horizon.min())  # rows that start together stay in step until they are done
    while True:
        over = done = state.done.cpu()
        if step >= least:
            cut = ~done & (step >= horizon[rows])
            record.truncated[rows[cut]] = True
            over = done | cut
        if over.any():
            if first.judged:
                record.end(rows[over], process.finish(state[over.nonzero()[:, 0]]))
            keep = (~over).nonzero()[:, 0]
            if len(keep) == 0:
                break
            state, rows = state[keep], rows[keep]
        if window is None or window[0] <= step < window[1]:
            distribution = process.propose(state)
        else:
            distribution = ability(process, Likeliest, "A window of random steps").deterministic(state)
        drawn_from = distribution
        if proposal is not None:
            drawn_from = proposal(distribution, state, [requests[i].prompt for i in owner[rows].tolist()])
        action = drawn_from.sample(rng)
        log_prob = drawn_from.log_prob(action)
        if proposal is not None:
            record.weigh(rows, distribution.log_prob(action) - log_prob)
        record.add(rows, step, action, log_prob, drawn_from.random.cpu())
        state = process.advance(state, action, rng)
        step += 1
    return record.drawn(process, version=version, first_node=first_node)


def _is_whole(request: Request) -> bool:
    """True where an engine can draw it: whole rows from the prompt, by the process's own distribution."""
    special = (request.proposal, request.window, request.sampler, request.horizon)
    return isinstance(request.start, Root) and all(value is None for value in special)


def _generate(process: Bulk, requests: Sequence[Request], rng: Rng, record: Record) -> None:
    """Put on record the rows that an engine draws."""
    answers = process.generate(requests, rng)
    name = f"{type(process).__name__}.generate"
    if len(answers) != len(requests):
        raise InputError(f"{name} must return a list of rows for each of {len(requests)} requests, got {len(answers)}.")
    for request, drawn in zip(requests, answers, strict=True):
        if len(drawn) != request.count:
            raise InputError(
                f"{name} must return {request.count} rows for prompt {request.prompt.id}, got {len(drawn)}."
            )
    rows = [row for drawn in answers for row in drawn]
    record.add_rows([row.action for row in rows], [row.log_prob for row in rows])
    record.truncated |= torch.tensor([row.truncated for row in rows])
    if requests[0].judged:
        columns = {column: [row.columns[column] for row in rows] for column in rows[0].columns}
        record.end(torch.arange(len(rows)), Samples([row.value for row in rows], columns))
