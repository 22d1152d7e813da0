"""A conversation resumes bit for bit with the environment it was started with, and with no other."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import stepwell as sw
from stepwell.cli import main
from stepwell.errors import CheckpointError
from stepwell.origin import origin
from stepwell.process.conversation.build import conversation
from stepwell.process.conversation.process import Conversation

DESK = '''"""What the model talks to."""

class Desk:
    """Asks for a letter until it is said."""

    def reset(self, prompt, answer, **columns):
        self.answer = answer

    def step(self, message):
        right = self.answer in message
        return "d e", float(right) - 0.1, right, False, {}

class Other(Desk):
    pass

def make():
    return Desk()
'''


class Bench:
    """A folder with a model, data and an environment, in which runs are begun and resumed from the command line."""

    def __init__(self, folder: Path, model: Path, refused: Callable[..., str]):
        self.folder, self.model, self.refused = folder, model, refused
        chat = [{"prompt": [{"role": "user", "content": f"{letter} b"}], "answer": letter} for letter in "abcd"]
        (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chat))
        (folder / "desk.py").write_text(DESK)

    def words(self, *more: str, out: str = "run", environment: str | None = "desk.py:Desk") -> list[str]:
        words = ["train", "--model", str(self.model), "--data", "data.jsonl", "--out", out, "--device", "cpu"]
        words += ["--prompts-per-step", "2", "--group-size", "2", "--max-new-tokens", "24", "--steps", "2"]
        words += ["--learning-rate", "1e-3", "--checkpoint-every", "1", "--keep", "100", "--no-progress"]
        return [*words, *(["--environment", environment] if environment else []), *more]

    def cut_back(self, out: str, name: str) -> None:
        """A copy of the folder `run` as it was when checkpoint `name` was the newest."""
        shutil.copytree(self.folder / "run", self.folder / out)
        for other in (self.folder / out / "checkpoints").iterdir():
            if other.name > name:
                shutil.rmtree(other)


@pytest.fixture
def bench(
    tmp_path: Path,
    model_folder: Callable[..., Path],
    refused: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> Bench:
    monkeypatch.chdir(tmp_path)
    return Bench(tmp_path, model_folder("gpt2", chat=True), refused)


TURNS = ("--turn-stop", "a", "b", "f", "--max-turns", "3", "--turn-role", "system")


@pytest.mark.parametrize("method", ["turn-ppo", pytest.param("grpo", marks=pytest.mark.slow)])
def test_a_conversation_resumes_bit_for_bit_at_every_update(bench: Bench, method: str) -> None:
    words = ("--method", method, "--epochs", "2", "--minibatches", "2", *TURNS)
    assert main(bench.words(*words)) == 0
    names = sorted(path.name for path in (bench.folder / "run" / "checkpoints").iterdir())
    assert len(names) == 1 + 8, "the beginning, and every update"
    for name in ("update-00000003", "update-00000004", "update-00000007"):
        bench.cut_back(name, name)
        os.utime("desk.py")  # touched, and not changed
        assert main(bench.words(*words, "--resume", out=name)) == 0
        files = ["metrics.jsonl", "completions.jsonl", "model.safetensors"]
        for file in files + (["value_head.safetensors"] if method == "turn-ppo" else []):
            assert (bench.folder / name / file).read_bytes() == (bench.folder / "run" / file).read_bytes(), name
    about = json.loads((bench.folder / "run" / "run.json").read_text())
    said = {key: about[key] for key in ("environment", "max_turns", "role", "stop", "reward")}
    assert said == {
        "environment": "desk.py:Desk",
        "max_turns": 3,
        "role": "system",
        "stop": ["a", "b", "f"],
        "reward": ["environment_return"],
    }
    lines = (bench.folder / "run" / "completions.jsonl").read_text().splitlines()
    assert any({"role": "system", "content": "d e"} in json.loads(line)["completion"] for line in lines)
    assert main(["report", "run", "--out", "page.html"]) == 0
    assert "\nsystem: d e\nassistant: " in (bench.folder / "page.html").read_text()


@pytest.mark.parametrize(
    ("change", "words", "environment", "difference"),
    [
        ("0.1", (), "desk.py:Desk", "its code has changed"),
        ("", (), "desk.py:Other", 'environment was "Desk", now "Other"'),
        ("", (), "desk.py:make", 'environment was "Desk", now "make"'),
        ("", (), None, 'environment was "Desk", now null'),
        ("", ("--max-turns", "4"), "desk.py:Desk", "max turns was 3, now 4"),
        ("", ("--turn-role", "user"), "desk.py:Desk", 'role was "system", now "user"'),
        ("", ("--turn-stop", "a"), "desk.py:Desk", 'stop was ["a", "b", "f"], now ["a"]'),
    ],
    ids=["edited file", "another class", "a function", "none", "turns", "role", "stop"],
)
def test_another_environment_is_refused(
    bench: Bench, change: str, words: Any, environment: str | None, difference: str
) -> None:
    reward = ("--reward", "exact_match")
    assert main(bench.words(*TURNS, *reward, "--steps", "1")) == 0
    before = {path: path.read_bytes() for path in (bench.folder / "run").rglob("*") if path.is_file()}
    if change:
        (bench.folder / "desk.py").write_text(DESK.replace(change, "0.2"))
    given = (*TURNS, *words) if environment else ()
    line = bench.refused(*bench.words(*given, *reward, "--resume", environment=environment))
    assert "is of another process (" in line
    assert difference in line
    assert {path: path.read_bytes() for path in (bench.folder / "run").rglob("*") if path.is_file()} == before


# from Python


class Desk:
    def __init__(self, cost: float = 0.0, log: Any = None):
        self.cost = cost

    def reset(self, prompt: Any) -> None:
        return None

    def step(self, message: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        return "d", float(len(message)) - self.cost, False, False, {}


class Factory:
    def __call__(self) -> Desk:
        return Desk()

    def make(self) -> Desk:
        return Desk()


def local() -> Any:
    class Inside(Desk):
        pass

    return Inside


FACTORIES: dict[str, tuple[Any, str]] = {
    "class": (Desk, "Desk"),
    "lambda": (lambda: Desk(1.0), "<lambda>"),
    "local class": (local(), "local.<locals>.Inside"),
    "partial": (functools.partial(Desk, 0.5, log=print), "Desk(0.5, log=builtins.print)"),
    "partial of what has no words": (functools.partial(Desk, log=object()), "Desk(log=object)"),
    "partial of a table": (functools.partial(Desk, log={"a": [1, None]}), "Desk(log={'a': (1, None)})"),
    "callable object": (Factory(), "Factory"),
    "method": (Factory().make, "Factory.make"),
}


@pytest.mark.parametrize("kind", FACTORIES)
def test_the_words_of_a_factory_are_the_same_in_every_run(kind: str) -> None:
    make, words = FACTORIES[kind]
    name, digest = origin(make)
    assert name == words
    assert len(digest) == 64
    assert "0x" not in name


def test_a_factory_without_a_source_goes_by_its_name_alone() -> None:
    namespace: dict[str, Any] = {"__name__": "typed_in"}
    exec("class Desk: ...", namespace)
    assert origin(namespace["Desk"]) == ("typed_in.Desk", "")


@pytest.mark.slow
def test_of_a_program_only_the_environment_s_own_lines_count(tmp_path: Path) -> None:
    lines = "from stepwell.origin import origin\n"
    lines += "class Desk:\n    cost = {}\nprint(origin(Desk)[1])  # {}\n"
    said = []
    for cost, remark in ((1, "first"), (1, "resumed"), (2, "resumed")):
        (tmp_path / "program.py").write_text(lines.format(cost, remark))
        done = subprocess.run([sys.executable, "program.py"], cwd=tmp_path, capture_output=True, text=True, check=True)
        said.append(done.stdout)
    assert said[0] == said[1] != said[2]


def talk(small_language: Callable[..., Any], out: Path, make: Any = Desk, resume: bool = False, **settings: Any) -> Any:
    model = small_language("gpt2", max_new_tokens=16)
    process = conversation(model, make, stop=["a", "b"]) if make else model
    given = {"steps": 2, "prompts_per_step": 2, "group_size": 2, "learning_rate": 1e-3} | settings
    reward = sw.environment_return if make else lambda completions, **columns: [0.5 * len(t) for t in completions]
    return sw.train(process, ["a b", "c"], reward, out=out, resume=resume, **given)


@pytest.mark.parametrize("make", [None, Desk], ids=["no environment", "an environment"])
def test_a_checkpoint_without_an_environment_fits_only_a_run_without(
    small_language: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Any
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(Conversation, "describe", lambda self: self.language.describe())
        talk(small_language, tmp_path / "run", make, steps=1)
    if make:
        with pytest.raises(CheckpointError, match=r'is of another process .*environment was null, now "Desk"'):
            talk(small_language, tmp_path / "run", make, resume=True)
        return
    again = talk(small_language, tmp_path / "run", make, resume=True)
    whole = talk(small_language, tmp_path / "whole", make)
    pairs = zip(again.process.module.parameters(), whole.process.module.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_run_from_python_names_its_environment_and_resumes(
    small_language: Callable[..., Any], tmp_path: Path
) -> None:
    for make in (Desk, lambda: Desk(1.0)):
        out = tmp_path / make.__name__.strip("<>")
        talk(small_language, out, make, steps=1)
        again = talk(small_language, out, make, resume=True)
        whole = talk(small_language, out.with_suffix(".whole"), make)
        pairs = zip(again.process.module.parameters(), whole.process.module.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
        about = json.loads((out / "run.json").read_text())
        assert (about["environment"], about["max_turns"]) == (make.__qualname__, 8)
