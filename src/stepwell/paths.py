"""Paths that users name: refused in one sentence where no file can have them, or where what is there is no file."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

from stepwell.errors import InputError
from stepwell.terminal import one_line

KINDS = {
    stat.S_ISFIFO: "a pipe",
    stat.S_ISSOCK: "a socket",
    stat.S_ISCHR: "a device",
    stat.S_ISBLK: "a device",
}
"""Things in a file system that are neither files nor folders; reading one may wait for ever."""


def usable(path: Any, name: str = "The path") -> Path:
    """A user's path with its `~` filled in, whether there is something or not; messages call it `name`.

    Raises `InputError` for what is no path, a path that no file can have, an unknown user's `~`, and for a pipe, a
    socket or a device.
    """
    try:
        text = os.fsdecode(path)
    except TypeError:
        raise InputError(f"{name} must be a path, got {path!r:.60}.") from None
    shown = one_line(text, 80)
    if "\0" in text:
        raise InputError(f"{name} must not hold the character NUL, got '{shown}'.")
    try:
        found = Path(text).expanduser()
    except RuntimeError:
        raise InputError(f"{name} begins with the home folder of an unknown user, got '{shown}'.") from None
    try:
        mode = found.stat().st_mode
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return found
    except (OSError, UnicodeError) as error:  # too long, links in a circle, half characters
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{name} cannot be used ({reason}), got '{shown}'.") from None
    for is_kind, kind in KINDS.items():
        if is_kind(mode):
            raise InputError(f"{name} must name a file or a folder, got {kind}, '{shown}'.")
    return found


def readable(path: Any, name: str = "The path") -> Path:
    """A user's path to a file that is there; raises `InputError` as `usable` does, and for a folder or nothing."""
    found = usable(path, name)
    if found.is_dir():
        raise InputError(f"{name} must name a file, got a folder, '{one_line(str(path), 80)}'.")
    if not found.exists():
        raise InputError(f"{name} must name a file, but there is none at '{one_line(str(path), 80)}'.")
    return found
