"""What all commands have in common: plugins, the folder that is written to, and errors in a user's own file."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import tyro

from stepwell.errors import InputError, StepwellError

Appended = tyro.conf.UseAppendAction[tuple[str, ...]]


@dataclass(kw_only=True)
class Command:
    """What every command understands."""

    plugin: Appended = ()  # a Python file of your own that registers methods or tasks
    traceback: bool = False  # show where in the code an error was raised, instead of one line

    def run(self) -> None:
        """Carry the command out; raises StepwellError for what the user can mend."""
        raise NotImplementedError

    def load_plugins(self) -> None:
        """Run the user's files, after Stepwell's own methods are there: who takes a name of theirs is told so."""
        if self.plugin:
            from stepwell import methods

            methods.names()
            for path in self.plugin:
                methods.load_plugin(os.path.abspath(path))  # its errors then know their line


def named(out: str) -> str:
    """The place to write to; an empty name, as of a shell's variable that is not set, is not the present folder."""
    if not out.strip():
        raise InputError("--out is empty; name a folder or a file, or leave it out.")
    return out


def unused(folder: Path) -> Path:
    """The folder itself, or with the first number behind it that is free."""
    number, found = 1, folder
    while found.exists():
        number += 1
        found = folder.with_name(f"{folder.name}-{number}")
    return found


@contextmanager
def removed_if_empty(out: str | None) -> Iterator[None]:
    """A folder that was made for a run which then could not begin does not stay, nor do those made around it."""
    made = [] if out is None else [place for place in (Path(out), *Path(out).parents) if not place.exists()]
    try:
        yield
    except BaseException:
        with suppress(OSError):
            for place in made:
                place.rmdir()
        raise


@contextmanager
def in_own_file(address: str | None) -> Iterator[None]:
    """What a user's own file raises is one sentence that names its line; anything else is passed on as it is."""
    place = (address or "").rpartition(":")[0]
    try:
        yield
    except StepwellError:
        raise
    except Exception as error:
        own = getattr(sys.modules.get(place), "__file__", None) or str(Path(place).expanduser().resolve())
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == own]
        if not place or not lines:
            raise
        said = " ".join(str(error).split()).rstrip(".")
        raise InputError(f"{place} failed at line {lines[-1]}: {type(error).__name__}: {said}.") from error
