"""Trajectories: N rows of T random steps in one typed batch, which all parts of a run pass on."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stepwell.columns import Columns, at, joined
from stepwell.errors import InputError
from stepwell.tensors import Tensor, functional, torch


@dataclass(frozen=True, eq=False)
class Trajectories:
    """N rows by T steps, padded on the right.

    `rows[index]` are the rows at an index (a tensor, a slice or a list), `len(rows)` is N, `rows.to(device)` and
    `rows.replace(reward=...)` give new rows, and `concatenate` puts several batches together. The fields, with their
    shapes:

    action (N, T, ...)       the actions drawn
    log_prob (N, T)          log-probability of each action under the distribution it was really drawn from
    mask (N, T) bool         the step happened and was the policy's own random choice: only such steps are trained
    length (N,)              steps that happened, random or not
    prompt (N,)              id of the prompt, and so of the group; groups may be ragged
    node (N, T)              rows that share a step share its node; -1 where no step happened
    truncated (N,) bool      the row was cut at the horizon
    outcome (N,) bool        the row has an end that a reward may judge
    weight (N,)              log importance weight of the distribution asked for against that drawn from
    source, version (N,)     number of the behaviour that drew the row, and of updates its parameters had then
    provenance (N,)          who drew the row: the place of its name in `PROVENANCES`, 0 for the policy itself
    condition                conditioning of each row, for scoring it (prompt tokens, classes, ...), left-padded
    segment (N, T)           token -> sentence, step, turn
    reward (N,), rewards (N, K), step_reward (N, T)
    final_value (N,)         value of each row's last state, where it was cut although more would have come; else 0
    observed (N, T, *O)      the policy's observation before each step, where actions do not determine it
    last_observed (N, *O)    the one after each row's last step
    old_log_prob, reference_log_prob, value, entropy (N, T)   scored before the update, where a method needs it
    points                   points that a term drew at random for each row, and their scores before the update
    info                     (N,) or (N, T, ...) entries that a method declared
    """

    action: Tensor
    log_prob: Tensor
    mask: Tensor
    length: Tensor
    prompt: Tensor
    node: Tensor
    truncated: Tensor
    outcome: Tensor
    weight: Tensor
    source: Tensor
    version: Tensor
    provenance: Tensor
    condition: Columns | None = None
    segment: Tensor | None = None
    reward: Tensor | None = None
    rewards: Tensor | None = None
    step_reward: Tensor | None = None
    final_value: Tensor | None = None
    observed: Tensor | None = None
    last_observed: Tensor | None = None
    old_log_prob: Tensor | None = None
    reference_log_prob: Tensor | None = None
    value: Tensor | None = None
    entropy: Tensor | None = None
    points: Columns | None = None
    info: Columns | None = None

    def __len__(self) -> int:
        return len(self.mask)

    def __getitem__(self, index: Tensor | slice | Sequence[int]) -> Trajectories:
        return Trajectories(**{name: at(value, index) for name, value in self.present()})

    def present(self) -> Iterator[tuple[str, Any]]:
        """The fields that are filled, by name."""
        values = ((name, getattr(self, name)) for name in FIELDS)
        return ((name, value) for name, value in values if value is not None)

    def replace(self, **changes: Any) -> Trajectories:
        """The same rows with other values of the fields named."""
        return dataclasses.replace(self, **changes)

    def to(self, device: torch.device | str) -> Trajectories:
        """All fields on another device."""
        return Trajectories(**{name: value.to(device) for name, value in self.present()})


PROVENANCES = ("policy", "demonstrations", "hinted", "proposed", "replayed")
"""The provenances of rows: the policy, asked the row's own prompt; a completion written elsewhere; the policy under
another context; another distribution than the policy's; an earlier rollout, of which nothing was drawn anew."""

FIELDS = tuple(Trajectories.__annotations__)
STEP_FIELDS = (
    "action log_prob mask node segment step_reward observed old_log_prob reference_log_prob value entropy".split()
)


def make(action: Tensor, log_prob: Tensor, mask: Tensor, **fields: Any) -> Trajectories:
    """Trajectories from the three tensors that have no default; every other field takes its plainest value.

    By default each row is a prompt of its own, drawn on its own, complete, and of weight one.
    """
    count, steps = mask.shape
    happened, device = mask.bool(), mask.device
    last = torch.where(happened, torch.arange(1, steps + 1, device=device), 0)
    length = fields.get("length", last.amax(1) if steps else last.sum(1))
    inside = torch.arange(steps, device=device) < length[:, None]
    zeros = torch.zeros(count, dtype=torch.long, device=device)
    defaults: dict[str, Any] = {
        "length": length,
        "prompt": torch.arange(count, device=device),
        "node": torch.arange(count * steps, device=device).reshape(count, steps).masked_fill(~inside, -1),
        "truncated": zeros.bool(),
        "outcome": torch.ones(count, dtype=torch.bool, device=device),
        "weight": torch.zeros(count, dtype=log_prob.dtype, device=device),
        "source": zeros,
        "version": zeros,
        "provenance": zeros,
    }
    return Trajectories(action=action, log_prob=log_prob, mask=happened, **{**defaults, **fields})


def pad_steps(rows: Trajectories, steps: int) -> Trajectories:
    """The same rows, padded on the right to `steps` steps; nothing that is computed from them may change.

    Raises `InputError` where the rows are already longer.
    """
    extra = steps - rows.mask.shape[1]
    if extra == 0:
        return rows
    if extra < 0:
        raise InputError(f"steps must be at least the {rows.mask.shape[1]} of the rows to be padded, got {steps}.")
    present = ((name, getattr(rows, name)) for name in STEP_FIELDS)
    changed: dict[str, Any] = {name: _pad_right(value, extra, name) for name, value in present if value is not None}
    if rows.info is not None:
        width = rows.mask.shape[1]
        entries = {
            key: _pad_right(value, extra) if value.dim() > 1 and value.shape[1] == width else value
            for key, value in _tensors(rows.info)
        }
        changed["info"] = Columns(entries, len(rows))
    return rows.replace(**changed)


