"""The command line: help at once, every method and setting within reach, and what a run leaves behind."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import stepwell
from stepwell import methods
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

PLUGIN = """
from stepwell.methods import method, get

@method("shouting", title="A method of one's own", year=2031, differs="It shouts.")
def shouting(volume: float = 1.0):
    return get("rloo").recipe()
"""
BROKEN = '''
from dataclasses import dataclass
import torch
from stepwell.methods import method
from stepwell.objective.policy import Policy
from stepwell.parts import Part
from stepwell.recipe.recipe import Recipe

@dataclass(frozen=True)
class ByPlace(Part):
    """What no credit may do: depend on where in the batch a row happens to be."""
    def __call__(self, batch):
        return batch.reward * torch.arange(len(batch))

@method("by-place", title="Broken on purpose")
def by_place():
    return Recipe(Policy(ByPlace()))
'''


def python(*words: str, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, **options)


@pytest.fixture
def shown(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """What a command prints, on a wide terminal."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*words: str) -> str:
        capsys.readouterr()
        assert main(list(words)) == 0
        return capsys.readouterr().out

    return run


@pytest.fixture
def plugin(tmp_path: Path):
    path = tmp_path / "mine.py"
    path.write_text(PLUGIN)
    yield str(path)
    methods.forget("shouting")


# help


@pytest.mark.parametrize("words", [["--help"], ["--version"], [], *([name, "--help"] for name in COMMANDS)])
def test_help_needs_neither_torch_nor_transformers(words):
    script = (
        "import sys; from stepwell.cli import main; code = main(sys.argv[1:])\n"
        "heavy = {'torch', 'transformers', 'numpy', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\nsys.exit(code)"
    )
    done = python("-c", script, *words)
    assert done.returncode == 0, done.stderr
    assert done.stdout
    assert done.stderr == ""


def test_help_comes_within_a_second():
    def seconds(word: str) -> float:
        begin = time.monotonic()
        assert python("-m", "stepwell", word).returncode == 0
        return time.monotonic() - begin

    for word in ("--help", "--version"):
        assert min(seconds(word) for _ in range(3)) < 1.0


def test_the_version_is_the_package_s(shown):
    assert shown("--version") == f"stepwell {stepwell.__version__}\n"


@pytest.mark.parametrize("name", list(COMMANDS))
def test_every_argument_of_a_command_is_explained(shown, name, monkeypatch):
    """tyro prints a bare default, or nothing, after an argument whose comment it cannot find."""
    monkeypatch.setenv("COLUMNS", "110")  # so that its boxes are below each other
    printed = " ".join(shown(name, "--help").replace("│", " ").split())
    for argument in argument_names(COMMANDS[name]):
        lines = [line.strip() for line in _source(name) if line.strip().startswith(f"{argument}: ") and "#" in line]
        words = [line.split("#", 1)[1].strip() for line in lines]
        assert words, argument
        assert " ".join(words[0].split()) in printed, argument


def _source(name: str) -> list[str]:
    import inspect

    def lines(kind: type) -> list[str]:
        groups = [entry.default_factory for entry in dataclasses.fields(kind)]
        groups = [group for group in groups if isinstance(group, type) and dataclasses.is_dataclass(group)]
        sources = [inspect.getsource(each) for each in kind.__mro__ if dataclasses.is_dataclass(each)]
        return [*"\n".join(sources).splitlines(), *(line for group in groups for line in lines(group))]

    return lines(COMMANDS[name])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["mehtods"], "There is no command 'mehtods'; did you mean 'methods'?"),
        (["--colour"], "There is no argument '--colour'; known: --help, --version."),
        (["methods", "grpo", "ppo"], "`stepwell methods` does not know what to do with 'ppo'"),
        (["train"], "`stepwell train` needs --model and --data; see `stepwell train --help`."),
        (["train", "--model"], "--model must be followed by a value"),
        (["compare"], "`stepwell compare` needs"),
    ],
)
def test_a_wrong_argument_is_one_sentence(capsys, words, said):
    assert main(words) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


# methods


