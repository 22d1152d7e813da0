"""Every mistake a user can make ends with exit code 2 and one line that says what, where and how to mend it."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stepwell.cli import main
from stepwell.methods import registry

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

    def __init__(self, folder: Path, model: Path, capsys: pytest.CaptureFixture[str]):
        self.folder, self.out, self.model, self.capsys = folder, folder / "run", model, capsys
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

    def refused(self, *words: str) -> str:
        """The one line a command is refused with."""
        self.capsys.readouterr()
        assert main(list(words)) == 2
        shown = self.capsys.readouterr()
        assert shown.err.startswith("stepwell: ")
        assert shown.err.count("\n") == 1
        assert shown.err.endswith((".\n", "?\n"))
        assert "Traceback" not in shown.err + shown.out
        return shown.err

    def whole(self) -> None:
        """Whatever is in the run's folder is whole: JSON that can be read, lines that end, nothing temporary."""
        for path in self.out.rglob("*"):
            assert not path.name.startswith("."), path
            if path.suffix == ".json":
                json.loads(path.read_text())
            if path.suffix == ".jsonl":
                assert all(json.loads(line) for line in path.read_text().splitlines())
                assert path.read_bytes()[-1:] in (b"\n", b"")


@pytest.fixture
def bench(
    tmp_path: Path,
    model_folder: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Bench:
    monkeypatch.chdir(tmp_path)
    return Bench(tmp_path, model_folder("qwen2"), capsys)


def test_the_run_that_the_others_spoil_is_right(bench):
    assert main(bench.words()) == 0
    bench.whole()


# data


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([], ("data.jsonl holds no rows", "at least one prompt is needed")),
        (['{"question": "a"}'], ("data.jsonl has no column 'prompt'", "'question'", "say with column=")),
        (
            ['{"prompt": "a"}', '{"prompt": ""}'],
            ("row 1 (line 2)", "column 'prompt' holds no prompt", "remove the row"),
        ),
        (['{"prompt": "a"}', '{"answer": "a"}'], ("row 1 (line 2)", "column 'prompt'")),
        (['{"prompt": "a"}', '{"prompt": "b"'], ("data.jsonl, line 2 is no JSON", "one object")),
        (['{"prompt": 3}'], ("data.jsonl, row 0", "The prompt 3", "text")),
        (['["a"]'], ("row 0 (line 1)", "of type list")),
    ],
    ids=["empty", "wrong column", "empty prompt", "row without a prompt", "broken JSON", "number", "no object"],
)
def test_bad_data(bench, lines, said):
    bench.write("data.jsonl", *lines)
    line = bench.refused(*bench.words())
    assert all(words in line for words in said)
    assert not bench.out.exists()


def test_missing_data_with_the_nearest_file(bench):
    line = bench.refused(*bench.words("--data", "dat.jsonl"))
    assert "There is no file 'dat.jsonl'; did you mean 'data.jsonl'?" in line
    assert not bench.out.exists()


def test_the_column_of_prompts_has_another_name(bench):
    line = bench.refused(*bench.words("--prompt-column", "promt"))
    assert "no column 'promt'" in line
    assert "did you mean" in line


def test_a_prompt_longer_than_the_model(bench):
    bench.write("data.jsonl", json.dumps({"prompt": "a " * 80, "answer": "a"}))
    line = bench.refused(*bench.words())
    assert "data.jsonl, row 0: The prompt 'a a a" in line
    assert "has 80 tokens; the model has positions for 64" in line
    assert not bench.out.exists()


# rewards


@pytest.mark.parametrize(
    ("reward", "said"),
    [
        ("missing.py:reward", "There is no file 'missing.py'"),
        ("reward.py:reward", "did you mean 'rewards.py'?"),
        ("rewards.py:rewrd", "no function of rewards.py named 'rewrd'; did you mean 'reward'?"),
        ("rewards.py", "There is no reward 'rewards.py'; write your own as file.py:function."),
        ("exact_mach", "There is no reward 'exact_mach'; did you mean 'exact_match'?"),
        ("regular_expression", "needs a pattern"),
        ("regular_expression:(", "'(' is no regular expression"),
        ("rewards.py:calls", "of type int; a function is right"),
    ],
)
def test_a_reward_that_is_not_there(bench, reward, said):
    assert said in bench.refused(*bench.words("--reward", reward))
    assert not bench.out.exists()


