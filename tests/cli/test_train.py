"""`stepwell train`: every setting within reach, and what a run leaves behind."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from stepwell.cli import COMMANDS, Train, main, reward_named
from stepwell.cli.arguments import argument_names
from stepwell.cli.processes.base import kind_called, refuse_unused
from stepwell.cli.processes.language import LanguageOptions
from stepwell.cli.train import TrainingOptions
from stepwell.errors import InputError
from stepwell.process.language import compiled
from stepwell.recipe.options import options_from
from stepwell.training.log import read_lines
from stepwell.training.settings import Settings


def test_every_setting_is_an_argument_with_the_same_default():
    arguments = {entry.name: entry for entry in dataclasses.fields(TrainingOptions)}
    for entry in dataclasses.fields(Settings):
        assert entry.name in arguments
        if entry.name not in ("steps", "progress"):  # 100 unless there is a budget; shown unless asked not to
            assert arguments[entry.name].default == entry.default, entry.name


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("a=0.1", 0.1),
        ("a=3", 3),
        ("a=-1e-3", -1e-3),
        ("a=true", True),
        ("a=False", False),
        ("a=none", None),
        ("a=top", "top"),
        ("a='3'", "3"),
        ("a=x=y", "x=y"),
        ("a=", ""),
    ],
)
def test_an_option_is_a_literal_or_text(word, value):
    found = options_from([word])
    assert found == {"a": value}
    assert type(found["a"]) is type(value)


def test_rewards_that_come_with_stepwell_have_names():
    right = {"completions": ["so 4", "5"], "answer": ["4", "4"]}
    assert reward_named("numeric")(**right) == [1.0, 0.0]
    assert reward_named("exact_match")(**right) == [0.0, 0.0]
    assert reward_named(r"regular_expression:so (\d)")(**right) == [1.0, 0.0]
    assert callable(reward_named("math_equal"))


@pytest.fixture
def words(tmp_path: Path, model_folder: Callable[..., Path]) -> Callable[..., list[str]]:
    """The words of a short run on a small model."""
    rows = [{"question": f"{letter} b c", "answer": letter} for letter in "abcd"]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "mine.py").write_text(
        "import pathlib, time\n"
        "def count(completions, answer, **columns):\n"
        "    return [float(text.count(letter)) for text, letter in zip(completions, answer)]\n"
        "def slow(completions, **columns):\n"
        f"    pathlib.Path({str(tmp_path / 'called')!r}).touch()\n"
        "    time.sleep(0.1)\n"
        "    return [float(len(text)) for text in completions]\n"
    )

    def build(*more: str, out: str = "run") -> list[str]:
        given = ["--model", str(model_folder("qwen2")), "--data", str(tmp_path / "data.jsonl")]
        given += ["--prompt-column", "question", "--out", str(tmp_path / out), "--device", "cpu"]
        given += ["--prompts-per-step", "2", "--group-size", "2", "--max-new-tokens", "4"]
        return ["train", *given, *more]

    return build


@pytest.mark.filterwarnings("ignore:For 3 steps all samples of every prompt had the same reward")
def test_a_run_leaves_a_model_a_log_and_what_it_was_made_of(words, tmp_path, capsys):
    reward = f"{tmp_path / 'mine.py'}:count"
    given = ("--reward", reward, "--reward", "exact_match", "--reward-weights", "1", "0.5", "--steps", "3")
    given += ("--method", "gspo", "--set", "low=1e-2", "--learning-rate", "1e-3", "--seed", "4", "--temperature", "0.8")
    given += ("--evaluation", str(tmp_path / "data.jsonl"), "--evaluate-every", "3")
    command = words(*given)
    capsys.readouterr()  # what saving the small model printed
    assert main(command) == 0
    captured = capsys.readouterr()
    out = tmp_path / "run"
    assert captured.err == ""
    assert f"The trained model and the log are in {out}" in captured.out
    assert captured.out.count("\n") == 3 + 2  # a line a step, and what came of it
    about = json.loads((out / "run.json").read_text())
    assert about["method"] == "gspo"
    assert about["options"] == {"low": 0.01}
    assert about["settings"]["learning_rate"] == 1e-3
    assert about["settings"]["seed"] == 4
    assert about["temperature"] == 0.8
    assert about["reward"] == [reward, "exact_match"]
    metrics = read_lines(out / "metrics.jsonl")
    assert [line["step"] for line in metrics] == [1, 2, 3]
    assert {"reward/count", "reward/exact_match", "cost/forward"} <= set(metrics[0])
    assert "evaluation/reward" in metrics[2]
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoModelForCausalLM.from_pretrained(out)
    AutoTokenizer.from_pretrained(out)


def test_a_run_is_compiled_where_it_is_asked_for_and_says_so(words, tmp_path, monkeypatch):
    used = []
    monkeypatch.setattr(compiled, "_code", lambda forward: used.append(forward) or forward)
    command = words("--reward", f"{tmp_path / 'mine.py'}:count", "--steps", "1")
    assert main(command) == 0
    assert not used
    assert main([*command[:-1], "1", "--compile", "--out", str(tmp_path / "compiled")]) == 0
    assert used
    for out in ("run", "compiled"):
        assert json.loads((tmp_path / out / "run.json").read_text())["compile"] == (out == "compiled")


@pytest.mark.parametrize("kind", ["pipeline", "own", "task"])
def test_only_a_language_model_is_compiled(kind):
    compiling = Train(model="m", data="d", language=LanguageOptions(compile=True))
    refuse_unused(Train(model="m", data="d"), kind_called(kind))
    refuse_unused(compiling, kind_called("language"))
    with pytest.raises(InputError, match="--compile must be left out for a"):
        refuse_unused(compiling, kind_called(kind))


def test_every_argument_of_a_kind_is_one_of_a_command():
    """A kind that names an argument which no command has would refuse nothing."""
    known = {name for command in COMMANDS.values() for name in argument_names(command)}
    for kind in ("language", "pipeline", "own", "task"):
        assert kind_called(kind).arguments <= known


def test_a_budget_takes_the_place_of_the_steps(words, tmp_path):
    reward = ("--reward", f"{tmp_path / 'mine.py'}:count")
    assert main(words(*reward, "--budget", "6-reward-calls")) == 0
    assert len(read_lines(tmp_path / "run" / "metrics.jsonl")) == 2  # four calls a step
    assert json.loads((tmp_path / "run" / "run.json").read_text())["settings"]["steps"] is None


def test_an_interrupted_run_goes_on_bit_for_bit(words, start, tmp_path):
    """Ctrl-C ends a run with code 130 and one line; with --resume it ends as if it had never stopped."""
    given = ("--reward", f"{tmp_path / 'mine.py'}:slow", "--steps", "5", "--learning-rate", "1e-3")
    program = start("stepwell", *words(*given))
    deadline = time.monotonic() + 120
    while not (tmp_path / "called").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(program.process.pid, signal.SIGINT)
    assert program.wait().returncode == 130
    said = "the same command with --resume continues from there, and `stepwell export` writes its model"
    assert program.stderr == f"stepwell: interrupted; {said}.\n"
    assert len(read_lines(tmp_path / "run" / "metrics.jsonl")) < 5
    assert start("stepwell", *words(*given, "--resume")).wait().returncode == 0
    assert start("stepwell", *words(*given, out="whole")).wait().returncode == 0
    for name in ("metrics.jsonl", "completions.jsonl", "model.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
