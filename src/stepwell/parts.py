"""What parts of a method are: frozen data that maps a batch to numbers, composed by addition and multiplication."""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Annotated, Any

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


@dataclass(frozen=True)
class Range:
    """The numbers that make sense, and the words for them: from `least` to `most`, `above` without `least` itself.

    `whole`: whole numbers only; `endless`: infinity too. A field says so by its type: `gamma: Share = 1.0`, or
    `p: Annotated[float, Range("a number from -1 to 1", -1, 1)]`.
    """

    words: str
    least: float = -math.inf
    most: float = math.inf
    above: bool = False
    whole: bool = False
    endless: bool = False

    def holds(self, value: Any) -> bool:
        """Whether a value is such a number.

        Example:
            >>> fraction = Range("above 0 and at most 1", 0, 1, above=True)
            >>> [fraction.holds(value) for value in (0.5, 1, 0, float("nan"), True, "1")]
            [True, True, False, False, False, False]
        """
        if isinstance(value, bool) or not issubclass(type(value), Integral if self.whole else Real):
            return False
        inside = self.least < value <= self.most or (value == self.least and not self.above)
        return inside and (self.endless or abs(value) != math.inf)


Share = Annotated[float, Range("a number from 0 to 1", 0, 1)]
Portion = Annotated[float, Range("a number above 0 and at most 1", 0, 1, above=True)]
Positive = Annotated[float, Range("a finite number above 0", 0, above=True)]
NotNegative = Annotated[float, Range("a finite number from 0 on", 0)]
Width = Annotated[float, Range("0 or more", 0, endless=True)]
Size = Annotated[int, Range("a whole number from 1 on", 1, whole=True)]
Count = Annotated[int, Range("a whole number from 0 on", 0, whole=True)]

_NUMBERS = {float: Range("a finite number"), int: Range("a whole number", whole=True)}


@dataclass(frozen=True)
class Demand:
    """What a type asks of a value: one of the `choices`, a number in the `range` or one of `others`, or a `part`.

    `bare`: the range is that of a plain `float` or `int`.
    """

    choices: tuple[Any, ...] = ()
    range: Range | None = None
    others: tuple[type, ...] = ()
    part: type | None = None
    bare: bool = False

    def refuse(self, what: str, value: Any) -> None:
        """Raise `InputError` for any other value; of a state, whose values are yet to come, for another first value."""
        if self.choices and value not in self.choices:
            raise UnknownName(what, str(value), map(str, self.choices))
        apart = isinstance(value, self.others)
        number = getattr(value, "initial", None) if apart else value
        if self.range and not (apart and number is None) and not self.range.holds(number):
            raise InputError(f"{what} is {number!r:.60}; {self.range.words} is right.")
        if self.part and not callable(value):
            raise InputError(f"{what} is {value!r:.60}; a {self.part.__name__} is right.")


@functools.cache
def demands(thing: Callable[..., Any]) -> dict[str, Demand]:
    """What the types of a class's fields, or of a function's arguments, ask for; nothing where they cannot be read."""
    try:
        hints = typing.get_type_hints(thing, include_extras=True)
    except (NameError, TypeError, AttributeError):  # annotations that name what is not there; a partial has none
        return {}
    found: dict[str, Demand] = {}
    for name, hint in hints.items():
        alone = typing.get_origin(hint) not in (typing.Union, types.UnionType)
        kinds = (hint,) if alone else typing.get_args(hint)
        notes = [note for each in kinds for note in getattr(each, "__metadata__", ()) if isinstance(note, Range)]
        plain = [_NUMBERS[each] for each in kinds if each in _NUMBERS]
        others = tuple(each for each in kinds if isinstance(each, type) and each not in _NUMBERS)
        if typing.get_origin(hint) is typing.Literal:
            found[name] = Demand(choices=typing.get_args(hint))
        elif notes or plain:
            found[name] = Demand(range=(notes + plain)[0], others=others, bare=not notes)
        elif alone and isinstance(hint, type) and issubclass(hint, Part):
            found[name] = Demand(part=hint)
    return found


class Checked:
    """A dataclass whose fields are what their types say: one of a `Literal`'s values, a number in its `Range`, a part.

    Anything else is refused as it is made.
    """

    def __post_init__(self) -> None:
        for name, demand in demands(type(self)).items():  # type: ignore[arg-type]
            demand.refuse(f"'{name}' of {type(self).__name__}", getattr(self, name))


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
