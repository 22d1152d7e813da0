"""The origin of a user's own code: its name and a digest of its text, so that a run can tell whether it changed."""

from __future__ import annotations

import ast
import dis
import functools
import inspect
import sys
import types
from collections.abc import Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from stepwell.digests import stored, weights_digest

LIBRARIES = ("site-packages", "dist-packages")
"""Folders of installed packages, whose versions are written down elsewhere."""


def origin(make: Any) -> tuple[str, str]:
    """The qualified name of a function, class or object and a digest of all that decides its behaviour, the same in
    every run and on every rank.

    It is taken of the text of the source file and of the neighbours that this file imports, and of the plain values
    that a closure or an object holds; of a file that is run as a program, whose other lines may be about the run, of
    the thing's own text. Without a text the digest is empty, and the name begins with the module's.

    Example:
        >>> import functools
        >>> name, digest = origin(functools.partial(origin, "yes"))
        >>> name, len(digest)
        ("origin('yes')", 64)
        >>> origin(dict)
        ('builtins.dict', '')
    """
    if isinstance(make, functools.partial):
        name, digest = origin(make.func)
        given = [*map(_word, make.args), *(f"{key}={_word(value)}" for key, value in sorted(make.keywords.items()))]
        return f"{name}({', '.join(given)})", digest
    named: Any = make if hasattr(make, "__qualname__") else type(make)
    module = getattr(named, "__module__", None)
    try:
        target = inspect.unwrap(named)
        file = Path(inspect.getsourcefile(target) or "")
        text = sha256(inspect.getsource(target).encode() if module == "__main__" else file.read_bytes())
    except (OSError, TypeError, ValueError):  # of a module written in C, of a notebook, or taken away since
        return f"{module}.{named.__qualname__}", ""
    if module != "__main__":
        for place in sorted(_imported(file)):
            text.update(place.read_bytes())
    held = _held(make, target)
    if held:
        text.update(held.encode())
    return str(named.__qualname__), text.hexdigest()


def is_own(thing: Any) -> bool:
    """True for code that a user wrote: neither Stepwell's nor that of an installed package or of Python itself."""
    named = thing if hasattr(thing, "__qualname__") else type(thing)
    top = str(getattr(named, "__module__", "")).partition(".")[0]
    try:
        file = Path(inspect.getsourcefile(inspect.unwrap(named)) or "")
    except TypeError:
        return False
    standard = Path(inspect.__file__).parent
    return (
        top != "stepwell" and file.suffix == ".py" and not {*LIBRARIES} & {*file.parts} and standard not in file.parents
    )


def _held(make: Any, target: Any) -> str:
    """The values that a closure, or an object that is called, was made with: not those that its own code changes, nor
    lists and tables, which may be its memory."""
    owner = getattr(make, "__self__", None)
    if owner is not None and not isinstance(owner, type | types.ModuleType):  # a method of an object
        return _held(owner, type(owner))
    if isinstance(target, types.FunctionType):
        changed = _stored([target.__code__], "STORE_DEREF")
        values = [pair for pair in _cells(target) if pair[0] not in changed]
    elif hasattr(make, "__qualname__") or not hasattr(make, "__dict__"):
        return ""
    else:
        if _is_tensors(make):
            return _word(make)
        methods = [each for name, each in vars(type(make)).items() if name not in ("__init__", "__post_init__")]
        changed = _stored([each.__code__ for each in methods if isinstance(each, types.FunctionType)], "STORE_ATTR")
        values = [pair for pair in sorted(vars(make).items()) if pair[0] not in changed]
    return " ".join(f"{name}={_word(value)}" for name, value in values if not isinstance(value, list | dict | set))


def _stored(codes: list[types.CodeType], operation: str) -> set[str]:
    """The names that code stores by an operation, in functions inside it too."""
    names: set[str] = set()
    while codes:
        code = codes.pop()
        names |= {str(step.argval) for step in dis.get_instructions(code) if step.opname == operation}
        codes += [inner for inner in code.co_consts if isinstance(inner, types.CodeType)]
    return names


def _cells(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:  # it is not filled yet
            yield name, None


def _imported(file: Path) -> set[Path]:
    """The neighbours of a file that it imports, and those that they import: files of its folder, or of its package."""
    if {*LIBRARIES} & {*file.parts} or Path(__file__).parent in file.parents:
        return set()
    root = file.parent
    while (root / "__init__.py").is_file():
        root = root.parent
    found: set[Path] = set()
    todo = [file]
    while todo:
        for place in _neighbours(todo.pop(), root):
            if place != file and place not in found:
                found.add(place)
                todo.append(place)
    return found


def _neighbours(file: Path, root: Path) -> Iterator[Path]:
    try:
        tree = ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules = [(alias.name, 0) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            modules = [(base, node.level), *((f"{base}.{alias.name}".strip("."), node.level) for alias in node.names)]
        else:
            continue
        for module, level in modules:
            folders = [file.parents[level - 1]] if 0 < level <= len(file.parents) else [file.parent, root]
            parts = [part for part in module.split(".") if part]
            for folder in folders:
                for depth in range(1, len(parts) + 1):
                    stem = folder.joinpath(*parts[:depth])
                    yield from (p for p in (stem.with_name(f"{stem.name}.py"), stem / "__init__.py") if p.is_file())


def _is_tensors(value: Any) -> bool:
    """True for a tensor or a network; where torch is not loaded, nothing is."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor | torch.nn.Module)


def _word(value: Any) -> str:
    """A value in words that hold no address in memory; of tensors and networks the digest of their numbers."""
    if value is None or isinstance(value, bool | int | float | str | bytes):
        return repr(value)
    if isinstance(value, list | tuple):
        return f"({', '.join(map(_word, value))})"
    if _is_tensors(value):
        tensors = stored(value) if hasattr(value, "state_dict") else {"": value}
        return f"{type(value).__qualname__} {weights_digest(tensors)}"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{_word(key)}: {_word(each)}' for key, each in value.items())}}}"
    if callable(value):
        return origin(value)[0]
    pattern = getattr(value, "pattern", None)  # of a compiled regular expression
    return repr(pattern) if isinstance(pattern, str | bytes) else type(value).__qualname__
