"""Every mistake a user can make ends with exit code 2 and one line that says what, where and how to mend it."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stepwell import methods
from stepwell.cli import main

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


@pytest.fixture
def bench(
    tmp_path: Path,
    model_folder: Callable[..., Path],
    refused: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> Bench:
    monkeypatch.chdir(tmp_path)
    return Bench(tmp_path, model_folder("qwen2"), refused)


def test_the_run_that_the_others_spoil_is_right(bench):
    assert main(bench.words()) == 0
    bench.whole()


# data


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([], ("data.jsonl holds no rows", "at least one prompt is needed")),
        (['{"question": "a"}'], ("data.jsonl has no column 'prompt'", "'question'", "name the one that holds")),
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
        ("regular_expression:(", "RegularExpression.pattern must be a regular expression, got '('"),
        ("rewards.py:calls", "must be a function, got a value of type int"),
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
    assert "--reward must be given, such as my.py:function; see" in bench.refused(*words)
    line = bench.refused(*bench.words("--reward-weights", "1", "0.5"))
    assert "Reward weights must be as many as the functions (reward), got 2 for 1" in line


# methods, options, settings


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (("--method", "gsop"), "There is no method 'gsop'; did you mean 'gspo'?"),
        (("--method", "grpo", "--set", "clp=0.1"), "There is no option of grpo 'clp'; did you mean 'clip'?"),
        (("--method", "grpo", "--set", "clip=wide"), "Option 'clip' of grpo must be a number, got 'wide'."),
        (("--set", "clip"), "'clip' has no value; write it as name=value"),
        (("--lerning-rate", "1"), "There is no argument '--lerning-rate'; did you mean '--learning-rate'?"),
        (("--learning-rate", "-1"), "Settings.learning_rate must be a finite number above 0, got -1.0."),
        (("--steps", "many"), "--steps must be a whole number, got 'many'."),
        (("--schedule", "cosin"), "--schedule must be one of constant, cosine, linear, got 'cosin'."),
        (("--budget", "60"), "'60' is no budget; write 60s"),
        (("--group-size", "0"), "Settings.group_size must be a whole number, at least 1, or None, got 0."),
        (("--top-p", "1.5"), "top_p must be above 0 and at most 1 (off), got 1.5"),
        (("--max-new-tokens", "0"), "max_new_tokens must be a whole number of at least 1, got 0"),
        (("--minibatches", "5"), "Settings.minibatches must be at most the 2 prompts of a step, got 5."),
        (("--lora-alpha", "8"), "--lora-alpha needs --lora-rank, or --lora for a rank of 8."),
        (
            ("--evaluate-every", "2"),
            "--evaluation and --evaluate-every must be given together: prompts, and steps between.",
        ),
        (("--trackers", "tensorbord"), "tensorbord"),
        (("--seed", str(2**70)), "Settings.seed must be a whole number of 64 bits, got 1180591620717411303424."),
        (("--weight-decay", "nan"), "Settings.weight_decay must be a finite number, 0 or more, got nan."),
        (("--max-gradient-norm", "nan"), "Settings.max_gradient_norm must be a number above 0, got nan."),
        (("--rows-at-once", "0"), "Settings.rows_at_once must be a whole number, at least 1, or None, got 0."),
        (("--evaluation-samples", "0"), "Settings.evaluation_samples must be a whole number, at least 1, got 0."),
        (("--completions-logged", "-1"), "Settings.completions_logged must be a whole number, 0 or more, got -1."),
        (
            ("--group-size", "1"),
            "group_size must be at least 2 for GroupCredit, which compares the samples of a prompt, got 1.",
        ),
        (
            ("--group-size", "1", "--method", "dpo"),
            "group_size must be at least 2 for Pairing, which compares the samples of a prompt, got 1.",
        ),
        (("--set", "clip=-0.2"), "Clip.low must be a finite number, 0 or more, got -0.2."),
        (("--device", "tpu"), "There is no device 'tpu' here; there is cpu"),
        (("--out", ""), "--out must name a folder or a file, got an empty name."),
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


def test_a_run_that_is_stopped_before_it_began_leaves_nothing_and_promises_nothing(bench, capsys, monkeypatch):
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("stepwell.process.language.process.language", stop)
    capsys.readouterr()  # what saving the small model printed
    assert main(bench.words()) == 130
    assert capsys.readouterr().err == "stepwell: interrupted.\n"
    assert not bench.out.exists()


def test_the_model_s_own_folder_is_not_written_over(bench):
    before = sorted(path.name for path in bench.model.iterdir())
    assert "which would be overwritten." in bench.refused(*bench.words("--out", str(bench.model)))
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
    assert "resume needs the folder of the run to go on with; name it with out." in bench.refused(*words)
    assert not bench.out.exists()


def test_a_checkpoint_of_another_model_or_method(bench, model_folder):
    assert main(bench.words()) == 0
    before = {path: path.read_bytes() for path in bench.out.rglob("*") if path.is_file()}
    other = str(model_folder("qwen2", hidden_size=48))
    line = bench.refused(*bench.words("--resume", "--steps", "3", "--model", other))
    assert "update-00000002' is of another model; resume with the model it was started with" in line
    line = bench.refused(*bench.words("--resume", "--steps", "3", "--method", "gspo"))
    assert "is of another method; resume with the method and options it was started with" in line
    line = bench.refused(*bench.words("--resume", "--steps", "3", "--compile"))
    assert "update-00000002' is of another process (compiled was false, now true); resume with the process" in line
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
            "There is a method 'grpo' already, from stepwell; give yours another name.",
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
    before = methods.names()
    assert said in bench.refused(*bench.words("--plugin", "mine.py"))
    assert not bench.out.exists()
    assert methods.names() == before


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
        methods.forget("mine")
    assert f"There is a method 'mine' already, from {bench.folder}/one.py; give yours another name." in line
    assert f"There is no plugin file '{bench.folder}/three.py'" in bench.refused("methods", "--plugin", "three.py")


# as a program of its own


def test_a_process_of_its_own_says_the_same(bench, start):
    bench.write("data.jsonl", '{"prompt": "a"')
    done = start("stepwell", *bench.words(), folder=bench.folder).wait()
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "data.jsonl, line 1 is no JSON" in done.stderr
    done = start("stepwell", *bench.words(), "--traceback", folder=bench.folder).wait()
    assert done.returncode == 2
    assert "Traceback" in done.stderr
    assert "data.jsonl, line 1 is no JSON" in done.stderr.splitlines()[-1]


def test_a_failing_reward_writes_one_line_on_standard_error_of_a_process(bench, start):
    words = bench.words("--reward", "rewards.py:raises_later")
    words = [word for word in words if word != "--no-progress"]
    done = start("stepwell", *words, "--steps", "4", folder=bench.folder).wait()
    assert done.returncode == 2
    assert len(done.stdout.splitlines()) == 2  # the two steps that were made
    assert done.stderr.count("\n") == 1


# flows


class FlowBench(Bench):
    """A folder with a user's velocities and networks, some of them wrong (`flow_models.py`)."""

    def __init__(self, folder: Path, refused: Callable[..., str]):
        super().__init__(folder, folder, refused)
        place = Path(__file__).parents[1] / "flow_models.py"
        specification = importlib.util.spec_from_file_location("flow_models", place)
        models = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(models)
        models.write_file(folder)

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


