"""A user's plugin may be several files, and holds tasks as well as methods."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from stepwell import methods
from stepwell.cli import main
from stepwell.tasks.registry import forget_task

TASK = """
import stepwell as sw
from neighbour_of_sums import ones

@sw.task("sums")
def sums() -> sw.Task:
    \"\"\"Says 1 three times.\"\"\"
    from neighbour_of_sums import prompts
    return sw.Task(
        name={name!r}, title="Sums", description="Says 1.", rewards=sw.Rewards(ones), unit="ones",
        process=lambda: sw.exact.markov(symbols=3, length=3, prompts=4),
        prompts=prompts(range(2)), evaluation=prompts(range(2, 4)),
        settings={{"learning_rate": 0.1, "prompts_per_step": 2, "group_size": 4}},
    )

@sw.method("mine", title="Mine")
def mine():
    return sw.methods.get("rloo").recipe()
"""
NEIGHBOUR = """
import stepwell as sw

def ones(completions):
    return [sum(symbol == 1 for symbol in text) / 3 for text in completions]

def prompts(numbers):
    return [sw.Prompt(number, number) for number in numbers]
"""


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str]]:
    """Writes a plugin and its neighbour into a folder that is not the working one."""
    folder = tmp_path / "mine"
    folder.mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])

    def write(name: str = "sums", neighbour: str = NEIGHBOUR) -> str:
        (folder / "neighbour_of_sums.py").write_text(neighbour)
        (folder / "my_task.py").write_text(TASK.format(name=name))
        return str(folder / "my_task.py")

    yield write
    sys.modules.pop("neighbour_of_sums", None)
    forget_task("sums")
    methods.forget("mine")


def test_a_plugin_imports_its_neighbour_and_compares_on_its_own_task(plugin, capsys):
    words = ["compare", "sums", "--methods", "mine,rloo", "--budget", "3-steps", "--seeds", "1", "--plugin", plugin()]
    assert main([*words, "--out", "compared", "--no-progress"]) == 0
    assert "rloo" in capsys.readouterr().out
    assert Path("compared/report.html").is_file()


def test_a_task_of_another_name_is_refused(plugin, refused):
    line = refused("compare", "sums", "--methods", "rloo", "--plugin", plugin("summs"), "--out", "compared")
    assert "Task.name must be 'sums', the name that the task is registered by, got 'summs'." in line
    assert not Path("compared").exists()


def test_a_neighbour_that_is_no_python_is_an_error_at_the_line_that_imports_it(plugin, refused):
    line = refused("tasks", "--plugin", plugin(neighbour="\n" * 20 + "def f(:"))
    assert "my_task.py' failed at line 3: SyntaxError: invalid syntax" in line