def test_every_method_is_listed(shown):
    printed = shown("methods")
    assert all(name in printed for name in methods.names())
    listed = json.loads(shown("methods", "--json"))
    assert [card["id"] for card in listed] == methods.names()
    assert listed == json.loads(json.dumps([methods.get(name).as_dict() for name in methods.names()]))


def test_a_search_keeps_the_cards_that_hold_all_words(shown, capsys):
    found = {card["id"] for card in json.loads(shown("methods", "--json", "--search", "Sequence policy"))}
    assert "gspo" in found
    assert "raft" not in found
    assert main(["methods", "--search", "no such thing"]) == 2
    assert "No method's card holds 'no such thing'" in capsys.readouterr().err


def test_a_card_says_all_there_is_to_know(shown):
    printed = shown("methods", "gspo")
    card = methods.get("gspo").as_dict()
    assert f"https://arxiv.org/abs/{card['arxiv']}" in printed
    for words in (card["paper"], str(card["year"]), card["differs"], *card["proof"]):
        assert words in printed
    assert all(f"{name} = {value!r}" in printed for name, value in card["options"].items())
    assert json.loads(shown("methods", "gspo", "--json")) == json.loads(json.dumps(card))


def test_a_plugin_s_method_is_a_method_like_any_other(shown, plugin, capsys):
    assert "shouting" not in methods.names()
    assert "It shouts." in shown("methods", "--plugin", plugin)
    card = json.loads(shown("methods", "shouting", "--json", "--plugin", plugin))
    assert card["options"] == {"volume": 1.0}
    assert card["source"] == plugin
    assert main(["methods", "shuting", "--plugin", plugin]) == 2
    assert "There is no method 'shuting'; did you mean 'shouting'?" in capsys.readouterr().err


@pytest.fixture
def installed(tmp_path: Path) -> Callable[[str], str]:
    """A folder where a package with an entry point is installed, whose module holds the given lines."""

    def install(module: str) -> str:
        (tmp_path / "their_package.py").write_text(module)
        about = tmp_path / "their_package-1.0.dist-info"
        about.mkdir()
        (about / "METADATA").write_text("Metadata-Version: 2.1\nName: their-package\nVersion: 1.0\n")
        (about / "entry_points.txt").write_text("[stepwell.plugins]\ntheirs = their_package\n")
        return str(tmp_path)

    return install


def test_an_installed_package_s_methods_are_found_by_its_entry_point(installed, start):
    done = start("stepwell", "methods", "shouting", "--json", paths=[installed(PLUGIN)]).wait()
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["source"] == "their_package"


def test_an_installed_package_that_fails_is_named(installed, start):
    done = start("stepwell", "methods", paths=[installed("import a_module_that_is_not_there")]).wait()
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "The installed plugin 'theirs' (their_package) failed: No module named" in done.stderr


