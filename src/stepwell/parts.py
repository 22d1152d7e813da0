"""What parts of a method are: frozen data that maps a batch to numbers, composed by addition and multiplication."""

from __future__ import annotations

import dataclasses
import functools
import math
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from stepwell.errors import InputError, UnknownName
from stepwell.process.base import Scores
from stepwell.trajectories import Counts, Trajectories


@dataclass(frozen=True)
class Batch:
    """What a part sees: rows, what the present parameters say of them, the global counts, and the states.

    A batch may be a whole rollout, an optimiser's minibatch or a micro-batch of it; `counts` are always those of
    the minibatch, so that no number depends on how it was cut. `scores` is None while nothing is scored yet.
    `judge` maps samples (M, ...) and their prompts' ids (M,) to rewards (M,), differentiably where they are.
    """

    rows: Trajectories
    counts: Counts
    scores: Scores | None = None
    states: Mapping[str, float] = field(default_factory=dict)
    judge: Callable[[Tensor, Tensor], Tensor] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def mask(self) -> Tensor:
        """(N, T) 1 for trained steps, in the type of the log-probabilities."""
        return self.rows.mask.to(self.rows.log_prob.dtype)

    @property
    def log_prob(self) -> Tensor:
        """(N, T) under the present parameters; the only tensor with a gradient."""
        return self.present("log_prob")

    def present(self, need: str) -> Tensor:
        """A score under the present parameters, by name."""
        if self.scores is None:
            raise InputError(f"A part reads '{need}' of the present parameters before they were scored.")
        return self.scores[need]

    @property
    def old(self) -> Tensor:
        """(N, T) log-probability at the start of the inner epochs; the sampler's where it was not recomputed."""
        return self.behaviour if self.rows.old_log_prob is None else self.rows.old_log_prob

    @property
    def behaviour(self) -> Tensor:
        """(N, T) log-probability under the law the steps were really drawn from."""
        return self.rows.log_prob

    @property
    def reference(self) -> Tensor:
        """(N, T) log-probability under the reference."""
        return self.field("reference_log_prob")

    @property
    def reward(self) -> Tensor:
        """(N,) outcome reward."""
        return self.field("reward").to(self.rows.log_prob.dtype)

    def field(self, name: str) -> Tensor:
        """A field of the rows, their `origin`, or an entry of their `info` or `points`, that a part relies on."""
        value = self.origin if name == "origin" else getattr(self.rows, name, None)
        for table in (self.rows.info, self.rows.points):
            if value is None and table is not None:
                value = table.get(name, None)
        if value is None:
            raise InputError(f"A part reads '{name}' of the rows, which was not filled in; declare it in `reads`.")
        return value

    @property
    def origin(self) -> Tensor:
        """(N,) the node before each row's first trained step, -1 at the root: rows that branched there share it."""
        first = self.rows.mask.int().argmax(1)
        before = self.rows.node.gather(1, (first - 1).clamp(min=0)[:, None])[:, 0]
        return torch.where(first > 0, before, -1)

    @property
    def dimensions(self) -> int:
        """D, the numbers that an action is made of: 1 for a token, pixels times channels for an image."""
        return math.prod(self.rows.action.shape[2:])

    @property
    def steps(self) -> Tensor:
        """(N, 1) trained steps of each row, at least 1."""
        return self.mask.sum(1, keepdim=True).clamp(min=1)

    def row_sum(self, values: Tensor) -> Tensor:
        """(N, 1) sum of (N, T) values over each row's trained steps."""
        return (values * self.mask).sum(1, keepdim=True)


@functools.cache
def _choices(kind: type) -> dict[str, tuple[Any, ...]]:
    """The values that each `Literal` field of a class may take; none where its annotations name what is not there."""
    try:
        hints = typing.get_type_hints(kind)
    except NameError:
        return {}
    return {name: typing.get_args(hint) for name, hint in hints.items() if typing.get_origin(hint) is typing.Literal}


