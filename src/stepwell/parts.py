"""Parts of a method: frozen data that maps a batch to numbers, composed by addition and multiplication."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from stepwell.batch import Batch, Read
from stepwell.errors import InputError
from stepwell.ranges import Checked
from stepwell.tensors import Tensor
from stepwell.writing import describe

When = Literal["rows", "minibatch", "step"]
T = TypeVar("T")


class Node(Checked):
    """A piece of a method: a frozen dataclass that declares what it reads, so that somebody fills it in.

    Derive from `Part` what maps a batch, and from `Node` what maps anything else: surrogates, gates, links, scores of
    pairs. Where a declaration depends on the fields, it is a property of the class. `when` is the moment at which it
    is evaluated: `rows`, once, on what was drawn; `minibatch`, before every update, on the present scores of the whole
    minibatch; `step`, inside the loss.
    """

    when: When = "rows"

    def __post_init__(self) -> None:
        super().__post_init__()
        for read in self.reads:
            if not isinstance(read, Read):
                raise InputError(
                    f"{type(self).__name__}.reads must hold reads, such as Read('policy', 'log_prob'), got {read!r}."
                )

    @property
    def needs(self) -> frozenset[str]:
        """Scores under the present parameters that the loss reads, with a gradient (`process.base.NEEDS`)."""
        return frozenset()

    @property
    def reads(self) -> frozenset[Read]:
        """Fields of the rows that have to be filled before credit is given."""
        return frozenset()

    @property
    def present(self) -> frozenset[str]:
        """Scores of the whole minibatch that planning reads, under the parameters of that moment."""
        return frozenset()

    @property
    def compares(self) -> bool:
        """True where a row is judged by others of the same prompt, so that a group of one teaches nothing."""
        return False

    @property
    def rewarded(self) -> bool:
        """True where it reads the rows' rewards itself, so that a run without any would fail."""
        return False


class Part(Node, ABC):
    """A node that maps a batch to a tensor, (N,) or (N, T); `a + b`, `a - b` and `2 * a` are parts again."""

    @abstractmethod
    def __call__(self, batch: Batch) -> Tensor: ...

    def __add__(self, other: Part) -> Part:
        return Added((self, other)) if isinstance(other, Part) else NotImplemented

    def __sub__(self, other: Part) -> Part:
        return self + -1.0 * other if isinstance(other, Part) else NotImplemented

    def __mul__(self, factor: float | Part) -> Part:
        return Multiplied((self, factor)) if isinstance(factor, float | int | Part) else NotImplemented

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

    def in_words(self) -> str:
        """The sum as it is written."""
        return sum_in_words(map(describe, self.parts))


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
        return product * self._number

    @property
    def _number(self) -> float:
        return math.prod(factor for factor in self.factors if not isinstance(factor, Part))

    def in_words(self) -> str:
        """The product as it is written, its number first."""
        parts = [factor for factor in self.factors if isinstance(factor, Part)]
        words = [f"({describe(part)})" if isinstance(part, Added) else describe(part) for part in parts]
        return product_in_words(self._number, " * ".join(words))


@dataclass(frozen=True)
class Constant(Part):
    """The same number for every row, (N,): a baseline to subtract, or a weight to imitate with."""

    value: float = 1.0

    def __call__(self, batch: Batch) -> Tensor:
        return batch.rows.log_prob.new_full((len(batch),), self.value)


def product_in_words(number: float, words: str) -> str:
    """A number times what `words` say, as one writes it.

    Example:
        >>> [product_in_words(number, "Plain()") for number in (1.0, -1.0, 0.5)]
        ['Plain()', '-Plain()', '0.5 * Plain()']
    """
    return words if number == 1 else f"-{words}" if number == -1 else f"{number} * {words}"


def sum_in_words(words: Iterable[str]) -> str:
    """Summands as one writes their sum.

    Example:
        >>> sum_in_words(["Outcome()", "-0.1 * Entropy()"])
        'Outcome() - 0.1 * Entropy()'
    """
    first, *others = words
    return first + "".join(f" - {each[1:]}" if each.startswith("-") else f" + {each}" for each in others)


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


def compares(part: Any) -> list[str]:
    """The names of the nodes inside a part that compare the rows of a prompt with each other (`Node.compares`)."""
    return [type(node).__name__ for node in parts_of(part) if isinstance(node, Node) and node.compares]


def declared(part: Any, of: Callable[[Node], frozenset[T]]) -> frozenset[T]:
    """The union of a declaration over a part and all parts inside it: `declared(part, lambda node: node.reads)`."""
    return frozenset[T]().union(*(of(node) for node in parts_of(part) if isinstance(node, Node)))