@pytest.fixture
def flows(tmp_path: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> FlowBench:
    monkeypatch.chdir(tmp_path)
    return FlowBench(tmp_path, refused)


def test_the_drawing_and_the_run_that_the_others_spoil_are_right(flows):
    assert main(flows.drawing()) == 0
    assert main(flows.training("--out", "other")) == 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        # the model
        ("--predicts velocty", "predicts must be one of velocity, noise, data, score, got 'velocty'."),
        ("--path liner", "There is no path 'liner'; did you mean 'linear'?"),
        ("--model my.py:not_a_number", "prediction at t = 1 has values that are NaN or infinite"),
        ("--model my.py:narrow", "a tensor of its states' shape, (2, 2), got a tensor of shape (2, 1)."),
        ("--model my.py:a_list", "The network must return a tensor of its states' shape, (2, 2), got a list."),
        ("--model my.py:fails", "my.py failed at line 55: KeyError: 'velocity'."),
        ("--model my.py:three", "'my.py:three' must be called as f(x, t), got a function of (x, t, y)."),
        ("--encode label", "'my.py:velocity' must be called as f(x, t, label), got a function of (x, t)."),
        (
            "--model my.py:network --encode label --prompt 1",
            "'my.py:network' must be called as f(x, t, label), got a function of (x, t).",
        ),
        ("--model my.py:network --shape 3", "my.py failed at line 22: RuntimeError: The size of tensor a (3)"),
        ("--model my.py:velocit", "There is no function of my.py named 'velocit'; did you mean 'velocity'?"),
        ("--model mine.py:velocity", "There is no file 'mine.py'; did you mean 'my.py'?"),
        ("--model my.py", "--model must name a function in its file, as my.py:NAME, got the file 'my.py'."),
        ("--model ours.py", "There is no file 'ours.py'; a model of your own is written as my.py:NAME."),
        ("--model elsewhere", "--model must be a flow, as my.py:NAME or the folder of a pipeline, got 'elsewhere'."),
        ("--shape -", "must take no arguments and return a process; for a function f(x, t) give the --shape"),
        ("--shape 0", "--shape must be sizes of at least 1, got 0."),
        (
            "--model my.py:make --shape - --path ve",
            "--path needs --shape: it describes a function f(x, t) of your own.",
        ),
        (
            "--model my.py:make_nothing --shape -",
            "must return a process, such as flow(f, shape=(2,)), got a value of type NoneType.",
        ),
        ("--model my.py:make_broken --shape -", "steps must be a whole number of at least 1, got 0."),
        ("--model my.py:make --shape - --weights none", "There are no weights in 'none'"),
        ("--model -", "Exactly one of --pipeline, --model and --task must be given, got none of them."),
        ("--task mixture", "Exactly one of --pipeline, --model and --task must be given, got --model and --task."),
        ("--model - --shape - --task mixtre", "There is no task 'mixtre'; did you mean 'mixture'?"),
        ("--model - --shape - --task mixture --set mode=2", "no option of task mixture 'mode'; did you mean 'modes'?"),
        ("--model - --task mixture", "--shape must be left out for a task."),
        ("--set modes=2", "--set needs --task: it sets an option of a task."),
        ("--height 64", "--height must be left out for a model of your own."),
        ("--device cpu", "--device must be left out for a model of your own."),
        # the law
        ("--solver dpmp-2m", "There is no solver 'dpmp-2m'; did you mean 'dpmpp-2m'?"),
        ("--solver mine.json", "The solver 'mine.json' cannot be read: No such file or directory."),
        ("--steps 0", "steps must be a whole number of at least 1, got 0."),
        ("--steps few", "--steps must be a whole number, got 'few'."),
        ("--steps - --times 1 0.5 0.1", "times must end at 0, without noise, got 0.1 as the last, where sigma is 0.1."),
        (
            "--steps - --times 0.5 0",
            "times must start at noise, got 0.5 as the first, where alpha / sigma of the linear path is 1",
        ),
        (
            "--steps - --times 1 0.5 0.7 0",
            "times must fall from 1 (noise) to 0 (data), got 0.5 and then 0.7 in step 1.",
        ),
        ("--steps - --times 1", "times must be at least two, a start and an end, got 1."),
        ("--times 1 0", "--times must be given without a number of steps and without --shift: it is the grid."),
        ("--shift 0", "The factor of a time shift must be positive and finite, got 0.0."),
        ("--level 0.5", "level must be above 0 with noise and 0 without, got 0.5 with noise 'none'."),
        ("--guidance 2", "give `unconditional` to the flow"),
        ("--guidance -1", "guidance must be 0 or more, got -1.0."),
        ("--noise 1", "There is no argument '--noise'"),
        # the prompts
        ("--prompt 3", "--prompt and --data must be left out: this flow is unconditional."),
        (
            "--model my.py:labelled --encode label",
            "--prompt or --data must be given: this flow is conditioned on prompts.",
        ),
        (
            "--model my.py:labelled --encode label --prompt cat",
            "A prompt of this flow must be a whole number, its 'label', got 'cat'.",
        ),
        (
            "--model my.py:labelled --encode label --prompt 1 --data data.jsonl",
            "--prompt and --data must not be given together: both are the prompts.",
        ),
        (
            "--model my.py:labelled --encode label --data data.jsonl",
            "row 0: A prompt of this flow must be a whole number, its 'label', got 'a b c'.",
        ),
        # what is written
        ("--samples 0", "--samples must be a whole number of at least 1, got 0."),
        ("--rows-at-once 0", "--rows-at-once must be a whole number of at least 1, got 0."),
        (f"--seed {2**70}", "--seed must be a whole number of 64 bits, got 1180591620717411303424."),
        ("--format png", "Samples must be images with values from 0 to 1 to be written as png, got shape (2,)"),
        ("--format jpg", "--format must be one of json, npy, png, safetensors, got 'jpg'."),
        ("--out data.jsonl", "'data.jsonl' is a file where a folder is needed"),
        ("--out taken", "'taken' holds files already, which are not overwritten; choose a new or an empty folder."),
    ],
)
def test_a_drawing_that_cannot_be_made(flows, changes, said):
    (flows.folder / "taken").mkdir()
    (flows.folder / "taken" / "samples.npy").write_text("mine")
    before = flows.unchanged()
    assert said in flows.refused(*flows.drawing(*changes.split()))
    assert flows.unchanged() == before
    assert (flows.folder / "taken" / "samples.npy").read_text() == "mine"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            "{'name': 'mine'}",
            "The solver 'mine.json' must be JSON, as `stepwell solvers NAME --save FILE` writes it, got",
        ),
        (
            '["euler"]',
            "must be a JSON object with a name, as `stepwell solvers NAME --save FILE` writes it, got ['euler']",
        ),
        ('{"order": 2}', "must be a JSON object with a name, as `stepwell solvers NAME --save FILE` writes it, got {"),
        ('{"name": "mine", "weight": "half"}', "no setting of a solver 'weight'; did you mean 'weights'?"),
        ('{"name": "mine", "order": 2.5}', "The solver 'mine.json': order must be of type int, got 2.5."),
        ('{"name": "mine", "corrector": "yes"}', "The solver 'mine.json': corrector must be of type bool, got 'yes'."),
        (
            '{"name": "mine", "inner": "half", "order": 2}',
            "The solver 'mine.json': inner must be of type float | None, got 'half'.",
        ),
        ('{"name": "mine", "window": 1}', "The solver 'mine.json': window must be of type tuple[float, float], got 1."),
        (
            '{"name": "mine", "window": [1]}',
            "The solver 'mine.json': window must be of type tuple[float, float], got [1].",
        ),
        ('{"name": "mine", "weights": "haf"}', "no 'weights' of a solver 'haf'; did you mean 'half'?"),
        ('{"name": "mine", "order": 7}', "The solver 'mine.json': Solver 'mine': order must be 1 to 4, got 7."),
        (
            '{"name": "mine", "noise": "tau"}',
            "Solver 'mine': level must be above 0 with noise and 0 without, got 0.0 with noise 'tau'.",
        ),
    ],
)
def test_a_solver_s_file_that_is_none(flows, content, said):
    flows.write("mine.json", content)
    line = flows.refused(*flows.drawing("--solver", "mine.json"))
    assert said in line
    assert "The solver 'mine.json'" in line
    assert not flows.out.exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("solvers eulr", "There is no solver 'eulr'; did you mean 'euler'?"),
        ("solvers --save mine.json", "--save writes one solver; name it"),
        ("solvers euler --save mine.txt", "--save is 'mine.txt'; a name that ends in .json is right"),
        ("solvers euler --save taken.json", "'taken.json' is there already and is not overwritten"),
        ("solvers euler --save nowhere/mine.json", "The folder of 'nowhere/mine.json' is not there"),
    ],
)
def test_a_solver_that_cannot_be_printed_or_saved(flows, words, said):
    flows.write("taken.json", "mine")
    before = flows.unchanged()
    assert said in flows.refused(*words.split())
    assert flows.unchanged() == before


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ("--method grpo", "The method 'grpo' trains language models, and not flows; choose a method for them, such as"),
        ("--method flow-grop", "There is no method 'flow-grop'; did you mean 'flow-grpo'?"),
        ("--model my.py:velocity --shape 2", "Flow has no parameter that can learn; train a network, not a function."),
        ("--model my.py:make_half", "must not be float16, which is too coarse for their updates, got"),
        ("--temperature 0.5", "--temperature must be left out for a model of your own."),
        ("--lora-rank 2", "--lora-rank must be left out for a model of your own."),
        ("--lora", "--lora must be left out for a model of your own."),
        ("--compile", "--compile must be left out for a model of your own."),
        ("--model ./elsewhere", "There is no pipeline folder './elsewhere'."),
        ("--guidance 3", "give `unconditional` to the flow"),
        ("--solver-steps 0", "steps must be a whole number of at least 1, got 0."),
        ("--data taken.jsonl", "taken.jsonl has a column 'truncated', and reward functions are given something else"),
        ("--prompt-column word", "data.jsonl has no column 'word'"),
        ("--method draft-k --reward my.py:right", "Reward 'right' is not differentiable"),
        ("--method draft-k --reward my.py:without_gradient", "Reward 'without_gradient' is not differentiable"),
        ("--method draft-k --reward my.py:in_numpy", "'in_numpy' raised RuntimeError (Can't call numpy() on Tensor"),
        ("--reward my.py:one_number", "Reward 'one_number' must return a list with one number"),
        ("--method draft-k --reward my.py:one_number", "Reward 'one_number' must return a list with one number"),
    ],
)
def test_a_flow_that_cannot_be_trained(flows, changes, said):
    flows.write("taken.jsonl", '{"truncated": 1}')
    assert said in flows.refused(*flows.training(*changes.split()))
    flows.whole()
    assert not (flows.out / "model.safetensors").exists()


