"""The command line: help at once, every method and setting within reach, and what a run leaves behind."""

from __future__ import annotations

import dataclasses
import json
import os
import runpy
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import stepwell
from stepwell import methods
from stepwell.cli import COMMANDS, main
from stepwell.cli.arguments import argument_names

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
    """The mistake: a credit that depends on a row's place in the batch."""
    def __call__(self, batch):
        return batch.reward * torch.arange(len(batch))

@method("by-place", title="Broken on purpose")
def by_place():
    return Recipe(Policy(ByPlace()))
'''


def python(*words: str, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, **options)


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


@pytest.mark.parametrize(("words", "code"), [(["--help"], 0), (["nonsense"], 2)])
def test_the_package_is_a_program_that_ends_with_the_commands_exit_code(words, code, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["stepwell", *words])
    with pytest.raises(SystemExit) as end:
        runpy.run_module("stepwell", run_name="__main__")
    assert end.value.code == code
    assert capsys.readouterr() != ("", "")
