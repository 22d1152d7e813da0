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
from typing import Any, BinaryIO, Protocol, runtime_checkable

from stepwell.errors import InputError
from stepwell.paths import usable


def write_whole(path: str | Path, content: str | bytes) -> None:
    """Replace the file's content at one stroke: whoever reads it sees the old content or the new, never a part.

    It survives a loss of power from the moment this returns. Raises `InputError`, naming the path and the mend,
    where the file cannot be written; what was there before is then untouched.
    """
    with whole_file(path) as file:
        file.write(content.encode(errors="backslashreplace") if isinstance(content, str) else content)


@contextlib.contextmanager
def whole_file(path: str | Path) -> Iterator[BinaryIO]:
    """A file to write piece by piece, which takes its place at one stroke at the end; see `write_whole`."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp{os.getpid()}")
    with writing(path):
        try:
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Let the names of the files in a folder survive a loss of power, where its file system can do that."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def sync_file(path: Path) -> None:
    """Let a file's content survive a loss of power; one that is not there is passed over."""
    with writing(path), contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
        os.fsync(file.fileno())


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
    path = usable(path, "The folder")
    missing = path
    while not missing.exists() and missing.parent != missing:
        missing = missing.parent
    with writing(path):
        if not missing.is_dir():
            raise InputError(f"'{missing}' is a file where a folder is needed; remove it or choose another folder.")
        path.mkdir(parents=True, exist_ok=True)
        made = path
        while made != missing:  # the names of new folders survive a loss of power, too
            made = made.parent
            sync_folder(made)
        probe = path / f".probe{os.getpid()}"
        try:
            probe.write_bytes(b"\0")
        finally:
            with contextlib.suppress(OSError):
                probe.unlink(missing_ok=True)
    return path


LOCK = ".lock"
"""The file by which a process holds a folder; it is gone, or held by nobody, once the process has ended."""

_HELD: set[str] = set()
"""The folders that this process holds: its own locks do not stop it."""


@contextlib.contextmanager
def held(folder: str | Path) -> Iterator[None]:
    """Hold a folder that is there, so that no other process writes into it until the end, however this one ends.

    Raises `InputError` where another process holds it, or this one does already.
    """
    path = Path(folder).resolve() / LOCK
    file = _locked(path)
    _HELD.add(str(path))
    try:
        yield
    finally:
        _HELD.discard(str(path))
        with contextlib.suppress(OSError):
            path.unlink()
        file.close()


def _locked(path: Path) -> BinaryIO:
    """The lock's file, with a lock that the system takes back when the process ends."""
    if str(path) in _HELD:
        raise InputError(f"'{path.parent}' is being written by this very process; choose another folder.")
    try:
        import fcntl
    except ImportError:  # not a system that has them
        return open(path, "ab", buffering=0)
    while True:
        with writing(path):
            file = open(path, "a+b", buffering=0)  # noqa: SIM115
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            holder = file.read(20).decode(errors="replace")
            file.close()
            if error.errno not in (errno.EACCES, errno.EAGAIN):  # a file system without locks
                return open(path, "ab", buffering=0)
            raise InputError(
                f"'{path.parent}' is being written by process {holder.strip() or 'another'}; wait for its end or "
                "choose another folder."
            ) from error
        with contextlib.suppress(FileNotFoundError):  # its last holder has just removed it
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                file.truncate(0)
                file.write(str(os.getpid()).encode())
                return file
        file.close()


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
