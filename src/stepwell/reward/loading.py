"""A user's own function, found by its address: `my.py:reward` or `package.module:name`."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from stepwell.errors import InputError, UnknownName
from stepwell.guarded import reason_of
from stepwell.paths import usable
from stepwell.terminal import one_line


def load_reward(address: str) -> Callable[..., Any]:
    """A reward function; see `load_function`.

    Example:
        >>> load_reward("stepwell.reward.verifiers:exact_match")(completions=["4"], answer=["4"])
        [1.0]
    """
    return load_function(address)


def load_function(address: str, kind: str = "reward", classes: bool = False) -> Callable[..., Any]:
    """The function at `path/to/file.py:name` or `package.module:name`; messages call it a `kind`.

    With `classes` it may be a class as well, whose instances are of that kind.

    A file may import its neighbours: its folder is added at the end of `sys.path` (the working folder, for a
    module). A file that has not changed is run once, however many of its functions are loaded.

    Raises `InputError` for an address without a colon, a file or module that is not there or fails while it is
    imported (naming its line), a name that is not in it (with the nearest one that is), and a value that cannot be
    called.
    """
    place, colon, name = address.rpartition(":")
    sought = "class or function" if classes else "function"
    if not colon or not place or not name:
        example = f"my.py:{kind.capitalize() if classes else kind}"
        raise InputError(f"The {kind} must name a file and a {sought} in it, such as '{example}', got '{address}'.")
    module = _module(place, kind)
    if not hasattr(module, name):
        own = [
            key
            for key, value in vars(module).items()
            if callable(value)
            and (classes or not inspect.isclass(value))
            and getattr(value, "__module__", None) == module.__name__
        ]
        raise UnknownName(f"{sought} of {place} named", name, own)
    function = getattr(module, name)
    if inspect.isclass(function) and not classes:
        raise InputError(f"'{name}' in {place} is a class; name a function, or an instance that can be called.")
    if not callable(function):
        raise InputError(f"'{name}' in {place} must be a {sought}, got a value of type {type(function).__name__}.")
    return function


def load_list(address: str, kind: str) -> list[Any]:
    """The list at `path/to/file.py:name` or `package.module:name`; messages call it the `kind`.

    Raises `InputError` as `load_function` does, and for a value that is no list.
    """
    place, colon, name = address.rpartition(":")
    if not colon or not place or not name:
        raise InputError(f"The {kind} must name a file and a list in it, such as 'my.py:{kind}', got '{address}'.")
    module = _module(place, kind)
    if not hasattr(module, name):
        own = [key for key, value in vars(module).items() if isinstance(value, list | tuple) and key[0] != "_"]
        raise UnknownName(f"list of {place} named", name, own)
    value = getattr(module, name)
    if not isinstance(value, list | tuple):
        raise InputError(f"'{name}' in {place} must be a list, got a value of type {type(value).__name__}.")
    return list(value)


def _module(place: str, kind: str) -> ModuleType:
    """The module of a file, or of a name."""
    if place.endswith(".py") or "/" in place or os.sep in place or Path(place).is_file():
        return _module_from_file(place, kind)
    return _module_by_name(place, kind)


def _module_from_file(place: str, kind: str) -> ModuleType:
    path = usable(place, f"The {kind}'s file")
    if not path.is_file():
        siblings = [entry.name for entry in path.parent.glob("*.py")] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, siblings, n=1)
        hint = f"did you mean '{path.with_name(near[0])}'?" if near else f"check the path of the {kind}."
        raise InputError(f"There is no file '{place}'; {hint}")
    path = path.resolve()
    if path.suffix != ".py":
        raise InputError(f"The {kind}'s file must be a Python file, whose name ends in .py, got '{place}'.")
    # The name holds the file's age: an edited file is run anew, an unchanged one (and the models it loads) is not.
    digest = hashlib.blake2b(f"{path}:{path.stat().st_mtime_ns}".encode(), digest_size=6).hexdigest()
    name = f"_stepwell_file_{path.stem}_{digest}"
    if name in sys.modules:
        return sys.modules[name]
    specification = importlib.util.spec_from_file_location(name, path)
    assert specification is not None  # true of every .py file
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    importable_from(path.parent)
    sys.modules[name] = module  # dataclasses and pickle look their module up there
    try:
        specification.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        if isinstance(error, KeyboardInterrupt):
            raise
        raise _import_failure(place, str(path), error, kind) from error
    return module


def _module_by_name(name: str, kind: str) -> ModuleType:
    importable_from(Path.cwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(error.name + ".")):
            raise InputError(
                f"There is no module '{name}'; a file is named with its ending, as in '{name}.py:...'."
            ) from error
        raise _import_failure(name, None, error, kind) from error
    except (Exception, SystemExit) as error:
        raise _import_failure(name, None, error, kind) from error


def importable_from(folder: Path) -> None:
    """Have files of this folder found by `import`, after everything that is installed."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))  # at the end: a user's random.py must not hide the standard library's


def _import_failure(place: str, path: str | None, error: BaseException, kind: str) -> InputError:
    """The line that failed: the deepest one inside the file, or the deepest one there is."""
    if isinstance(error, SyntaxError) and error.filename is not None:
        failed, line = error.filename, error.lineno
    else:
        frames = traceback.extract_tb(error.__traceback__)
        failed, line = next(
            ((frame.filename, frame.lineno) for frame in reversed(frames) if frame.filename == path),
            (frames[-1].filename, frames[-1].lineno),
        )
    reason = one_line(error.msg).rstrip(".") if isinstance(error, SyntaxError) else reason_of(error)
    file = place if failed == path else failed
    return InputError(
        f"The {kind}'s file {file} failed at line {line} while it was imported: {type(error).__name__}: {reason}."
    )
