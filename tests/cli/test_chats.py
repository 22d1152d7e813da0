"""Chats from the shell: tools, templates, special tokens, and the limits and failures of conversations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from chatty import ASK, chatty

from stepwell.cli import main

TOOLS = '''
def clock(zone: str) -> str:
    """The time.

    Args:
        zone: The time zone.
    """
    return zone

SCHEMA = {"type": "function", "function": {"name": "dice", "parameters": {}}}
TOOLS = [clock, SCHEMA]
BARE = [lambda x: x]
NUMBER = 3

class Fails:
    def reset(self, prompt): return None
    def step(self, message): raise ValueError("no call")
    def reward(completions): ...

def long(completions):
    return [float(len(messages[-1]["content"])) for messages in completions]
'''


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    chatty("chatml").save("model")
    rows = [{"prompt": ASK, "answer": "blue"}, {"prompt": [{"role": "user", "content": "2?"}], "answer": "2"}]
    Path("data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("my.py").write_text(TOOLS)
    Path("other.jinja").write_text("{% for m in messages %}{{ m.content + '<|im_end|>' }}{% endfor %}")
    words = ["train", "--model", "model", "--data", "data.jsonl", "--steps", "1", "--prompts-per-step", "2"]
    words += ["--group-size", "2", "--device", "cpu", "--no-progress", "--out", "run", "--max-new-tokens", "8"]
    return lambda *more: [*words, *more]


def test_words_that_are_right(train: Any, tmp_path: Path) -> None:
    told = ("--tools", "my.py:TOOLS", "--chat-template", "other.jinja", "--keep-special-tokens")
    variables = ("--chat-template-kwargs", '{"enable_thinking": false}')
    assert main(train(*told, *variables, "--reward", "my.py:long")) == 0
    about = json.loads((tmp_path / "run" / "run.json").read_text())
    assert about["tools"] == "my.py:TOOLS"
    assert about["keep_special_tokens"] is True


@pytest.mark.filterwarnings("ignore:The environment", "ignore:In [0-9]+ conversations")
def test_a_conversation_with_limits_goes_on_over_failures(train: Any, tmp_path: Path) -> None:
    failing = ("--environment", "my.py:Fails", "--environment-errors", "end", "--environment-penalty", "-1.5")
    assert main(train(*failing, "--max-turn-tokens", "3")) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert metrics["reward"] == -1.5
    about = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (about["max_turn_tokens"], about["environment_errors"], about["environment_penalty"]) == (3, "end", -1.5)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--tools my.py", "The tools must name a file and a list in it, such as 'my.py:tools', got 'my.py'."),
        ("--tools my.py:TOOL", "There is no list of my.py named 'TOOL'; did you mean 'TOOLS'?"),
        ("--tools my.py:NUMBER", "'NUMBER' in my.py must be a list, got a value of type int."),
        ("--tools my.py:BARE", "tools must be functions with type hints and a docstring that explains every argument"),
        ("--tools absent.py:TOOLS", "There is no file 'absent.py'"),
        ("--chat-template absent.jinja", "The chat template 'absent.jinja' cannot be read: No such file"),
        ("--chat-template data.jsonl --chat-template-kwargs [1]", "--chat-template-kwargs must be a JSON object, got"),
        ("--chat-template-kwargs {a", "--chat-template-kwargs must be a JSON object, got '{a'"),
        ("--max-turn-tokens 3", "--max-turn-tokens needs --environment: it is about a conversation with one."),
        ("--environment-errors end", "--environment-errors needs --environment"),
        ("--environment my.py:Fails --environment-errors no", "--environment-errors must be one of end, raise, got"),
        (
            "--environment my.py:Fails --max-turn-tokens 0",
            "max_turn_tokens must be a whole number, at least 1, or None, got",
        ),
        (
            "--environment my.py:Fails --max-turn-tokens 3",
            "Fails raised ValueError (no call) in step at my.py, line 17",
        ),
    ],
)
def test_words_that_are_wrong(train: Any, refused: Any, words: str, said: str) -> None:
    rewarded = () if "--environment my.py" in words else ("--reward", "my.py:long")
    assert said in refused(*train(*rewarded, *words.split(" ")))
