"""Every example of docs/adding.md runs as a program of its own."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from stepwell import methods
from stepwell.tasks.registry import forget_task

TEXT = (Path(__file__).parents[1] / "docs" / "adding.md").read_text()
EXAMPLES = re.findall(r"<!-- (\w+) -->\n```python\n(.*?)```", TEXT, re.S)


@pytest.fixture(autouse=True)
def registries() -> Iterator[None]:
    """Examples leave no method and no task behind."""
    yield
    methods.forget("tanh-grpo")
    forget_task("ones")


def test_every_section_has_an_example() -> None:
    sections = re.findall(r"^## An? (.+)$", TEXT, re.M)
    assert [name.split()[0] for name in sections] == [name for name, _ in EXAMPLES]
    assert len(EXAMPLES) == 8


@pytest.mark.parametrize(("name", "code"), EXAMPLES, ids=[name for name, _ in EXAMPLES])
def test_an_example_runs(name: str, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(code, f"{name}.py", "exec"), {"__name__": "__main__"})