def test_weights_of_another_network(flows):
    from safetensors.torch import save_file
    from torch import zeros

    save_file({"correction": zeros(3)}, flows.folder / "model.safetensors")
    line = flows.refused(*flows.drawing("--model", "my.py:make", "--shape", "-", "--weights", "model.safetensors"))
    assert "The weights in 'model.safetensors' are those of another network: " in line
    assert not flows.out.exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ("--pipeline missing/there/is/none", "There is no pipeline folder 'missing/there/is/none'."),
        ("--pipeline empty", "The folder 'empty' holds no model_index.json, so it is not a pipeline of diffusers."),
        ("--pipeline data.jsonl", "The pipeline 'data.jsonl' is a file; name the folder"),
        ("--pipeline  ", "--pipeline must be followed by a value; see `stepwell sample --help`."),
        ("--pipeline other", "StableDiffusion3Pipeline, FluxPipeline, got a OtherPipeline."),
        ("--pipeline code", "comes from 'mine'; code that is not of diffusers or transformers is never run"),
        ("--pipeline other --shape 2", "--shape must be left out for a pipeline."),
    ],
)
def test_a_pipeline_that_is_not_there(flows, changes, said):
    (flows.folder / "empty").mkdir()
    for name, index in (
        ("other", {"_class_name": "OtherPipeline"}),
        ("code", {"_class_name": "StableDiffusionPipeline", "unet": ["mine", "UNet"]}),
    ):
        (flows.folder / name).mkdir()
        flows.write(f"{name}/model_index.json", json.dumps(index))
    before = flows.unchanged()
    assert said in flows.refused("sample", *changes.split(), "--prompt", "a cat", "--out", "run")
    assert flows.unchanged() == before


