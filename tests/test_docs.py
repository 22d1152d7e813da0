"""What the README and the docs say is so."""

from __future__ import annotations

import ast
import doctest
import importlib.util
import inspect
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from stepwell import methods

ROOT = Path(__file__).parents[1]


def test_the_examples_of_the_readme_run():
    found = doctest.testfile(str(ROOT / "README.md"), module_relative=False)
    assert found.attempted >= 3
    assert found.failed == 0


@pytest.mark.parametrize("name", ["methods", "solvers"])
def test_a_page_that_is_written_from_the_code_is_what_the_code_says(name):
    spec = importlib.util.spec_from_file_location(f"write_{name}", ROOT / "docs" / f"write_{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (ROOT / "docs" / f"{name}.md").read_text() == module.page(), "run `make docs`"


def test_the_page_of_solvers_has_every_solver_and_explains_every_setting():
    import dataclasses

    from stepwell.solver.table import TABLES, Table

    text = (ROOT / "docs" / "solvers.md").read_text()
    assert all(f"| `{name}` |" in text for name in TABLES)
    explained = text.split("```text")[1]
    assert all(entry.name in explained for entry in dataclasses.fields(Table))


def test_the_readme_names_methods_that_there_are_counts_them_and_only_links_what_is_there():
    text = (ROOT / "README.md").read_text()
    table = text.split("## Methods are data")[1].split("This is all of")[0]
    named = {name for line in table.splitlines() if line.startswith("| `") for name in re.findall(r"`([^`]+)`", line)}
    assert len(named) > 30
    assert named <= set(methods.names())
    assert f"all {len(methods.names())};" in table
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / link).exists(), link


def test_the_page_on_flows_runs_as_one_program():
    text = (ROOT / "docs" / "flows.md").read_text()
    exec(compile("\n".join(re.findall(r"```python\n(.*?)```", text, re.S)), "flows.md", "exec"), {})


def test_the_readmes_method_of_ones_own_is_the_example_and_obeys_the_laws():
    text = (ROOT / "README.md").read_text()
    body = (ROOT / "examples" / "my_method.py").read_text().split("@method", 1)[1]
    assert "@method" + body.rstrip() in text


def test_importing_stepwell_is_light():
    code = (
        "import sys, time; begin = time.perf_counter(); import stepwell; "
        "print(time.perf_counter() - begin, 'torch' in sys.modules)"
    )
    seconds, torch_there = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert torch_there == "False"
    assert float(seconds) < 0.2


def test_an_unknown_public_name_says_what_there_is():
    import stepwell

    with pytest.raises(AttributeError, match="offers"):
        _ = stepwell.nothing_of_the_kind
    assert set(stepwell.__all__) <= set(dir(stepwell))


def test_no_room_has_the_name_of_a_public_function():
    import stepwell

    rooms = {path.stem for path in Path(stepwell.__file__).parent.iterdir()}
    assert not rooms & {name for name in stepwell.__all__ if not inspect.ismodule(getattr(stepwell, name))}


@pytest.mark.filterwarnings("ignore:The environment Strict raised")
def test_the_page_on_chats_runs_as_one_program_and_its_commands_run(tmp_path, monkeypatch):
    from chatty import TEMPLATES, chatty

    from stepwell.cli import main

    described = TEMPLATES["chatml"].replace("t.function.name", "t.function | tojson")
    monkeypatch.chdir(tmp_path)
    chatty("chatml", template=described, positions=1024).save("path/to/a/model")
    text = (ROOT / "docs" / "chats.md").read_text()
    program = "\n".join(re.findall(r"```python\n(.*?)```", text, re.S))
    (tmp_path / "my.py").write_text("\n".join(_definitions(program)))
    exec(compile(program, "chats.md", "exec"), {"__name__": "chats"})
    commands = re.findall(r"```bash\n(.*?)```", text, re.S)
    assert len(commands) == 2
    for command in commands:
        assert main([*shlex.split(command)[1:], "--device", "cpu", "--no-progress"]) == 0


def _definitions(program: str) -> list[str]:
    """The functions, classes and constants of a program, which a user keeps in a file."""
    nodes = ast.parse(program).body
    kept = [node for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    kept += [node for node in nodes if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]).isupper()]
    return [ast.unparse(node) for node in kept]


@pytest.fixture
def as_shown(tmp_path, monkeypatch):
    """The working folder of the pages: a model, prompts and a reward under the names that they use."""
    from conftest import small_model, word_tokenizer

    monkeypatch.chdir(tmp_path)
    small_model("llama").save_pretrained("path/to/a/model")
    word_tokenizer().save_pretrained("path/to/a/model")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a b"}\n')
    (tmp_path / "rewards.py").write_text("def shortest(completions, **_):\n    return [-len(c) for c in completions]\n")
    return tmp_path


USUAL = "--device cpu --no-progress --max-new-tokens 4 --prompts-per-step 1 --group-size 2".split()
"""The words that make a page's command quick."""


def test_the_page_on_models_runs_and_its_command_runs(as_shown):
    from stepwell.cli import main

    text = (ROOT / "docs" / "models.md").read_text()
    exec(compile("\n".join(re.findall(r"```python\n(.*?)```", text, re.S)), "models.md", "exec"), {})
    assert (as_shown / "merged" / "config.json").is_file()
    assert (as_shown / "adapter" / "adapter_config.json").is_file()
    (command,) = re.findall(r"```bash\n(.*?)```", text, re.S)
    assert main([*shlex.split(command)[1:], *USUAL]) == 0


def test_the_commands_of_the_page_on_runs_run_one_after_another(as_shown):
    from stepwell.cli import main
    from stepwell.training.fingerprint import FREE
    from stepwell.training.settings import Settings

    text = (ROOT / "docs" / "runs.md").read_text()
    commands = [shlex.split(command)[1:] for command in re.findall(r"```bash\n(.*?)```", text, re.S)]
    assert [command[0] for command in commands] == ["train", "train", "export"]
    for command in commands:
        assert main([*command, *(USUAL if command[0] == "train" else [])]) == 0
    assert (as_shown / "taken" / "model.safetensors").read_bytes() == (
        as_shown / "runs" / "a" / "model.safetensors"
    ).read_bytes()
    tabled = set(re.findall(r"`(\w+)`", text.partition("| setting | because |")[2].partition("Other versions")[0]))
    in_method = {"prompts_per_step", "group_size", "epochs", "minibatches"}
    assert (tabled & {*Settings.__dataclass_fields__}) - {"schedule"} == FREE - in_method