@pytest.mark.parametrize(
    ("reward", "said"),
    [
        ("rewards.py:one_number", ("'one_number'", "1", "4")),
        ("rewards.py:text", ("'text'", "type str", "row 0", "a number")),
        ("rewards.py:not_a_number", ("'not_a_number'", "nan", "row 0", "a finite number")),
        ("rewards.py:raises", ("'raises'", "KeyError", "rewards.py, line 15")),
        ("rewards.py:ends", ("'ends'", "SystemExit (3)", "rewards.py, line 18")),
        ("rewards.py:needs_solution", ("'needs_solution'", "'solution'", "answer")),
    ],
)
def test_a_reward_that_returns_nonsense(bench, reward, said):
    line = bench.refused(*bench.words("--reward", reward))
    assert all(words in line for words in said)
    assert not (bench.out / "metrics.jsonl").exists()
    bench.whole()


def test_a_reward_that_fails_later_leaves_a_run_that_goes_on(bench):
    line = bench.refused(*bench.words("--reward", "rewards.py:raises_later", "--steps", "4"))
    assert "'raises_later' raised RuntimeError (the judge is gone)" in line
    bench.whole()
    assert main(bench.words("--reward", "rewards.py:raises_later", "--steps", "4", "--resume")) == 0
    assert len((bench.out / "metrics.jsonl").read_text().splitlines()) == 4


def test_a_reward_file_that_fails_while_it_is_imported(bench):
    bench.write("broken.py", "import math", "x = math.sqrt(-1)", "def reward(completions): return []")
    assert "broken.py failed at line 2" in bench.refused(*bench.words("--reward", "broken.py:reward"))


def test_no_reward_and_too_many_weights(bench):
    words = [word for word in bench.words() if word not in ("--reward", "rewards.py:reward")]
    assert "give --reward my.py:function" in bench.refused(*words)
    line = bench.refused(*bench.words("--reward-weights", "1", "0.5"))
    assert "2 reward weights for 1 functions (reward); one each is right" in line


# methods, options, settings


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (("--method", "gsop"), "There is no method 'gsop'; did you mean 'gspo'?"),
        (("--method", "grpo", "--set", "clp=0.1"), "There is no option of grpo 'clp'; did you mean 'clip'?"),
        (("--method", "grpo", "--set", "clip=wide"), "Option 'clip' of grpo is a number, not 'wide'."),
        (("--set", "clip"), "'clip' has no value; write it as name=value"),
        (("--lerning-rate", "1"), "There is no argument '--lerning-rate'; did you mean '--learning-rate'?"),
        (("--learning-rate", "-1"), "The learning rate is -1.0; a number above 0 is right."),
        (("--steps", "many"), "--steps has a value that does not fit (invalid literal"),
        (("--schedule", "cosin"), "--schedule is 'cosin'; constant, linear, cosine are right."),
        (("--budget", "60"), "'60' is no budget; write 60s"),
        (("--group-size", "0"), "'group_size' is 0; at least 1 is right"),
        (("--top-p", "1.5"), "top_p=1.5 is not above 0 and at most 1"),
        (("--max-new-tokens", "0"), "max_new_tokens=0"),
        (("--minibatches", "5"), "5 minibatches for 2 prompts a step"),
        (("--lora-alpha", "8"), "needs its rank; add --lora-rank"),
        (("--evaluate-every", "2"), "Evaluation needs both --evaluation (what on) and --evaluate-every"),
        (("--trackers", "tensorbord"), "tensorbord"),
        (("--seed", str(2**70)), "'seed' is 1180591620717411303424; a number of 64 bits is right"),
        (("--weight-decay", "nan"), "'weight_decay' is nan; 0 or more is right"),
        (("--max-gradient-norm", "nan"), "'max_gradient_norm' is nan; above 0 is right"),
        (("--rows-at-once", "0"), "'rows_at_once' is 0; at least 1 is right"),
        (("--evaluation-samples", "0"), "'evaluation_samples' is 0; at least 1 is right"),
        (("--completions-logged", "-1"), "'completions_logged' is -1; 0 or more is right"),
        (("--group-size", "1"), "The group size is 1, but GroupCredit compares the samples of a prompt"),
        (("--group-size", "1", "--method", "dpo"), "The group size is 1, but Pairing compares"),
        (("--set", "clip=-0.2"), "clipped at a distance of -0.2 ('low'); 0 or more is right"),
        (("--device", "tpu"), "There is no device 'tpu' here; there is cpu"),
        (("--out", ""), "--out is empty; name a folder"),
    ],
)
def test_an_unknown_or_impossible_argument(bench, changes, said):
    assert said in bench.refused(*bench.words(*changes))
    assert not bench.out.exists()


