"""The kinds of model that a command can be given: how each is named, the arguments it uses, and how it is built."""

from __future__ import annotations

import functools
import importlib
import os
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator
from dataclasses import Field, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from stepwell.errors import InputError

if TYPE_CHECKING:
    from stepwell.process.base import Process

_KINDS: dict[str, Kind] = {}


class Kind(ABC):
    """A kind of model; a subclass registers itself under its `name`.

    called: its name in messages. uses: the arguments that mean something for it, as groups (dataclasses) and as names
    of single ones. process: the kind of process that it becomes, None where only the process itself knows. on_hub: an
    id of the hub may name one, too.
    """

    name: ClassVar[str]
    called: ClassVar[str]
    uses: ClassVar[tuple[type | str, ...]]
    process: ClassVar[str | None] = None
    on_hub: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        _KINDS[cls.name] = cls()

    @property
    def arguments(self) -> frozenset[str]:
        """The names of the arguments that mean something for it."""
        groups = [{use} if isinstance(use, str) else {entry.name for entry in fields(use)} for use in self.uses]
        return frozenset().union(*groups)

    def is_named_by(self, model: str) -> bool:
        """True for a `--model` that can be nothing else; raises `InputError` for one that is almost right."""
        return False

    def check(self, command: Any) -> None:  # noqa: B027
        """Raise `InputError` for arguments that do not go together."""

    @abstractmethod
    def build(self, model: str, command: Any, lora: Any = None) -> Process:
        """The process of a model, with the command's arguments; `lora` is an adapter for it."""


@functools.cache
def _find() -> None:
    """Import every file of this folder, once; none of them needs torch before it builds a model."""
    for module in pkgutil.iter_modules([os.fspath(Path(__file__).parent)], "stepwell.cli.processes."):
        importlib.import_module(module.name)


def kind_called(name: str) -> Kind:
    """The kind of a name: `language`, `pipeline`, `own` or `task`."""
    _find()
    return _KINDS[name]


def kind_of(model: str, trained: Collection[str] = ()) -> Kind:
    """The kind of model that `--model` names.

    An id of the hub names any kind: it is taken for the one whose processes are among `trained` (`Process.kind`), and
    else for a language model.
    """
    _find()
    for kind in _KINDS.values():
        if kind.is_named_by(model):
            return kind
    on_hub = [kind for kind in _KINDS.values() if kind.on_hub and kind.process in trained]
    return on_hub[0] if len(on_hub) == 1 else _KINDS["language"]


def given(command: Any) -> Iterator[tuple[Field[Any], Any]]:
    """The arguments of a command, a dataclass, and of the groups in it, with their values."""
    for entry in fields(command):
        value = getattr(command, entry.name)
        if is_dataclass(value):
            yield from given(value)
        else:
            yield entry, value


def flag(name: str) -> str:
    """An argument as it is typed.

    Example:
        >>> flag("max_turns")
        '--max-turns'
    """
    return f"--{name.replace('_', '-')}"


def refuse_unused(command: Any, kind: Kind) -> None:
    """Raise `InputError` for an argument that was given and means nothing for this kind of model."""
    _find()
    others = frozenset().union(*(each.arguments for each in _KINDS.values())) - kind.arguments
    for entry, value in given(command):
        if entry.name in others and value != entry.default:
            raise InputError(f"{flag(entry.name)} must be left out for {kind.called}.")
    kind.check(command)
