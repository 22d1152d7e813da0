"""Kinds of process that methods are made for. Each folder of processes registers its own; so does a user's class."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Mapping
from pathlib import Path

_KINDS: dict[str, str] = {}


def register(kind: str, plural: str) -> None:
    """Make a kind known, with the words for several processes of it, as messages use them ("language models")."""
    _KINDS.setdefault(kind, plural)


@functools.cache
def _find() -> None:
    for folder in pkgutil.iter_modules([str(Path(__file__).parent)], "stepwell.process."):
        if folder.ispkg:
            importlib.import_module(folder.name)


def kinds() -> Mapping[str, str]:
    """Every kind that a process registered, with its plural. Imports no process: a folder registers what it holds."""
    _find()
    return dict(_KINDS)
