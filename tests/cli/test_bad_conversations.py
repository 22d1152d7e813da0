"""Conversations that cannot work end with exit code 2 and one line that says what is right."""

from __future__ import annotations

import json

import pytest
from command_bench import DESK

from stepwell.cli import main

STEP = "class Mine(Desk):\n    def step(self, message): {}\n"
RESET = "class Mine(Desk):\n    def reset{}\n"


@pytest.mark.parametrize(
    "changes",
    ["", "--environment desk.py:make", "--model chatty --data chat.jsonl --turn-role tool --max-turns 2"],
)
def test_the_conversation_that_the_others_spoil_is_right(talk, changes):
    assert main(talk.words(changes)) == 0


def test_an_environment_that_never_ends_or_says_too_much_is_cut(talk):
    talk.write("long.py", DESK, STEP.format('return "d " * 100, 1.0, False, False, {}'))
    for out, words in (("run", "--max-turns 2"), ("other", "--environment long.py:Mine")):
        assert main(talk.words(f"{words} --out {out}")) == 0
        assert json.loads((talk.folder / out / "metrics.jsonl").read_text())["truncated"] > 0


def test_several_rewards_with_what_the_environment_pays_among_them(talk):
    words = talk.words("--reward-weights 1 0.5")
    assert main([*words, "--reward", "environment_return", "--reward", "exact_match"]) == 0
    assert {"reward/environment_return", "reward/exact_match"} <= set(
        json.loads((talk.out / "metrics.jsonl").read_text())
    )


# the words of the command


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ("--environment desk.py", "must name a file and a class or function in it, such as 'my.py:Env"),
        ("--environment =", "The environment must name a file and a class or function in it"),
        ("--environment dsk.py:Desk", "There is no file 'dsk.py'; did you mean 'desk.py'?"),
        ("--environment no.such:Desk", "There is no module 'no.such'; a file is named with its ending"),
        ("--environment data.jsonl:Desk", "file must be a Python file, whose name ends in .py, got 'data.jsonl'"),
        ("--environment desk.py:Deks", "no class or function of desk.py named 'Deks'; did you mean 'Desk'?"),
        ("--environment desk.py:GOOD", "'GOOD' in desk.py must be a class or function, got a value of type tuple."),
        ("--envronment desk.py:Desk", "There is no argument '--envronment'; did you mean '--environment'?"),
        ("--max-turns 0", "max_turns must be a whole number, at least 1, got 0"),
        ("--max-turns 2.5", "--max-turns must be a whole number, got '2.5'."),
        ("--turn-stop =", "stop must be a text, or texts, none of them empty, got ('',)"),
        ("--turn-role tool", "--turn-role must be left out: no prompt is a chat."),
        (
            "--turn-role = --model chatty --data chat.jsonl",
            "role must be the name of a chat's role, such as 'user' or 'tool', got ''",
        ),
        (
            "--environment - --reward exact_match",
            "--turn-stop needs --environment: it is about a conversation with one.",
        ),
        (
            "--environment - --turn-stop - --max-turns 8",
            "--max-turns needs --environment: it is about a conversation with one.",
        ),
        (
            "--environment - --turn-stop - --turn-role tool",
            "--turn-role needs --environment: it is about a conversation with one.",
        ),
        (
            "--environment - --turn-stop -",
            "--reward must be given, such as my.py:function; see `stepwell train --help` for others.",
        ),
        (
            "--environment - --turn-stop - --reward environment_return",
            "--reward environment_return needs --environment: it is the reward that an environment",
        ),
        ("--reward environment_retur", "no reward 'environment_retur'; did you mean 'environment_return'?"),
        ("--reward-weights 1 2", "Reward weights must be as many as the functions (environment_return), got 2 for 1"),
        ("--method flow-grpo", "The method 'flow-grpo' trains flows, and not language models"),
        ("--method grpo:clip=0.1", "--method must be an id, got 'grpo:clip=0.1'; set options by --method grpo --set"),
        ("--data chat.jsonl --method turn-ppo", "is a chat, but the tokenizer has no chat template; give a text."),
        ("--data half.jsonl", "half.jsonl, row 0: The prompt 'a \\ud800' holds half a character"),
        ("--data turns.jsonl", "A prompt has a column 'turns', and reward functions are given something else"),
        ("--data environment_return.jsonl", "A prompt has a column 'environment_return', and reward functions"),
        ("--data truncated.jsonl", "truncated.jsonl has a column 'truncated', and reward functions are given"),
    ],
)
def test_a_conversation_that_is_not_described(talk, changes, said):
    assert said in talk.refused(*talk.words(changes))


def test_environments_are_for_language_models(talk):
    (talk.folder / "pipe").mkdir()
    talk.write("pipe/model_index.json", json.dumps({"_class_name": "StableDiffusionPipeline"}))
    talk.write("flow.py", "def make(): ...")
    bare = "--max-new-tokens - --device - --turn-stop - --method flow-grpo"
    for model, called in (("pipe", "a pipeline"), ("flow.py:make", "a model of your own")):
        line = talk.refused(*talk.words(f"{bare} --model {model}"))
        assert f"--environment must be left out for {called}." in line
        line = talk.refused(*talk.words(f"{bare} --model {model} --environment - --max-turns 2"))
        assert f"--max-turns must be left out for {called}." in line


# the user's file


