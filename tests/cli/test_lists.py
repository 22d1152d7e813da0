"""Lists of methods, solvers and tasks: a line each in any terminal, a search that looks everywhere, and no waiting."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable

import pytest

from stepwell import methods
from stepwell.cli import main
from stepwell.solver.table import TABLES
from stepwell.tasks.registry import tasks


@pytest.fixture
def shown(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """The output of a command in a terminal of some columns, or without one."""

    def run(*words: str, columns: int | None = None) -> str:
        monkeypatch.delenv("COLUMNS", raising=False)
        if columns is not None:
            monkeypatch.setenv("COLUMNS", str(columns))
        capsys.readouterr()
        assert main(list(words)) == 0
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("columns", [40, 60, 80, 140])
def test_a_method_is_one_line_in_a_terminal_of_any_width(shown, columns):
    lines = [line for line in shown("methods", columns=columns).splitlines() if line]
    assert max(map(len, lines)) <= columns
    ids = [line.split()[0] for line in lines]
    assert [ids.count(name) for name in methods.names()] == [1] * len(methods.names())
    assert len(lines) == len(methods.names()) + 2  # and a heading for each kind of process


def test_a_wide_list_advises_when_to_use_a_method_and_a_narrow_one_does_not(shown):
    advice = methods.get("gspo").when
    assert advice in shown("methods", columns=200)
    assert advice[:30] in shown("methods", columns=120)
    assert advice[:30] not in shown("methods", columns=80)


def test_output_that_goes_elsewhere_is_not_cut(shown):
    printed = shown("methods")
    for name in methods.names():
        assert f"{name} " in printed
        assert methods.get(name).when in printed
    assert "…" not in printed
    assert "…" not in shown("solvers") + shown("tasks") + shown("methods", "gspo")


def test_methods_are_grouped_by_kind_and_process(shown):
    printed = shown("methods", columns=80)
    language, flow = printed.index("training of language models ("), printed.index("training of flows (")
    assert language < printed.index("\ngspo ") < flow < printed.index("\nddpo-is ")
    count = sum("flow" in methods.get(name).processes for name in methods.names())
    assert f"training of flows ({count})" in printed


@pytest.mark.parametrize(
    ("words", "id"),
    [
        ("RF++", "reinforce++"),  # an alias
        ("Sequence policy", "gspo"),  # a title
        ("DeepSeekMath", "grpo"),  # a paper
        ("2402.03300", "grpo"),  # its number
        ("noisy judge", "robust-dpo"),  # when to use it
        ("greedy answer", "remax"),  # the difference
        ("IcePop", "tis"),  # the note
    ],
)
def test_a_search_looks_at_everything_that_a_card_says(shown, words, id):
    found = [card["id"] for card in json.loads(shown("methods", "--json", "--search", words))]
    assert id in found
    assert len(found) < 12
    assert all(
        line.split()[0] in found
        for line in shown("methods", "--search", words).splitlines()[1:]
        if line[:8] != "training"
    )


def test_a_card_advises_and_ends_with_its_command(shown):
    printed = shown("methods", "reinforce_plus_plus", columns=80)
    card = methods.get("reinforce++")
    assert " ".join(printed.split()).count(card.when) == 1
    assert "rf++, reinforce-plus-plus" in printed
    assert printed.splitlines()[-1] == card.command
    assert max(len(line) for line in printed.splitlines()[:-1]) <= 80
    assert all(need.words in " ".join(shown("methods", "ppo").split()) for need in methods.get("ppo").needs)


def test_solvers_are_a_line_each_and_tasks_are_wrapped(shown):
    lines = shown("solvers", columns=80).splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(TABLES)
    assert max(map(len, lines)) <= 80
    lines = shown("tasks", columns=80).splitlines()
    assert [line.split()[0] for line in lines[1:] if line[0] != " "] == [entry.name for entry in tasks()]
    assert max(map(len, lines)) <= 80
    assert all(entry.summary in " ".join(" ".join(lines).split()) for entry in tasks())


HEAVY = {"torch", "numpy", "scipy", "sklearn", "matplotlib", "transformers", "diffusers", "accelerate", "PIL", "rich"}
TRAIN = ["train", "--model", "m", "--data", "d.jsonl", "--reward", "numeric", "--method"]


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["methods"], 0),
        (["methods", "--search", "entropy"], 0),
        (["methods", "--json"], 0),
        (["methods", "gspo"], 0),
        (["methods", "flow-grpo"], 0),
        (["methods", "gsop"], 2),
        (["methods", "--colour"], 2),
        ([*TRAIN, "gsop"], 2),
        ([*TRAIN, "gspo", "--set", "lo=1"], 2),
        (["solvers"], 0),
        (["solvers", "unipc-3"], 0),
        (["solvers", "eulr"], 2),
        (["tasks"], 0),
    ],
)
def test_commands_that_load_no_model_import_nothing_heavy(words, code):
    """They answer in the time that Python takes to read our own files: torch alone would take three times as long."""
    script = (
        "import sys; from stepwell.cli import main; code = main(sys.argv[1:])\n"
        f"heavy = {HEAVY!r} & set(sys.modules)\n"
        "assert not heavy, heavy\nsys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True)
    assert done.returncode == code, done.stderr


def test_an_argument_of_another_library_points_to_ours(capsys):
    for flag, ours in (
        ("--num_generations", "--group-size"),
        ("--kl_coef", "--set kl=..."),
        ("--lr", "--learning-rate"),
    ):
        assert main([*TRAIN, "grpo", flag, "4"]) == 2
        assert f"There is no argument '{flag}'; did you mean '{ours}'?" in capsys.readouterr().err