# models


def test_one_sample_is_enough_for_methods_that_compare_none(bench):
    assert main(bench.words("--group-size", "1", "--method", "reinforce")) == 0


def test_a_model_that_is_not_there(bench):
    assert "is a file; name the folder" in bench.refused(*bench.words("--model", str(bench.model / "config.json")))
    assert "The model has an empty name" in bench.refused(*bench.words("--model", ""))
    assert "There is no model folder './modle'" in bench.refused(*bench.words("--model", "./modle"))
    (bench.folder / "empty").mkdir()
    assert "holds no config.json" in bench.refused(*bench.words("--model", "empty"))
    assert not bench.out.exists()


def test_a_tokenizer_with_neither_padding_nor_end(bench, make_tokenizer):
    shutil.copytree(bench.model, bench.folder / "model", ignore=shutil.ignore_patterns("*token*"))
    make_tokenizer(pad=False, eos=False).save_pretrained(bench.folder / "model")
    line = bench.refused(*bench.words("--model", "model"))
    assert "neither a padding nor an end-of-sequence token; set tokenizer.pad_token" in line
    assert not bench.out.exists()


# the run's folder


def test_a_run_that_is_stopped_before_it_began_leaves_nothing_and_promises_nothing(bench, monkeypatch):
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("stepwell.process.language.language", stop)
    assert main(bench.words()) == 130
    assert bench.capsys.readouterr().err == "stepwell: interrupted.\n"
    assert not bench.out.exists()


def test_the_model_s_own_folder_is_not_written_over(bench):
    before = sorted(path.name for path in bench.model.iterdir())
    assert "would be lost; choose another" in bench.refused(*bench.words("--out", str(bench.model)))
    assert sorted(path.name for path in bench.model.iterdir()) == before


def test_a_file_in_the_place_of_the_folder(bench):
    bench.write("run", "mine")
    for place in ("run", "run/a"):
        line = bench.refused(*bench.words("--out", place))
        assert "'run' is a file where a folder is needed; remove it or choose another folder" in line
    assert bench.out.read_text() == "mine\n"


def test_a_disk_that_is_full_from_the_start(bench, monkeypatch):
    """Root may write anywhere, so the refusal of the file system is played."""

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    assert "There is no space left to write 'run'; free some or choose another" in bench.refused(*bench.words())
    assert not bench.out.exists()


def test_a_disk_that_fills_up_during_the_run(bench, monkeypatch):
    """Files are put in their place by `os.replace`; the third time there is no space left."""
    replace, calls = os.replace, []

    def full(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) >= 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        line = bench.refused(*bench.words("--checkpoint-every", "1"))
    assert "o space left" in line
    assert str(bench.out.name) in line
    bench.whole()


def test_an_earlier_run_is_not_overwritten(bench):
    assert main(bench.words()) == 0
    before = (bench.out / "metrics.jsonl").read_bytes()
    assert "'run' holds a run already; resume it with --resume or choose" in bench.refused(*bench.words())
    assert (bench.out / "metrics.jsonl").read_bytes() == before