class Checked:
    """A dataclass whose `Literal` fields are what they say; anything else is refused as it is made."""

    def __post_init__(self) -> None:
        for name, allowed in _choices(type(self)).items():  # type: ignore[arg-type]
            value = getattr(self, name)
            if value not in allowed:
                raise UnknownName(f"'{name}' of {type(self).__name__}", str(value), allowed)


class Part(Checked):
    """A frozen dataclass that maps a batch to a tensor; `a + b` and `2 * a` are parts again.

    `needs`: scores it reads in the loss (see `process.base.NEEDS`). `reads`: fields of the rows that must be filled
    before credit is given (`reference_log_prob`, `value`, `entropy`, `old_log_prob`). `present`: scores it reads of
    the whole minibatch while planning, under the parameters of that moment. `compares`: it judges a row by others of
    the same prompt, so that a group of one teaches nothing.
    """

    needs: frozenset[str] = frozenset()
    reads: frozenset[str] = frozenset()
    present: frozenset[str] = frozenset()
    compares: bool = False

    def __call__(self, batch: Batch) -> Tensor:
        raise TypeError(f"{type(self).__name__} does not map a batch to a tensor.")

    def __add__(self, other: Part) -> Part:
        return Added((self, other))

    def __sub__(self, other: Part) -> Part:
        return self + -1.0 * other

    def __mul__(self, factor: float | Part) -> Part:
        return Multiplied((self, factor))

    __rmul__ = __mul__


@dataclass(frozen=True)
class Added(Part):
    """The sum of parts; rows (N,) and steps (N, T) mix as columns."""

    parts: tuple[Part, ...]

    def __call__(self, batch: Batch) -> Tensor:
        values = [part(batch) for part in self.parts]
        if len({value.dim() for value in values}) > 1:
            values = [column(value) for value in values]
        return sum(values[1:], start=values[0])


@dataclass(frozen=True)
class Multiplied(Part):
    """The product of parts and numbers."""

    factors: tuple[Part | float, ...]

    def __call__(self, batch: Batch) -> Tensor:
        values = [factor(batch) for factor in self.factors if isinstance(factor, Part)]
        if len({value.dim() for value in values}) > 1:
            values = [column(value) for value in values]
        product = values[0]
        for value in values[1:]:
            product = product * value
        return product * math.prod(factor for factor in self.factors if not isinstance(factor, Part))


@dataclass(frozen=True)
class Constant(Part):
    """The same number for every row, (N,): a baseline to subtract, or a weight to imitate with."""

    value: float = 1.0

    def __call__(self, batch: Batch) -> Tensor:
        return batch.rows.log_prob.new_full((len(batch),), self.value)


def column(values: Tensor) -> Tensor:
    """(N,) as (N, 1), so that it broadcasts over steps; (N, T) as it is."""
    return values[:, None] if values.dim() == 1 else values


def parts_of(part: Any) -> Iterator[Any]:
    """The part and every part inside its fields, depth first."""
    if isinstance(part, tuple | list):
        for item in part:
            yield from parts_of(item)
    elif dataclasses.is_dataclass(part) and not isinstance(part, type):
        yield part
        for entry in dataclasses.fields(part):
            yield from parts_of(getattr(part, entry.name))


def declared(part: Any, what: str) -> frozenset[str]:
    """The union of `needs`, `reads` or `present` over a part and all parts inside it."""
    return frozenset().union(*(getattr(piece, what, frozenset()) for piece in parts_of(part)))


def describe(part: Any) -> str:
    """A part as the reader of a card would write it: its name and the settings that differ from the defaults."""
    if isinstance(part, tuple | list):
        return "(" + ", ".join(describe(item) for item in part) + ("," if len(part) == 1 else "") + ")"
    if not dataclasses.is_dataclass(part) or isinstance(part, type):
        return getattr(part, "__name__", None) or repr(part)
    settings = []
    for entry in dataclasses.fields(part):
        value = getattr(part, entry.name)
        default = entry.default if entry.default_factory is dataclasses.MISSING else entry.default_factory()
        if not (value is default or (type(value) is type(default) and value == default)):
            settings.append(f"{entry.name}={describe(value)}")
    return f"{type(part).__name__}({', '.join(settings)})"
