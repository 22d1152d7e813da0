"""The names of settings that are said to be TRL's are TRL's."""

from __future__ import annotations

import dataclasses
import inspect
import os
import re

import pytest

os.environ |= {"TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_OFFLINE": "1"}
pytest.importorskip("trl", minversion="1.16", reason="TRL 1.16 is where these names were read")

from trl import DPOConfig, GRPOConfig, RLOOConfig

from stepwell.recipe import foreign_names


def under(heading: str) -> set[str]:
    """The names that stand under a comment of the table, up to the next."""
    lines = inspect.getsource(foreign_names).split(f"    # {heading}\n")[1:]
    return {
        name
        for text in lines
        for name in re.findall(r'^    "([\w.]+)":', re.split(r"^    #|^}", text, flags=re.M)[0], re.M)
    }


def test_the_names_said_to_be_trls_are_fields_of_its_configurations():
    fields = {entry.name for config in (GRPOConfig, RLOOConfig, DPOConfig) for entry in dataclasses.fields(config)}
    assert len(under("trl")) > 20
    assert under("trl") <= fields
