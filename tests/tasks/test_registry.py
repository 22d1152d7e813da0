"""Tasks are found, not listed, and listing them imports nothing heavy."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import stepwell.tasks
from stepwell.errors import InputError
from stepwell.process.exact.table import markov
from stepwell.reward.mixing import Rewards
from stepwell.reward.verifiers import exact_match
from stepwell.sampling.request import Prompt
from stepwell.tasks.registry import Task, forget_task, task, tasks


def test_every_file_that_registers_a_task_is_found():
    files = Path(stepwell.tasks.__file__).parent.rglob("*.py")
    written = {
        name for file in files for name in re.findall(r'^@task\("(\w+)"\)', file.read_text(), flags=re.MULTILINE)
    }
    assert written == {entry.name for entry in tasks()}
    assert {"countdown", "digits", "mixture", "tools"} <= written


def test_listing_the_tasks_needs_no_torch():
    script = (
        "import sys\n"
        "from stepwell.tasks.registry import tasks\n"
        "assert len(tasks()) > 3 and all(entry.summary and entry.options for entry in tasks())\n"
        "heavy = {'torch', 'numpy', 'transformers', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def made(**fields):
    prompts = {"prompts": [Prompt(0, 0)], "evaluation": [Prompt(1, 1)]}
    given = {"name": "mine", "title": "Mine", "description": "", "process": markov, "rewards": Rewards(exact_match)}
    return Task(**{**given, **prompts, **fields})


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"prompts": []}, r"Task.prompts must hold at least one prompt, got none \(task 'mine'\)"),
        ({"evaluation": []}, r"Task.evaluation must hold at least one prompt, got none \(task 'mine'\)"),
        (
            {"evaluation": [Prompt(2, 0)]},
            r"no prompt that is trained on, got 0 in both \(task 'mine'\); keep them apart",
        ),
    ],
)
def test_a_task_without_prompts_of_its_own_is_refused(fields, said):
    made(evaluation=[Prompt(2, 0)], same_prompts=True)
    with pytest.raises(InputError, match=said):
        made(**fields)


def test_a_name_is_taken_once():
    with pytest.raises(InputError, match=r"There is a task 'tools' already, from .*tools\.py; rename yours"):

        @task("tools")
        def other() -> Task: ...

    with pytest.raises(InputError, match="Option 'size' of task 'mine' has no default"):

        @task("mine")
        def mine(size) -> Task: ...

    assert "mine" not in {entry.name for entry in tasks()}
    forget_task("mine")
