"""Exact answers that methods are held against, by name: a card's `proof` lists the ones that prove it.

An oracle takes a card and returns the largest deviation from a closed form or an enumeration. Every file of this folder
and of its folders registers its own by `@register`.
"""

from __future__ import annotations

import functools
import importlib
import os
import pkgutil
from collections.abc import Callable, Mapping
from pathlib import Path

from stepwell.check.oracles.provable import Provable
from stepwell.errors import UnknownName

Oracle = Callable[[Provable], float]

_ORACLES: dict[str, Oracle] = {}


def register(function: Oracle) -> Oracle:
    """Make an oracle known by the function's name."""
    _ORACLES[function.__name__] = function
    return function


@functools.cache
def discover() -> None:
    """Import every file of this folder and of its folders, once."""
    for module in pkgutil.walk_packages([os.fspath(Path(__file__).parent)], "stepwell.check.oracles."):
        importlib.import_module(module.name)


def oracles() -> Mapping[str, Oracle]:
    """Every oracle by its name."""
    discover()
    return dict(_ORACLES)


def oracle(name: str) -> Oracle:
    """An oracle by name; an unknown one is an error that names the nearest."""
    discover()
    if name not in _ORACLES:
        raise UnknownName("oracle", name, _ORACLES)
    return _ORACLES[name]
