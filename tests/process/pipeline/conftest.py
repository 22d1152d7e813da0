"""Tiny pipelines, written once and shared: tests import the module `tiny_pipelines`, or ask for `pipeline_folder`."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SPECIFICATION = importlib.util.spec_from_file_location("tiny_pipelines", Path(__file__).with_name("tiny_pipelines.py"))
assert SPECIFICATION is not None
assert SPECIFICATION.loader is not None
tiny_pipelines = importlib.util.module_from_spec(SPECIFICATION)
sys.modules["tiny_pipelines"] = tiny_pipelines
SPECIFICATION.loader.exec_module(tiny_pipelines)


@pytest.fixture(scope="session")
def pipeline_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The folder of a tiny pipeline, one for each kind and scheduler's settings; tests leave it as it is."""
    made: dict[Any, Path] = {}

    def build(kind: str, **scheduler: Any) -> Path:
        key = (kind, *sorted(scheduler.items()))
        if key not in made:
            made[key] = tiny_pipelines.write(kind, tmp_path_factory.mktemp(kind) / "pipeline", **scheduler)
        return made[key]

    return build
