"""Checks that anybody can run: exact laws of programs, and the laws of processes, surrogates and methods."""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "check_method": "methods",
    "expectation": "replay",
    "law": "replay",
    "outcomes": "replay",
    "unbiased": "replay",
    "process": "processes.check",
    "surrogate": "surrogates",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    """A public name, imported when it is first asked for, so that nobody pays for oracles that are not used."""
    if name not in _HOME:
        raise AttributeError(f"stepwell.check has no '{name}'; it has {', '.join(sorted(_HOME))}.")
    return getattr(importlib.import_module(f"stepwell.check.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
