"""Commands as a user would run them, in folders made for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from command_bench import Bench, FlowBench, TalkBench

from stepwell import methods
from stepwell.cli import main


@pytest.fixture
def shown(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """The output of a command, on a wide terminal."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*words: str) -> str:
        capsys.readouterr()
        assert main(list(words)) == 0
        return capsys.readouterr().out

    return run


@pytest.fixture
def bench(
    tmp_path: Path,
    model_folder: Callable[..., Path],
    refused: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> Bench:
    monkeypatch.chdir(tmp_path)
    return Bench(tmp_path, model_folder("qwen2"), refused)


@pytest.fixture
def flows(tmp_path: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> FlowBench:
    monkeypatch.chdir(tmp_path)
    return FlowBench(tmp_path, refused)


@pytest.fixture
def talk(
    tmp_path: Path,
    model_folder: Callable[..., Path],
    refused: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> TalkBench:
    monkeypatch.chdir(tmp_path)
    models = {"plain": model_folder("gpt2"), "chatty": model_folder("gpt2", chat=True)}
    return TalkBench(tmp_path, models, refused)


@pytest.fixture
def plugged(talk: TalkBench) -> Iterator[TalkBench]:
    before = set(methods.names())
    yield talk
    for name in set(methods.names()) - before:
        methods.forget(name)