def test_a_language_model_is_not_trained_or_drawn_from_as_a_flow(bench):
    line = bench.refused(*bench.words("--method", "flow-grpo"))
    assert "The method 'flow-grpo' trains flows, and not language models; choose a method for them, such as" in line
    assert "--height must be left out for a language model." in bench.refused(*bench.words("--height", "64"))
    assert "which is no flow" in bench.refused("sample", "--model", str(bench.model), "--prompt", "a")
    assert not bench.out.exists()
    assert not (bench.folder / "runs").exists()


# what would fail at the first step is refused before it


def test_parameters_that_learn_in_float16(bench):
    line = bench.refused(*bench.words("--dtype", "float16"))
    assert "Parameters that learn must not be float16" in line
    assert "load the model as float32, or train a LoRA adapter" in line
    assert not bench.out.exists()
    assert main(bench.words("--dtype", "float16", "--lora")) == 0


@pytest.mark.parametrize("name", ["prompts", "completions", "truncated", "completion_ids"])
def test_a_column_whose_name_is_taken(bench, name):
    bench.write("data.jsonl", json.dumps({"prompt": "a", "answer": "a", name: 1}))
    line = bench.refused(*bench.words())
    assert f"data.jsonl has a column '{name}', and reward functions are given something else under that name" in line
    assert not bench.out.exists()


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("    return {}['recipe']", "its function failed at line 4: KeyError: 'recipe'"),
        ("    return Recipe(clip=2)", "its function failed at line 4: TypeError"),
        ("    return None", "The method 'mine' must return a Recipe, got NoneType."),
    ],
)
@pytest.mark.parametrize("command", ["train", "check", "methods", "compare"])
def test_a_method_of_one_s_own_that_cannot_be_built(bench, command, body, said):
    head = "from stepwell import Recipe, method", "@method('mine', title='Mine')", "def mine(clip: float = 0.2):"
    bench.write("mine.py", *head, body)
    words = {
        "train": bench.words("--method", "mine"),
        "check": ["check", "mine"],
        "methods": ["methods", "mine"],
        "compare": ["compare", "mixture", "--methods", "mine", "--budget", "1-steps", "--out", "run"],
    }
    try:
        assert said in bench.refused(*words[command], "--plugin", "mine.py")
    finally:
        methods.forget("mine")
    assert not bench.out.exists()