def test_nothing_to_resume(bench):
    assert "no checkpoint to resume in 'run'; start the run without --resume" in bench.refused(*bench.words("--resume"))
    words = [word for word in bench.words("--resume") if word not in ("--out", "run")]
    assert "give the run's --out" in bench.refused(*words)
    assert not bench.out.exists()


def test_a_checkpoint_of_another_model_or_method(bench, model_folder):
    assert main(bench.words()) == 0
    before = {path: path.read_bytes() for path in bench.out.rglob("*") if path.is_file()}
    other = str(model_folder("qwen2", hidden_size=48))
    line = bench.refused(*bench.words("--resume", "--steps", "3", "--model", other))
    assert "update-00000002' is of another model; resume with the model it was started with" in line
    line = bench.refused(*bench.words("--resume", "--steps", "3", "--method", "gspo"))
    assert "is of another method; resume with the method and options it was started with" in line
    assert {path: path.read_bytes() for path in bench.out.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("name", ["parameters.safetensors", "state.json", "manifest.json"])
def test_a_truncated_checkpoint(bench, name):
    assert main(bench.words()) == 0
    (newest,) = [path for path in bench.out.rglob(name) if "update-00000002" in str(path)]
    newest.write_bytes(newest.read_bytes()[:-9])
    line = bench.refused(*bench.words("--resume", "--steps", "3"))
    assert name in line
    assert "update-00000002" in line
    assert "to resume from an earlier" in line


# plugins


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["import math", "math.sqrt(-1)"], "mine.py' failed at line 2: ValueError"),
        (["def f(:"], "mine.py' failed at line 1: SyntaxError"),
        (
            [
                "from stepwell.methods import method, get",
                "@method('grpo', title='Mine')",
                "def mine():",
                "    return get('rloo').recipe()",
            ],
            "There is a method 'grpo' already, from stepwell; give yours another id.",
        ),
        (
            [
                "from stepwell.methods import method",
                "@method('mine', title='Mine')",
                "def mine(clip): ...",
            ],
            "Option 'clip' of method 'mine' has no default",
        ),
    ],
    ids=["raises", "syntax", "name taken", "no default"],
)
def test_a_plugin_that_fails(bench, lines, said):
    bench.write("mine.py", *lines)
    before = registry.names()
    assert said in bench.refused(*bench.words("--plugin", "mine.py"))
    assert not bench.out.exists()
    assert registry.names() == before


def test_two_plugins_with_a_method_of_one_name(bench):
    lines = (
        "from stepwell.methods import method, get",
        "@method('mine', title='Mine')",
        "def mine():",
        "    return get('rloo').recipe()",
    )
    bench.write("one.py", *lines)
    bench.write("two.py", *lines)
    try:
        line = bench.refused("methods", "--plugin", "one.py", "--plugin", "two.py")
    finally:
        registry.forget("mine")
    assert f"There is a method 'mine' already, from {bench.folder}/one.py; give yours another id." in line
    assert f"There is no plugin file '{bench.folder}/three.py'" in bench.refused("methods", "--plugin", "three.py")


# as a program of its own


def test_a_process_of_its_own_says_the_same(bench):
    bench.write("data.jsonl", '{"prompt": "a"')
    command = [sys.executable, "-m", "stepwell", *bench.words()]
    done = subprocess.run(command, capture_output=True, text=True, cwd=bench.folder)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "data.jsonl, line 1 is no JSON" in done.stderr
    done = subprocess.run([*command, "--traceback"], capture_output=True, text=True, cwd=bench.folder)
    assert done.returncode == 2
    assert "Traceback" in done.stderr
    assert "data.jsonl, line 1 is no JSON" in done.stderr.splitlines()[-1]


def test_a_failing_reward_writes_one_line_on_standard_error_of_a_process(bench):
    words = bench.words("--reward", "rewards.py:raises_later")
    command = [sys.executable, "-m", "stepwell", *(word for word in words if word != "--no-progress"), "--steps", "4"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=bench.folder)
    assert done.returncode == 2
    assert len(done.stdout.splitlines()) == 2  # the two steps that were made
    assert done.stderr.count("\n") == 1