def test_a_reader_that_leaves_early_is_no_error(start, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    program = start("stepwell", "methods", "--json", stdout=tmp_path / "pipe")
    with (tmp_path / "pipe").open() as reader:
        assert reader.read(1) == "["
    assert (program.wait().returncode, program.stderr) == (0, "")


# checks and tasks


def test_a_method_is_held_to_its_laws(shown):
    printed = shown("check", "grpo", "gspo")
    assert "grpo: law" in printed
    assert "micro-batches" in printed
    assert all(f"oracle {name}" in printed for name in methods.get("gspo").proof)


def test_a_broken_method_fails_its_check(tmp_path, capsys):
    (tmp_path / "broken.py").write_text(BROKEN)
    try:
        assert main(["check", "by-place", "--plugin", str(tmp_path / "broken.py")]) == 2
    finally:
        methods.forget("by-place")
    assert "The method 'by-place' breaks the law 'permutation'" in capsys.readouterr().err


def test_every_task_is_listed(shown):
    from stepwell.tasks.registry import tasks

    printed = shown("tasks")
    assert all(entry.name in printed for entry in tasks())


# train


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
    assert program.stderr == "stepwell: interrupted; the same command with --resume continues from there.\n"
    assert len(read_lines(tmp_path / "run" / "metrics.jsonl")) < 5
    assert start("stepwell", *words(*given, "--resume")).wait().returncode == 0
    assert start("stepwell", *words(*given, out="whole")).wait().returncode == 0
    for name in ("metrics.jsonl", "completions.jsonl", "model.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


# compare and report


TASK = '''
import stepwell as sw
from stepwell.tasks.registry import Task, task
from stepwell.reward.mixing import Rewards
from stepwell.sampling.request import Prompt

def longer(completions, **columns):
    return [float(len(text)) for text in completions]

def fails(completions, **columns):
    raise RuntimeError("no judge")

@task("tiny")
def tiny(symbols: int = 3, broken: bool = False) -> Task:
    """Grow strings of a tabular model."""
    return Task(
        name="tiny",
        title="Tiny",
        description="Grow strings.",
        process=lambda: sw.exact.markov(symbols=symbols, length=4, prompts=6),
        prompts=[Prompt(i, i) for i in range(4)],
        evaluation=[Prompt(i, i) for i in range(4, 6)],
        rewards=Rewards(fails if broken else longer),
        settings={"learning_rate": 0.1, "prompts_per_step": 2, "group_size": 4},
    )
'''


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A task that takes no time, in a plugin, and the words that name it."""
    from stepwell.tasks.registry import forget_task

    monkeypatch.chdir(tmp_path)
    (tmp_path / "task.py").write_text(TASK)
    yield ["compare", "tiny", "--plugin", "task.py", "--budget", "4-steps", "--seeds", "2", "--no-progress"]
    forget_task("tiny")


def test_a_comparison_prints_a_table_and_where_its_page_is(shown, tiny, tmp_path):
    printed = shown(*tiny, "--methods", "grpo,rloo:clip=0.1", "--out", "compared", "--set", "symbols=2", "--keep-runs")
    assert "rloo:clip=0.1" in printed
    assert f"The page is {Path('compared/report.html')}." in printed
    assert (tmp_path / "compared/report.html").stat().st_size > 1000
    about = json.loads((tmp_path / "compared/comparison.json").read_text())
    assert about["task"]["options"] == {"symbols": 2}
    assert about["seeds"] == [0, 1]
    runs = sorted(path.parent for path in (tmp_path / "compared").rglob("metrics.jsonl"))
    assert len(runs) == 4
    assert "The page is page.html." in shown("report", *map(str, runs[:2]), "--out", "page.html")
    assert (tmp_path / "page.html").stat().st_size > 1000
    shown("report", "compared", "--out", "again.html")
    assert (tmp_path / "again.html").read_text() == (tmp_path / "compared/report.html").read_text()


def test_a_comparison_without_a_folder_overwrites_no_other(shown, tiny, tmp_path):
    for _ in range(2):
        shown(*tiny, "--methods", "grpo", "--seeds", "1")
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["compare-tiny", "compare-tiny-2"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--methods", "grpo,gsop"], "There is no method 'gsop'; did you mean 'gspo'?"),
        (["--methods", "gspo:lo=1"], "There is no option of gspo 'lo'; did you mean 'low'?"),
        (
            ["--methods", "grpo", "--set", "symbol=2"],
            "There is no option of task tiny 'symbol'; did you mean 'symbols'?",
        ),
        (["--methods", "grpo", "--setting", "learning_rat=1"], "There is no setting 'learning_rat'; did you mean"),
        (["--methods", "grpo", "--budget", "soon"], "'soon' is no budget"),
        (["--methods", "grpo", "--seeds", "0"], "seeds must be at least one"),
        (["--methods", "grpo,rloo", "--set", "broken=true"], "no judge"),
    ],
)
def test_a_comparison_that_cannot_be_made_is_refused_in_one_line(capsys, tiny, tmp_path, words, said):
    assert main([*tiny, *words]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_an_unknown_task_is_an_error_with_the_nearest_name(capsys, tiny):
    tiny[1] = "tyni"
    assert main([*tiny, "--methods", "grpo"]) == 2
    assert "There is no task 'tyni'; did you mean 'tiny'?" in capsys.readouterr().err


def test_a_report_of_what_is_no_run_is_refused(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for words in ([], ["missing"], ["empty"]):
        assert main(["report", *words]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "report.html").exists()
