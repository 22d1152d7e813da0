"""Rows of a file, a few bytes each: a million of them fit into memory, and a prompt is made when it is asked for."""

from __future__ import annotations

import array
import itertools
import marshal
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, overload

from stepwell.sampling.request import Prompt


class Survey:
    """The kinds of rows that were seen.

    names: the keys of all that are mappings, as they came. mappings, texts: the numbers of these and of texts. odd: the
    place of the first that is no mapping.
    """

    def __init__(self, rows: Iterable[Any] = ()):
        self.names: dict[Any, None] = {}
        self.seen, self.mappings, self.texts = 0, 0, 0
        self.odd: int | None = None
        for row in rows:
            self.see(row)

    def see(self, row: Any) -> None:
        """Count one row more."""
        if isinstance(row, Mapping):
            self.mappings += 1
            if row.keys() != self.names.keys():
                self.names.update(dict.fromkeys(row))
        else:
            self.texts += isinstance(row, str)
            self.odd = self.seen if self.odd is None else self.odd
        self.seen += 1


class PackedRows(Sequence[Any]):
    """Values one after another in one block of bytes; `rows[3]` is a copy of the fourth.

    `lines` has the line of the file that each stood in, where it is added with one.

    Example:
        >>> rows = PackedRows([{"prompt": "a"}, "b"])
        >>> len(rows), rows[0], rows[-1]
        (2, {'prompt': 'a'}, 'b')
    """

    def __init__(self, values: Iterable[Any] = ()):
        self._bytes = bytearray()
        self._ends = array.array("Q", [0])
        self.lines = array.array("Q")
        self.survey = Survey()
        for value in values:
            self.add(value)

    def add(self, value: Any, line: int | None = None) -> None:
        """Put a value at the end."""
        self.survey.see(value)
        try:
            self._bytes += b"m" + marshal.dumps(value)
        except ValueError:  # dates, decimals and other things that tables hold
            self._bytes += b"p" + pickle.dumps(value)
        self._ends.append(len(self._bytes))
        if line is not None:
            self.lines.append(line)

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        place = index + len(self) if index < 0 else index
        if not 0 <= place < len(self):
            raise IndexError(f"there is no row {index} of {len(self)}")
        begin, end = self._ends[place], self._ends[place + 1]
        return _value(self._bytes[begin], self._bytes[begin + 1 : end])

    def __iter__(self) -> Iterator[Any]:
        begin = 0
        with memoryview(self._bytes) as view:
            for end in itertools.islice(self._ends, 1, None):
                yield _value(view[begin], view[begin + 1 : end])
                begin = end


def _value(kind: int, content: bytes | bytearray | memoryview) -> Any:
    return marshal.loads(content) if kind == MARSHALLED else pickle.loads(content)


MARSHALLED = ord("m")


class PackedPrompts(Sequence[Prompt]):
    """Prompts out of packed rows, numbered from 0.

    columns: the names of their other columns. sizes: the characters of each, where they are counted.
    """

    def __init__(
        self,
        rows: PackedRows,
        make: Callable[[int, Any], Prompt],
        columns: Sequence[str] = (),
        sizes: array.array[int] | None = None,
    ):
        self._rows, self._make, self.columns, self.sizes = rows, make, tuple(columns), sizes

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Prompt: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Prompt]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        return self._make(index + len(self) if index < 0 else index, self._rows[index])

    def __iter__(self) -> Iterator[Prompt]:
        return map(self._make, itertools.count(), self._rows)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(other) == len(self) and all(map(_same, self, other))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return repr(self[:]) if len(self) < 10 else f"{repr(self[:3])[:-1]}, ... {len(self)} prompts]"


def _same(one: object, other: object) -> bool:
    return one == other


def names_of_columns(prompts: Sequence[Prompt]) -> list[str]:
    """The names of the columns that any of the prompts has, sorted."""
    if isinstance(prompts, PackedPrompts):
        return sorted(prompts.columns)
    return sorted({name for prompt in prompts for name in prompt.columns})


def sizes_of(prompts: Sequence[Prompt]) -> Sequence[int]:
    """The characters of each prompt, about: those of a text, and of anything else as it is printed."""
    if isinstance(prompts, PackedPrompts) and prompts.sizes is not None:
        return prompts.sizes
    return [size_of(prompt.value) for prompt in prompts]


def size_of(value: Any) -> int:
    """The characters of a prompt."""
    return len(value) if isinstance(value, str) else len(str(value))


def by_number(prompts: Sequence[Prompt]) -> Mapping[int, Prompt] | Sequence[Prompt]:
    """The prompts by their ids, which are their places where they come from a file."""
    return prompts if isinstance(prompts, PackedPrompts) else {prompt.id: prompt for prompt in prompts}
