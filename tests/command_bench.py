"""Folders in which commands are run as a user would run them: a language model's, a conversation's, a flow's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from flow_models import write_file

REWARDS = """
def reward(completions, answer, **columns):
    return [float(text.count(letter)) for text, letter in zip(completions, answer)]

def one_number(completions, **columns):
    return [1.0]

def text(completions, **columns):
    return ["good"] * len(completions)

def not_a_number(completions, **columns):
    return [float("nan")] * len(completions)

def raises(completions, **columns):
    raise KeyError("score")

def ends(completions, **columns):
    raise SystemExit(3)

def needs_solution(completions, solution):
    return [0.0] * len(completions)

calls = 0

def raises_later(completions, **columns):
    global calls
    calls += 1
    if calls == 3:
        raise RuntimeError("the judge is gone")
    return [float(len(text)) for text in completions]
"""
ROWS = [{"prompt": f"{letter} b c", "answer": letter} for letter in "abcd"]


class Bench:
    """A folder with a model, data and rewards, in which commands are run as a user would run them."""

    def __init__(self, folder: Path, model: Path, refused: Callable[..., str]):
        self.folder, self.out, self.model, self.refused = folder, folder / "run", model, refused
        self.write("data.jsonl", *map(json.dumps, ROWS))
        self.write("rewards.py", REWARDS)

    def write(self, name: str, *lines: str) -> Path:
        path = self.folder / name
        path.write_text("".join(line + "\n" for line in lines))
        return path

    def words(self, *changes: str) -> list[str]:
        """The words of a training run that is right, but for the changes: the last word on an argument counts."""
        given = {
            "--model": [str(self.model)],
            "--data": ["data.jsonl"],
            "--reward": ["rewards.py:reward"],
            "--out": ["run"],
            "--steps": ["2"],
            "--prompts-per-step": ["2"],
            "--group-size": ["2"],
            "--max-new-tokens": ["4"],
            "--device": ["cpu"],
            "--no-progress": [],
        }
        for word in changes:
            if word.startswith("--"):
                name = word
                given[name] = []
            else:
                given[name].append(word)
        return ["train", *(word for name, values in given.items() for word in (name, *values))]

    def whole(self) -> None:
        """Whatever is in the run's folder is whole: JSON that can be read, lines that end, nothing temporary."""
        for path in self.out.rglob("*"):
            assert not path.name.startswith("."), path
            if path.suffix == ".json":
                json.loads(path.read_text())
            if path.suffix == ".jsonl":
                assert all(json.loads(line) for line in path.read_text().splitlines())
                assert path.read_bytes()[-1:] in (b"\n", b"")


DESK = """
GOOD = ("d", 0.0, False, False, {})

class Desk:
    def reset(self, prompt, answer, **columns):
        self.answer = answer

    def step(self, message):
        return " d", float(self.answer in message), False, False, {}

def make():
    return Desk()

"""


class TalkBench:
    """A folder with models, data and an environment, in which commands are run as a user would run them."""

    def __init__(self, folder: Path, models: dict[str, Path], refused: Callable[..., str]):
        self.folder, self.out, self.models, self._refused = folder, folder / "run", models, refused
        rows = [{"prompt": f"{letter} b c", "answer": letter} for letter in "abcd"]
        chat = [{**row, "prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows]
        self.write("data.jsonl", *map(json.dumps, rows))
        self.write("chat.jsonl", *map(json.dumps, chat))
        for column in ("turns", "environment_return", "truncated"):
            self.write(f"{column}.jsonl", json.dumps({"prompt": "a b", "answer": "a", column: 1}))
        self.write("half.jsonl", '{"prompt": "a \\ud800", "answer": "a"}')
        self.write("desk.py", DESK)

    def write(self, name: str, *lines: str) -> Path:
        path = self.folder / name
        path.write_text("".join(line + "\n" for line in lines))
        return path

    def words(self, changes: str = "") -> list[str]:
        """The words of a conversation that is right, but for the changes; `-` takes one away, `=` empties it."""
        given = {"--model": [str(self.models["plain"])], "--data": ["data.jsonl"], "--environment": ["desk.py:Desk"]}
        given |= {"--out": ["run"], "--steps": ["1"], "--prompts-per-step": ["2"], "--group-size": ["2"]}
        given |= {"--max-new-tokens": ["30"], "--turn-stop": ["a", "c", "f"], "--device": ["cpu"], "--no-progress": []}
        name = ""
        for word in changes.split():
            if word.startswith("--"):
                name = word
                given[name] = []
            elif word == "-":
                del given[name]
            else:
                given[name].append("" if word == "=" else str(self.models.get(word, word)))
        return ["train", *(word for name, values in given.items() for word in (name, *values))]

    def refused(self, *words: str) -> str:
        """The one line a command is refused with; whatever it left behind is whole, and no step of a run."""
        line = self._refused(*words)
        left = [path.name for path in self.out.rglob("*")]
        assert left in ([], ["run.json"])
        if left:
            json.loads((self.out / "run.json").read_text())
        return line


class FlowBench(Bench):
    """A folder with a user's velocities and networks, some of them wrong (`flow_models.py`)."""

    def __init__(self, folder: Path, refused: Callable[..., str]):
        super().__init__(folder, folder, refused)
        write_file(folder)

    def drawing(self, *changes: str) -> list[str]:
        """The words of a drawing that is right, but for the changes; `-` takes an argument away."""
        given = {"--model": ["my.py:velocity"], "--shape": ["2"], "--samples": ["2"], "--steps": ["4"]}
        return self._changed("sample", given, changes)

    def training(self, *changes: str) -> list[str]:
        given = {"--model": ["my.py:make"], "--data": ["data.jsonl"], "--reward": ["my.py:right"]}
        given |= {"--method": ["flow-grpo"], "--steps": ["1"], "--prompts-per-step": ["2"], "--group-size": ["2"]}
        return self._changed("train", given | {"--no-progress": []}, changes)

    def _changed(self, command: str, given: dict[str, list[str]], changes: tuple[str, ...]) -> list[str]:
        given, name = {**given, "--out": ["run"]}, ""
        for word in changes:
            if word.startswith("--"):
                name = word
                given[name] = []
            elif word == "-":
                del given[name]
            else:
                given[name].append(word)
        return [command, *(word for name, values in given.items() for word in (name, *values))]

    def unchanged(self) -> set[Path]:
        return {path for path in self.folder.rglob("*") if "__pycache__" not in path.parts}
