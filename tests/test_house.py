"""The laws of the house: how files may look at processes, import each other, name things and speak."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "stepwell"
FILES = sorted(SOURCE.rglob("*.py"))
LINES = 400
CONCRETE = {"Flow", "Language", "TabularLanguage", "Conversation", "Turns", "Mixture"}
RIDDLES = re.compile(r"(What|Whether|How|Where|Which)\b")


@functools.cache
def tree_of(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), filename=str(file))


def place(file: Path, node: ast.AST | None = None) -> str:
    """A file, and a line in it, as a person looks for it."""
    line = f":{getattr(node, 'lineno', 0)}" if node is not None else ""
    return f"{file.relative_to(ROOT) if file.is_relative_to(ROOT) else file.name}{line}"


def calls(file: Path, *names: str) -> Iterator[ast.Call]:
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names:
            yield node


# processes


def guessed(files: Iterable[Path]) -> list[str]:
    return [
        place(file, call)
        for file in files
        if file != SOURCE / "process" / "abilities.py"
        for call in calls(file, "getattr", "hasattr")
        if call.args and re.search(r"(^|\.|_)process$", ast.unparse(call.args[0]))
    ]


def test_no_ability_of_a_process_is_guessed_by_name():
    """`getattr(process, ...)` and `hasattr(process, ...)` stand in process/abilities.py alone."""
    assert guessed(FILES) == []


def concrete(files: Iterable[Path]) -> list[str]:
    return [
        place(file, call)
        for file in files
        if not file.is_relative_to(SOURCE / "process")
        for call in calls(file, "isinstance", "issubclass")
        if CONCRETE & {node.id for node in ast.walk(call.args[1]) if isinstance(node, ast.Name)}
    ]


def test_shared_folders_know_no_concrete_process():
    """`isinstance` of a process's class stands in the folder of processes alone; others ask for an ability."""
    assert concrete(FILES) == []


# files


def long(files: Iterable[Path]) -> list[str]:
    return [place(file) for file in files if len(file.read_text(encoding="utf-8").splitlines()) > LINES]


def test_no_file_is_long():
    assert long(FILES) == []


def module_of(file: Path) -> str:
    parts = file.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(file): file for file in FILES}


def imported_by(file: Path) -> set[str]:
    """The modules of ours that a file imports anywhere: at its head, for type checkers, and inside of functions."""
    found = set()
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{place(file, node)} is relative"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in MODULES else f"{node.module}")
    return found & MODULES.keys()


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Strongly connected modules (Tarjan 1972), each circle sorted."""
    number: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(node: str) -> None:
        number[node] = low[node] = len(number)
        stack.append(node)
        for other in sorted(graph[node]):
            if other not in number:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], number[other])
        if low[node] == number[node]:
            part = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(part) > 1 or node in graph[node]:
                found.append(sorted(part))

    for node in sorted(graph):
        if node not in number:
            visit(node)
    return found


def test_files_import_each_other_in_no_circle():
    """Not even for type checkers, or inside of functions."""
    assert circles({module: imported_by(file) for module, file in MODULES.items()}) == []


def test_a_circle_is_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set()}) == [["a", "b", "c"]]
    assert circles({"a": {"a"}}) == [["a"]]
    assert circles({"a": {"b", "c"}, "b": {"d"}, "c": {"d"}, "d": set()}) == []


# names


TWICE: dict[str, str] = {}
"""Public classes that share a name with another, and why."""


def namesakes(files: Iterable[Path]) -> dict[str, list[str]]:
    homes = defaultdict(list)
    for file in files:
        for node in tree_of(file).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                homes[node.name].append(place(file, node))
    return {name: places for name, places in homes.items() if len(places) > 1 and name not in TWICE}


def test_every_public_class_has_a_name_of_its_own():
    assert namesakes(FILES) == {}


@pytest.mark.parametrize("package", ["stepwell", "stepwell.check"])
def test_no_file_or_folder_is_named_as_a_public_function(package):
    """Else the import of the one would put it in the other's place."""
    module = importlib.import_module(package)
    folder = Path(str(module.__file__)).parent
    children = {path.stem for path in folder.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    public = {name for name in module.__all__ if not inspect.ismodule(getattr(module, name))}
    assert children & public == set()


# words


def documented(file: Path) -> Iterator[tuple[ast.AST, str]]:
    """Everything in a file that has a docstring; a text that follows an assignment is one too."""
    tree = tree_of(file)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield node, text
            for before, after in zip(node.body, node.body[1:], strict=False):
                value = after.value if isinstance(after, ast.Expr) else None
                named = isinstance(before, ast.Assign | ast.AnnAssign)
                if named and isinstance(value, ast.Constant) and isinstance(value.value, str):
                    yield after, value.value


def riddles(files: Iterable[Path]) -> list[str]:
    return [place(file, node) for file in files for node, text in documented(file) if RIDDLES.match(text)]


def test_docstrings_say_what_a_thing_is():
    """They begin with a noun or an imperative, never with What, Whether, How, Where or Which."""
    assert riddles(FILES) == []


def unknown_notes(files: Iterable[Path]) -> list[str]:
    return [place(file) for file in files if re.search(r"cards_\w+\.md", file.read_text(encoding="utf-8"))]


def test_nothing_refers_to_notes_that_users_do_not_have():
    assert unknown_notes([*FILES, *(ROOT / "docs").rglob("*.md"), ROOT / "README.md"]) == []


# the laws can be broken


PLANTED = '''
"""What stands here, by cards_flow.md."""

class Flow:
    def steps(self):
        """How many."""
        return getattr(self.process, "steps", 0) if isinstance(self, Flow) else hasattr(process, "steps")

LIMIT = 3
"""Which is the limit."""

class Flow:
    """Another."""
'''


def test_a_planted_file_breaks_every_law(tmp_path):
    file = tmp_path / "planted.py"
    file.write_text(PLANTED + "\n" * LINES)
    assert guessed([file]) == ["planted.py:7", "planted.py:7"]
    assert concrete([file]) == ["planted.py:7"]
    assert long([file]) == ["planted.py"]
    assert namesakes([file]) == {"Flow": ["planted.py:4", "planted.py:12"]}
    assert sorted(riddles([file])) == ["planted.py:0", "planted.py:10", "planted.py:5"]
    assert unknown_notes([file]) == ["planted.py"]
