"""Tasks are found, not listed, and listing them imports nothing heavy."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import stepwell as sw
import stepwell.tasks
from stepwell.errors import InputError
from stepwell.process.exact.table import markov
from stepwell.reward.mixing import Rewards
from stepwell.reward.verifiers import exact_match
from stepwell.sampling.request import Prompt
from stepwell.tasks.registry import Task, forget_task, get_task, task, tasks


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


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("title", 3, "Task.title must be a text, got 3 (task 'mine')."),
        (
            "prompts",
            [{"prompt": 0}],
            "Task.prompts must be a list of prompts, such as load_prompts(file) gives, got [{",
        ),
        ("evaluation", "test.jsonl", "Task.evaluation must be a list of prompts, such as load_prompts(file) gives"),
        ("process", markov(), "Task.process must be a function that returns a fresh process each time, got <"),
        ("rewards", exact_match, "Task.rewards must be Rewards, as in Rewards(function), got ExactMatch("),
        ("threads", 0, "Task.threads must be a whole number of at least 1, or None, got 0"),
        ("measures", {"size": 3}, "Task.measures must be functions by name, got {'size': 3}"),
        ("figure", "<svg>", "Task.figure must be a function, or None, got '<svg>'"),
        ("same_prompts", "no", "Task.same_prompts must be True or False, got 'no'"),
        ("settings", {"num_generations": 4}, "There is no setting 'num_generations'; did you mean 'group_size'?"),
    ],
)
def test_a_field_of_the_wrong_type_is_refused(field, value, said):
    with pytest.raises(InputError) as error:
        made(**{field: value})
    assert said in str(error.value)


@pytest.fixture
def planted():
    yield lambda build, name="mine": task(name)(build)
    forget_task("mine")


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: made(name="other"), "Task.name must be 'mine', the name that the task is registered by, got 'other'."),
        (lambda: None, "The task 'mine' must return a Task, got a value of type NoneType."),
        (lambda: 1 / 0, "The task 'mine' cannot be built; its function failed at line"),
        (lambda: made(title=3), "Task.title must be a text, got 3"),
    ],
)
def test_a_function_that_builds_no_task_of_its_name_is_refused(planted, build, said):
    planted(build)
    with pytest.raises(InputError) as error:
        get_task("mine")
    assert said in str(error.value)


@pytest.mark.parametrize("name", ["two words", "", 3])
def test_the_name_of_a_task_has_no_spaces(planted, name):
    with pytest.raises(InputError, match="The name of a task must be a text without spaces"):
        planted(made, name)


def test_a_task_is_written_with_public_names_alone():
    assert sw.Task is Task
    assert sw.task is task
