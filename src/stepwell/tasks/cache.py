"""Cached folders: made once for a key, and complete or not there at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from stepwell.errors import InputError
from stepwell.writing import writable_folder

_SEAL = "stepwell.json"


def cache_root() -> Path:
    """The folder of the cache: `$STEPWELL_CACHE`, else `~/.cache/stepwell`."""
    return Path(os.environ.get("STEPWELL_CACHE") or Path.home() / ".cache" / "stepwell").expanduser()


def cached_folder(name: str, key: Mapping[str, Any], make: Callable[[Path], None]) -> Path:
    """The folder that `make` fills, made now or found in the cache under `key` (JSON values), all that it depends on.

    It is made beside its place and renamed into it, and sealed with the size of each of its files: a folder that a
    crashed run left behind, or that has lost a file since, is made anew. Runs that make it at the same time do not
    disturb each other; the first to finish wins. Raises `InputError` where nothing can be written.
    """
    written = json.dumps(dict(key), sort_keys=True)
    folder = cache_root() / f"{name}-{hashlib.blake2b(written.encode(), digest_size=8).hexdigest()}"
    if _is_whole(folder):
        return folder
    try:
        parent = writable_folder(folder.parent)
    except InputError as error:
        raise InputError(f"{error} STEPWELL_CACHE names the folder of the cache.") from error
    workshop = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=parent))
    try:
        made = workshop / "made"
        made.mkdir()
        make(made)
        seal = {"key": dict(key), "files": _sizes(made)}
        (made / _SEAL).write_text(json.dumps(seal, indent=1), encoding="utf-8")
        _put(made, folder, workshop / "broken")
    finally:
        shutil.rmtree(workshop, ignore_errors=True)
    return folder


def _put(made: Path, folder: Path, aside: Path) -> None:
    """Rename `made` to `folder`, unless another run was first; a broken folder in the way is moved aside."""
    for _ in range(2):
        try:
            made.rename(folder)
            return
        except OSError:
            if _is_whole(folder):
                return
            if not folder.exists():
                raise
            folder.rename(aside)


def _sizes(folder: Path) -> dict[str, int]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != _SEAL]
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def _is_whole(folder: Path) -> bool:
    try:
        seal = json.loads((folder / _SEAL).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(seal.get("files") == _sizes(folder))
