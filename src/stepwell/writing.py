"""Files that are there whole or not at all, and one clear sentence where one cannot be written."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from stepwell.errors import InputError


def write_whole(path: str | Path, content: str | bytes) -> None:
    """Replace the file's content at one stroke: whoever reads it sees the old content or the new, never a part.

    It survives a loss of power from the moment this returns. Raises `InputError`, naming the path and the mend,
    where the file cannot be written; what was there before is then untouched.
    """
    path = Path(path)
    data = content.encode(errors="backslashreplace") if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.tmp{os.getpid()}")
    with writing(path):
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        with contextlib.suppress(OSError):  # not every file system lets a folder be synchronised
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)


def append_line(path: str | Path, line: str) -> None:
    """Add one line to a file, which is made if it is not there; see `append_lines`."""
    append_lines(path, [line])


def append_lines(path: str | Path, lines: Iterable[str]) -> None:
    """Add lines to a file, which is made if it is not there; all of them, or after an `InputError` none."""
    data = "".join(line + "\n" for line in lines).encode(errors="backslashreplace")
    with writing(path), open(path, "ab", buffering=0) as file:
        before = os.fstat(file.fileno()).st_size
        try:
            while data:
                data = data[file.write(data) :]
        except BaseException:
            with contextlib.suppress(OSError):
                file.truncate(before)
            raise


def writable_folder(path: str | Path) -> Path:
    """The folder, made with its parents where it is missing and proven writable by writing a file and removing it.

    Raises `InputError`, naming the path and the mend, where that fails.
    """
    path = Path(path).expanduser()
    missing = path
    while not missing.exists() and missing.parent != missing:
        missing = missing.parent
    with writing(path):
        if not missing.is_dir():
            raise InputError(f"'{missing}' is a file where a folder is needed; remove it or choose another folder.")
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".probe{os.getpid()}"
        try:
            probe.write_bytes(b"\0")
        finally:
            with contextlib.suppress(OSError):
                probe.unlink(missing_ok=True)
    return path


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Turn any failure of the file system inside into an `InputError` that names `path` and the mend."""
    try:
        yield
    except OSError as error:
        raise _refusal(Path(path), error) from error


def _refusal(path: Path, error: OSError) -> InputError:
    """The words for an error of the file system."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return InputError(f"There is no space left to write '{path}'; free some or choose another folder.")
    if error.errno in (errno.EACCES, errno.EPERM):
        return InputError(f"'{path}' may not be written; change its permissions or choose another folder.")
    if error.errno == errno.EROFS:
        return InputError(f"'{path}' is on a read-only file system; choose another folder.")
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        return InputError(f"'{path}' cannot be written since part of its path is a file; choose another folder.")
    if error.errno == errno.ENOENT:
        return InputError(f"The folder of '{path}' is not there; make it or choose another folder.")
    if error.errno == errno.EISDIR:
        return InputError(f"'{path}' is a folder where a file is to be written; remove it or choose another name.")
    return InputError(f"'{path}' cannot be written: {error.strerror or error}; choose another folder.")


def json_text(value: Any, indent: int | None = None) -> str:
    """`value` as JSON that every reader accepts: floats exactly, infinite ones and NaN as null, other objects as text.

    Example:
        >>> json_text({"loss": 0.1, "kl": float("nan"), "path": Path("a")})
        '{"loss": 0.1, "kl": null, "path": "a"}'
    """
    return json.dumps(_plain(value), indent=indent, ensure_ascii=False, allow_nan=False)


def _plain(value: Any) -> Any:
    """The value in dictionaries, lists, texts, numbers and None."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(entry) for entry in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, str | bool | int):
        return value
    if hasattr(value, "tolist"):  # tensors and numpy's arrays and numbers
        return _plain(value.tolist())
    return str(value)


@runtime_checkable
class InWords(Protocol):
    """Knows how it is written on a card: sums and products, which are written with their signs."""

    def in_words(self) -> str: ...


def describe(thing: Any) -> str:
    """A dataclass as one writes it: its name and the settings that differ from the defaults."""
    if isinstance(thing, InWords) and not isinstance(thing, type):
        return thing.in_words()
    if isinstance(thing, tuple | list):
        return "(" + ", ".join(describe(item) for item in thing) + ("," if len(thing) == 1 else "") + ")"
    if not dataclasses.is_dataclass(thing) or isinstance(thing, type):
        return getattr(thing, "__name__", None) or repr(thing)
    settings = []
    for entry in dataclasses.fields(thing):
        value = getattr(thing, entry.name)
        default = entry.default if entry.default_factory is dataclasses.MISSING else entry.default_factory()
        if not (value is default or (type(value) is type(default) and value == default)):
            settings.append(f"{entry.name}={describe(value)}")
    return f"{type(thing).__name__}({', '.join(settings)})"
