"""Tables: what is saved comes back, and what contradicts itself is refused."""

from __future__ import annotations

import os

import pytest

from stepwell.errors import InputError, UnknownName
from stepwell.solver.table import TABLES, Table, load, table


@pytest.mark.parametrize("name", TABLES)
def test_a_saved_table_comes_back(name: str, tmp_path):
    table(name).save(tmp_path / "solver.json")
    assert load(tmp_path / "solver.json") == table(name)
    assert table(name).source
    assert name in str(table(name))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"order": 5}, "order must be 1 to 4"),
        ({"inner": 0.5}, "order 2"),
        ({"corrector": True, "predicts": "noise"}, "corrector"),
        ({"predicts": "noise", "weights": "half"}, "predict data"),
        ({"noise": "flow", "level": 0.7}, "velocity"),
        ({"noise": "eta", "level": 1.5}, "at most 1"),
        ({"noise": "eta", "level": 0.0}, "level must be above 0 with noise"),
        ({"level": 0.5}, "level must be above 0 with noise"),
        ({"predicts": "velocity", "noise": "tau", "level": 1.0}, "predicting data"),
        ({"order": 2, "inner": 0.5, "noise": "eta", "level": 1.0}, "draws no noise"),
        ({"window": (0.5, 0.1)}, "window must begin before"),
        ({"weights": "hallf"}, "did you mean 'half'"),
    ],
)
def test_a_table_that_contradicts_itself_is_refused(changes: dict, message: str):
    with pytest.raises(InputError, match=message):
        Table("mine", **changes)


def test_unknown_names_and_files_say_what_is_wrong(tmp_path):
    with pytest.raises(UnknownName, match="did you mean 'dpmpp-2m'"):
        table("dpmp-2m")
    (tmp_path / "solver.json").write_text('{"name": "x", "weight": 1}')
    with pytest.raises(InputError, match="weight"):
        load(tmp_path / "solver.json")
    with pytest.raises(InputError, match="is not a saved solver"):
        load(tmp_path / "missing.json")


def test_a_table_is_saved_whole_or_not_at_all(tmp_path, monkeypatch):
    table("ddim").save(tmp_path / "mine.json")

    def broken(*names):
        raise OSError("the disk is full")

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises((OSError, InputError)):
        table("unipc-3").save(tmp_path / "mine.json")
    assert load(tmp_path / "mine.json") == table("ddim")
