"""Stepwell: sample, steer and train anything that makes its sample one random step at a time."""

from __future__ import annotations

import ast
import importlib
import importlib.util
from pathlib import Path
from typing import Any

__version__ = "0.1.0"


def _homes() -> dict[str, str]:
    """The module that each public name comes from, as `__init__.pyi` imports them for type checkers."""
    stub = ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
    imports = [node for node in stub.body if isinstance(node, ast.ImportFrom)]
    return {alias.name: f"{node.module}" for node in imports for alias in node.names}


_HOMES = _homes()

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for, so that `import stepwell` costs nothing."""
    if name not in _HOMES:
        raise AttributeError(f"stepwell has no '{name}'; it offers {', '.join(__all__)}")
    home = importlib.import_module(_HOMES[name])
    if hasattr(home, "__path__") and importlib.util.find_spec(f"{home.__name__}.{name}"):
        return importlib.import_module(f"{home.__name__}.{name}")
    return getattr(home, name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
