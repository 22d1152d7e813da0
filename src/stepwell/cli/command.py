"""Parts of every command: plugins, the folder that is written to, and errors in a user's own file."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import tyro

from stepwell.errors import InputError, StepwellError
from stepwell.guarded import reason_of
from stepwell.paths import usable
from stepwell.terminal import printable

Appended = tyro.conf.UseAppendAction[tuple[str, ...]]
"""An argument that may be given several times."""
Flag = Annotated[bool, tyro.conf.arg(help_behavior_hint="")]
"""An argument without a value."""


PATHS = ("data", "evaluation", "out", "plugin", "lora", "weights", "runs", "save", "pipeline", "chat_template")
"""Arguments that are paths."""
ADDRESSES = ("model", "teacher", "reward", "environment", "tools")
"""Arguments that are paths, or name something in a file behind a colon."""


@dataclass(kw_only=True)
class Command:
    """The arguments of every command."""

    plugin: Appended = ()  # a Python file of your own that registers methods or tasks
    traceback: Flag = False  # show where in the code an error was raised, instead of one line

    prints: ClassVar[bool] = True
    """True where all that the command makes is printed, so that it fails where nothing can be."""

    def __post_init__(self) -> None:
        self.last_words: list[str] = []

    def check_paths(self) -> None:
        """Raise `InputError`, naming the argument, for a path that no file can have, a pipe or a device."""
        for name, value in _arguments(self):
            for word in (value,) if isinstance(value, str) else value if isinstance(value, tuple) else ():
                if name in PATHS and isinstance(word, str) and word.strip():
                    usable(word, f"--{name.replace('_', '-')}")
                elif name in ADDRESSES and isinstance(word, str) and not word.startswith("regular_expression:"):
                    usable(word.rpartition(":")[0] or word, f"--{name.replace('_', '-')}")

    def run(self) -> None:
        """Carry the command out; raises `StepwellError` for a mistake that the user can mend."""
        raise NotImplementedError

    def say(self, text: str) -> None:
        """Print a sentence on what was made, which is worth a place in the log where the terminal is gone."""
        self.last_words.append(text)
        print(printable(text))

    def folder(self) -> Path | None:
        """The folder that the command writes, as an absolute path, where there is one."""
        return None

    def interrupted(self) -> str:
        """The words for Ctrl-C: what is kept, and the way to go on."""
        return "interrupted"

    def load_plugins(self) -> None:
        """Run the user's files, after Stepwell's own methods are registered, so that a name taken twice is an error."""
        if self.plugin:
            from stepwell import methods

            methods.names()
            for path in self.plugin:
                methods.load_plugin(os.path.abspath(path))  # its errors then know their line


def _arguments(command: object) -> Iterator[tuple[str, object]]:
    """The arguments of a command, and of the groups in it, by name."""
    for entry in fields(command):  # type: ignore[arg-type]
        value = getattr(command, entry.name)
        if is_dataclass(value):
            yield from _arguments(value)
        else:
            yield entry.name, value


def absolute(out: str | None) -> Path | None:
    """The place that a command writes to, wherever the working folder goes later; None where it names none."""
    return None if out is None or not out.strip() else Path(os.path.abspath(os.path.expanduser(out)))


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
        raise InputError(f"{place} failed at line {lines[-1]}: {type(error).__name__}: {reason_of(error)}.") from error
