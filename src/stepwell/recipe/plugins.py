"""A user's own methods and tasks: from a file, or from an installed package."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from pathlib import Path

from stepwell.errors import InputError
from stepwell.recipe.registry import registering
from stepwell.recipe.source import line_in
from stepwell.reward.loading import importable_from


def load_plugin(path: str | Path) -> None:
    """Run a user's file, whose decorators register methods and tasks.

    It may import its neighbours: its folder is added at the end of `sys.path`.
    """
    path = Path(path).absolute()  # as tracebacks name it
    if not path.is_file():
        raise InputError(f"There is no plugin file '{path}'; give the path of a Python file that registers methods.")
    name = f"stepwell_plugin_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise InputError(f"The plugin '{path}' is no Python file; its name has to end in .py.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    importable_from(path.parent)
    try:
        with registering(str(path)):
            spec.loader.exec_module(module)
    except InputError:
        raise
    except (Exception, SystemExit) as error:
        line = line_in(error, path)
        reason = error.msg if isinstance(error, SyntaxError) else str(error)
        raise InputError(
            f"The plugin '{path}' failed{line}: {type(error).__name__}{f': {reason}' if reason else ''}"
        ) from error


def load_installed() -> None:
    """Register what installed packages offer through the entry point group `stepwell.plugins`."""
    for entry in importlib.metadata.entry_points(group="stepwell.plugins"):
        try:
            with registering(entry.value):
                entry.load()
        except Exception as error:
            raise InputError(f"The installed plugin '{entry.name}' ({entry.value}) failed: {error}") from error
