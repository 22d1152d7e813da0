"""The oracles, public: exact laws of programs, the laws every process and every method must obey."""

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
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    """Public names are loaded when they are first asked for, so that no part pays for the oracles it never uses."""
    if name not in _HOME:
        raise AttributeError(f"stepwell.check has no '{name}'; it has {', '.join(sorted(_HOME))}.")
    return getattr(importlib.import_module(f"stepwell.check.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
