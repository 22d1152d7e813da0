"""`stepwell compare` and `report`: a table, a page, and one line for what cannot be compared."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stepwell.cli import main

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
        (["--methods", "grpo", "--budget", "soon"], "A budget must be like 60s, 5m, 200-steps"),
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
