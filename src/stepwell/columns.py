"""Named tensors with one row each: the conditions, points, notes and targets that travel beside trajectories."""

from __future__ import annotations

from collections.abc import ItemsView, Iterable, KeysView, Mapping, Sequence, Sized
from typing import Any, TypeVar, overload

from stepwell.errors import InputError
from stepwell.tensors import Tensor, torch

T = TypeVar("T")


class Columns:
    """Tensors (N, ...), or tables of them, by name, all with the same N rows.

    `columns["name"]` is an entry, `columns[index]` the rows at an index (a tensor, a slice or a list of places), and
    `len(columns)` the number of rows, which has to be given as `rows` where there is no entry. Entries are never
    changed; `columns.replace(name=...)` is a table with other entries. Raises `InputError` for entries whose numbers
    of rows differ.

    Example:
        >>> table = Columns({"a": torch.tensor([1, 2, 3])})
        >>> len(table), table[torch.tensor([2, 0])]["a"].tolist()
        (3, [3, 1])
    """

    __slots__ = ("_entries", "_rows")

    def __init__(self, entries: Mapping[str, Any], rows: int | None = None):
        if not isinstance(entries, Mapping):
            raise InputError(f"Columns must be made of a dictionary of tensors, got {entries!r:.60}.")
        self._entries: dict[str, Any] = dict(entries)
        for name, entry in self._entries.items():
            if not isinstance(entry, Sized) or (isinstance(entry, Tensor) and entry.dim() == 0):
                raise InputError(f"Columns['{name}'] must be a tensor with a row each, or a table, got {entry!r:.60}.")
        sizes = {name: len(entry) for name, entry in self._entries.items()}
        self._rows = next(iter(sizes.values()), 0) if rows is None else rows
        for name, size in sizes.items():
            if size != self._rows:
                raise InputError(f"Columns['{name}'] must have {self._rows} rows, got {size}.")

    def __len__(self) -> int:
        return self._rows

    @overload
    def __getitem__(self, index: str) -> Any: ...
    @overload
    def __getitem__(self, index: Tensor | slice | Sequence[int]) -> Columns: ...
    def __getitem__(self, index: str | Tensor | slice | Sequence[int]) -> Any:
        if isinstance(index, str):
            return self._entries[index]
        chosen = torch.arange(self._rows)[index.cpu() if isinstance(index, Tensor) else index]
        return Columns({name: at(entry, index) for name, entry in self._entries.items()}, len(chosen))

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def keys(self) -> KeysView[str]:
        """The names, in the order they were given."""
        return self._entries.keys()

    def items(self) -> ItemsView[str, Any]:
        """Names and entries."""
        return self._entries.items()

    def get(self, name: str, default: T | None = None) -> Any | T | None:
        """An entry, or the default where there is none of this name."""
        return self._entries.get(name, default)

    def replace(self, **entries: Any) -> Columns:
        """The same rows with some entries added or exchanged."""
        return Columns({**self._entries, **entries}, self._rows)

    def to(self, *target: Any) -> Columns:
        """All entries on another device."""
        return Columns({name: entry.to(*target) for name, entry in self._entries.items()}, self._rows)

    def __repr__(self) -> str:
        shapes = (f"{name}: {tuple(e.shape) if isinstance(e, Tensor) else e!r}" for name, e in self._entries.items())
        return f"Columns({', '.join(shapes)}; {self._rows} rows)"


def at(value: Any, index: Tensor | slice | Sequence[int]) -> Any:
    """The rows of a tensor or a table at an index, which may live on another device."""
    if isinstance(value, Tensor) and isinstance(index, Tensor):
        index = index.to(value.device)
    return value[index]


def joined(parts: Iterable[Any]) -> Any:
    """The rows of equally named tables, or of tensors, one after another."""
    values = list(parts)
    if isinstance(values[0], Tensor):
        return torch.cat(values)
    names = values[0].keys()
    return Columns({name: joined(part[name] for part in values) for name in names}, sum(map(len, values)))
