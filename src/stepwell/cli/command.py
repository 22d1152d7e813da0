"""Parts of every command: plugins, the folder that is written to, and errors in a user's own file."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from stepwell.errors import InputError, StepwellError

Appended = tyro.conf.UseAppendAction[tuple[str, ...]]
"""An argument that may be given several times."""
Flag = Annotated[bool, tyro.conf.arg(help_behavior_hint="")]
"""An argument without a value."""


@dataclass(kw_only=True)
class Command:
    """The arguments of every command."""

    plugin: Appended = ()  # a Python file of your own that registers methods or tasks
    traceback: Flag = False  # show where in the code an error was raised, instead of one line

    def run(self) -> None:
        """Carry the command out; raises `StepwellError` for a mistake that the user can mend."""
        raise NotImplementedError

    def load_plugins(self) -> None:
        """Run the user's files, after Stepwell's own methods are registered, so that a name taken twice is an error."""
        if self.plugin:
            from stepwell import methods

            methods.names()
            for path in self.plugin:
                methods.load_plugin(os.path.abspath(path))  # its errors then know their line


def named(out: str) -> str:
    """The place to write to; raises `InputError` for an empty name, such as a shell's variable that is not set."""
    if not out.strip():
        raise InputError("--out must name a folder or a file, got an empty name.")
    return out


def unused(folder: Path) -> Path:
    """The folder itself, or with the first number behind it that is free."""
    number, free = 1, folder
    while free.exists():
        number += 1
        free = folder.with_name(f"{folder.name}-{number}")
    return free


@contextmanager
def removed_if_empty(out: str | None) -> Iterator[None]:
    """Remove the folder of a run that could not begin, and the folders around it, where they were made for it."""
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
    """Turn an error in a user's own file into one sentence that names its line; other errors pass unchanged."""
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
        reason = " ".join(str(error).split()).rstrip(".")
        raise InputError(f"{place} failed at line {lines[-1]}: {type(error).__name__}: {reason}.") from error