BROKEN = {
    "syntax": ("def f(:", "desk.py failed at line 13 while it was imported: SyntaxError"),
    "raises": ("1 / 0", "desk.py failed at line 13 while it was imported: ZeroDivisionError"),
    "exits": ("raise SystemExit(3)", "desk.py failed at line 13 while it was imported: SystemExit: 3"),
    "an object": ("Mine = Desk()", "'Mine' in desk.py must be a class or function, got a value of type Desk."),
    "needs arguments": (
        "class Mine(Desk):\n    def __init__(self, size): ...",
        "a class or a function without arguments, got 'desk.py:Mine' with (size).",
    ),
    "function needs arguments": (
        "def Mine(size): ...",
        "a class or a function without arguments, got 'desk.py:Mine' with (size).",
    ),
    "function returns nothing": ("def Mine(): ...", "and step(message), got None, which has no method"),
    "one for all": ("one = Desk()\ndef Mine(): return one", "must return a new object each time, got the same Desk"),
    "maker raises": (
        "class Mine(Desk):\n    def __init__(self): self.x = 1 / 0",
        "Mine raised ZeroDivisionError (division by zero) in the environment's factory at desk.py, line 14, for",
    ),
    "no reset": ("class Mine:\n    def step(self, message): ...", "a value of type Mine, which has no method 'reset'"),
    "no step": ("class Mine:\n    def reset(self, prompt): ...", "a value of type Mine, which has no method 'step'"),
    "step takes nothing": (
        "class Mine(Desk):\n    def step(self): ...",
        "must be callable as step(message), got the signature ()",
    ),
    "reset wants a column": (
        RESET.format("(self, prompt, target): ..."),
        "The reset of the environment Mine requires 'target', but the data has no such column; it has 'answer' besides",
    ),
    "reset looks for a column": (
        RESET.format("(self, prompt, **columns): columns['target']"),
        "Mine raised KeyError ('target') in reset at desk.py, line 14, for the prompt",
    ),
    "reset takes a column first": (
        RESET.format("(self, answer): ..."),
        "Mine must take the prompt first, as reset(prompt, **columns), got the column 'answer' there",
    ),
    "reset takes keywords only": (
        RESET.format("(self, *, seed=None): ..."),
        "must be callable as reset(prompt, **columns), got the signature (*, seed=None)",
    ),
    "reset is async": (
        "class Mine(Desk):\n    async def reset(self, prompt): ...",
        "The reset of the environment Mine must be a plain function, got an async one",
    ),
    "reset returns a number": (
        RESET.format("(self, prompt): return 3"),
        "returns from reset must be a text, or for a chat",
    ),
    "reset says too much": (
        RESET.format("(self, prompt): return 'a ' * 70"),
        "take 70 tokens, and after the prompt the model has positions for 62; shorten them",
    ),
    "step is async": (
        "class Mine(Desk):\n    async def step(self, message): ...",
        "Mine must be a plain function, got an async one",
    ),
    "step of the old gym": (
        STEP.format('return "d", 0.0, False, {}'),
        "must return (observation, reward, terminated, truncated, info), got a tuple of 4",
    ),
    "step returns nothing": (STEP.format("..."), "reward, terminated, truncated, info), got None"),
    "step raises": (
        STEP.format("raise KeyError('x')"),
        "Mine raised KeyError ('x') in step at desk.py, line 14, for the",
    ),
    "step exits": (
        STEP.format("raise SystemExit(1)"),
        "Mine raised SystemExit (1) in step at desk.py, line 14, for the",
    ),
    "a text for a reward": (
        STEP.format('return "d", "good", False, False, {}'),
        "must be a finite number, got 'good'",
    ),
    "NaN for a reward": (
        STEP.format('return "d", float("nan"), False, False, {}'),
        "must be a finite number, got nan",
    ),
    "a reward too large": (STEP.format('return "d", 10**400, False, False, {}'), "must be a finite number, got 1000"),
    "bytes": (STEP.format('return b"d", 0.0, False, False, {}'), "'content', got a value of type bytes"),
    "half a character": (
        STEP.format('return "\\ud800", 0.0, False, False, {}'),
        "'\\ud800' of a conversation holds half",
    ),
    "no end that is told": (
        STEP.format('return "d", 0.0, 1, False, {}'),
        "'terminated' of the environment Mine must be True or False, got 1.",
    ),
    "a message to a text": (
        STEP.format('return {"role": "tool", "content": "d"}, 0.0, False, False, {}'),
        "that is a plain text must be a text, got {'role'",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_an_environment_that_does_not_do_as_it_should(talk, kind):
    lines, said = BROKEN[kind]
    talk.write("desk.py", DESK.rstrip(), lines)
    assert said in talk.refused(*talk.words("--environment desk.py:Mine"))


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ('{"role": "tool", "content": 3}', "a message whose 'content' is of type int."),
        ('{"role": None, "content": "d"}', "a message without a 'role' that is a text."),
        ('{"role": "d"}', "a value of type dict."),
    ],
)
def test_a_message_that_a_chat_cannot_hold(talk, message, said):
    talk.write("desk.py", DESK, STEP.format(f"return {message}, 0.0, False, False, {{}}"))
    line = talk.refused(*talk.words("--environment desk.py:Mine --model chatty --data chat.jsonl"))
    assert f"must be a text, or for a chat messages with a 'role' and a 'content', got {said}" in line