def _tensors(entries: Columns | None) -> Iterator[tuple[str, Any]]:
    """The entries by name; none where there is no table."""
    return iter(()) if entries is None else iter(entries.items())


def _pad_right(value: Tensor, extra: int, name: str = "") -> Tensor:
    return functional.pad(value, (0, 0) * (value.dim() - 2) + (0, extra), value=-1 if name == "node" else 0)


def concatenate(parts: Sequence[Trajectories], *, renumber: bool = False) -> Trajectories:
    """Rows one after another, steps padded on the right and conditions on the left to a common width.

    Parts of one step's rollout number their nodes jointly, so that branches go on sharing steps with their
    origin. Parts of separate rollouts are `renumber`ed: rows of different parts then share no node.
    Raises `InputError` where one part has a field that another lacks.
    """
    _same_fields(parts)
    steps = max(part.mask.shape[1] for part in parts)
    widths: dict[str, int] = {}
    for part in parts:
        for key, value in _tensors(part.condition):
            widths[key] = max(widths.get(key, 0), value.shape[1] if value.dim() > 1 else 0)
    aligned, offset = [], 0
    for part in parts:
        part = pad_steps(part, steps)
        if renumber:
            part = part.replace(node=torch.where(part.node >= 0, part.node + offset, part.node))
        condition = part.condition
        if condition is not None:
            entries = {
                key: functional.pad(value, (0, 0) * (value.dim() - 2) + (widths[key] - value.shape[1], 0))
                if value.dim() > 1
                else value
                for key, value in _tensors(condition)
            }
            condition = Columns(entries, len(part))
        aligned.append(part.replace(condition=condition))
        offset = max(offset, int(part.node.max()) + 1 if part.node.numel() else 0)
    return together(aligned)


def together(parts: Sequence[Trajectories]) -> Trajectories:
    """Rows of one width and with the same fields, one after another; their nodes stay as they are."""
    return Trajectories(**{name: joined(getattr(part, name) for part in parts) for name, _ in parts[0].present()})


def _same_fields(parts: Sequence[Trajectories]) -> None:
    """Raise `InputError` where only some of the parts have a field or an entry."""
    present = []
    for part in parts:
        names = {name for name, _ in part.present()}
        for table in ("condition", "points", "info"):
            names |= {f"{table}['{key}']" for key, _ in _tensors(getattr(part, table))}
        present.append(names)
    for names in present[1:]:
        if names != present[0]:
            raise InputError(
                f"Trajectories to be joined must have the same fields, got some with and some without "
                f"{', '.join(sorted(names ^ present[0]))}."
            )


@dataclass(frozen=True)
class Edges:
    """Each step that happened, once, although several rows may share it.

    `row`, `step` (E,): its first place. `count` (E,): how many rows share it. `index` (N, T): the edge of
    each step, -1 where none happened.
    """

    row: Tensor
    step: Tensor
    count: Tensor
    index: Tensor


def edges(rows: Trajectories) -> Edges:
    """The shared steps of the rows, each listed once."""
    happened = rows.node >= 0
    _, inverse, count = rows.node[happened].unique(return_inverse=True, return_counts=True)
    index = torch.full_like(rows.node, -1)
    index[happened] = inverse
    where = happened.nonzero()
    order = torch.arange(len(where), device=where.device)
    first = torch.full_like(count, len(where)).scatter_reduce(0, inverse, order, "amin")
    return Edges(where[first, 0], where[first, 1], count, index)


@dataclass(frozen=True)
class Counts:
    """The global numbers that a reduction divides by, whichever part of the batch it sees.

    `steps`: trained steps; `rows`: trajectories; `groups`: prompts; `pairs`: preference pairs; `length`: a fixed
    number of steps a row.
    """

    steps: float
    rows: float
    groups: float
    length: float
    pairs: float = 0.0


def count(rows: Trajectories, length: float | None = None, pairs: float = 0.0) -> Counts:
    """The counts of a whole batch; `length` is the horizon where a method divides by a fixed number of steps."""
    return Counts(
        steps=max(float(rows.mask.sum()), 1.0),
        rows=float(len(rows)),
        groups=float(len(rows.prompt.unique())),
        length=float(length or rows.mask.shape[1]),
        pairs=pairs,
    )


def to_tensors(rows: Trajectories) -> dict[str, Tensor]:
    """The rows as a flat dictionary of tensors, for a file; `from_tensors` brings them back."""
    tensors: dict[str, Tensor] = {}
    for name, value in rows.present():
        if isinstance(value, Columns):
            tensors |= {f"{name}.{key}": entry for key, entry in value.items()}
        else:
            tensors[name] = value
    return {name: value.contiguous().clone() for name, value in tensors.items()}


def from_tensors(tensors: Mapping[str, Tensor]) -> Trajectories:
    """The rows that `to_tensors` wrote."""
    fields: dict[str, Any] = {name: value for name, value in tensors.items() if "." not in name}
    for group in {name.split(".")[0] for name in tensors if "." in name}:
        entries = {name.split(".", 1)[1]: value for name, value in tensors.items() if name.startswith(f"{group}.")}
        fields[group] = Columns(entries)
    return Trajectories(**fields)
