"""Places in a user's own code: the code of a function that builds, and the line at which a file failed."""

from __future__ import annotations

import dis
import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from types import CodeType
from typing import Any

from stepwell.errors import InputError


def code_of(build: Callable[..., Any]) -> CodeType:
    """The code of a function that builds, behind `functools.partial` and decorators; of a class, that of its maker."""
    inner = inspect.unwrap(build.func if isinstance(build, functools.partial) else build)
    code: CodeType | None = getattr(inner, "__code__", None) or getattr(inner.__init__, "__code__", None)
    if code is None:
        raise InputError(f"A method must be built by a function, got {build!r:.60}.")
    return code


_READS = ("LOAD_FAST", "LOAD_DEREF", "LOAD_CLOSURE")
"""Beginnings of the names of instructions that read a variable, in all versions of Python."""


def unread(build: Callable[..., Any]) -> list[str]:
    """The arguments of a function that it never looks at.

    Example:
        >>> unread(lambda used, idle: used + 1)
        ['idle']
    """
    code, read = code_of(build), set[str]()
    for step in dis.get_instructions(code):
        if step.opname.startswith(_READS):
            read |= set(step.argval if isinstance(step.argval, tuple) else [str(step.argval)])
    own = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    return [name for name in inspect.signature(build).parameters if name in own and name not in read]


def line_in(error: BaseException, path: Path) -> str:
    """The line of a file at which an error was raised, as a message says it; nothing where it was raised elsewhere."""
    if isinstance(error, SyntaxError) and error.lineno and error.filename in (None, str(path)):
        return f" at line {error.lineno}"
    trace, line = error.__traceback__, ""
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == str(path):
            line = f" at line {trace.tb_lineno}"
        trace = trace.tb_next
    return line
