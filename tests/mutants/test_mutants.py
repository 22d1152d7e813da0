"""Small mistakes planted all over the sources are seen by the quick tests; the mutator plants what it says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from mutants.draw import WEIGHTS, draw, key
from mutants.equivalent import EQUIVALENT
from mutants.plant import mistakes

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "stepwell"
NUMBER, SEED = 60, 1
CAUGHT = 0.95
"""The least share of the mistakes that has to be caught."""


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_planted_mistakes_are_caught(tmp_path):
    """Each is run against the tests that cover its line; the same tests pass where nothing is planted."""
    out = tmp_path / "found.jsonl"
    words = [f"--number={NUMBER}", f"--seed={SEED}", f"--out={out}", f"--work={tmp_path / 'work'}"]
    program = [sys.executable, os.fspath(Path(__file__).with_name("hunt.py")), *words]
    subprocess.run(program, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    found = [json.loads(line) for line in out.read_text().splitlines()]
    controls = [result for result in found if result["outcome"].startswith("control")]
    assert len(controls) >= 3
    assert {result["outcome"] for result in controls} == {"control passed"}
    planted = [result for result in found if result not in controls]
    missed = [result for result in planted if result["outcome"] != "caught"]
    lines = [f"{r['path']}:{r['line']}: {r['before']!r} -> {r['after']!r} ({r['outcome']})" for r in missed]
    print(*lines, sep="\n")
    assert len(planted) >= NUMBER
    assert {result["path"].split("/")[0] for result in planted} >= {"training", "objective", "process", "solver"}
    assert len(missed) <= (1 - CAUGHT) * len(planted), "\n".join(lines)


@pytest.mark.parametrize(("path", "text", "before", "after"), EQUIVALENT)
def test_what_is_called_equivalent_is_still_there(path, text, before, after):
    """Else a line of another meaning may come to be excused."""
    assert (path, text, before, after) in {key(mistake) for mistake in mistakes(SOURCE, path)}
    assert len(EQUIVALENT[path, text, before, after].split()) >= 5, "a reason is a sentence"


def planted(tmp_path, source, path="room/file.py"):
    (tmp_path / path).parent.mkdir(exist_ok=True)
    (tmp_path / path).write_text(source)
    return [(mistake.kind, mistake.planted(source)) for mistake in mistakes(tmp_path, path)]


@pytest.mark.parametrize(
    ("source", "kind", "changed"),
    [
        ("y = a < b\n", "compare otherwise", "y = (a <= b)\n"),
        ("y = a < b\n", "compare otherwise", "y = (a > b)\n"),
        ("y = 2 * (a + b)\n", "another operator", "y = 2 * ((a - b))\n"),
        ("y = not a\n", "drop the sign", "y = (a)\n"),
        ("y = a and b\n", "and for or", "y = (a or b)\n"),
        ("y = a if c else b\n", "swap the branches", "y = (b if c else a)\n"),
        ("y = x[:, 1]\n", "another number", "y = x[:, 0]\n"),
        ("y = x[1:]\n", "slice later", "y = x[1 + 1:]\n"),
        ("y = x.sum(-1).detach()\n", "leave the call out", "y = x.sum(-1)\n"),
        ("y = x.mean(1)\n", "another function", "y = x.sum(1)\n"),
        ("y = f(a, b)\n", "swap the arguments", "y = f(b, a)\n"),
        ("y = f(a, c=b)\n", "leave c out", "y = f(a)\n"),
        ("def f(x=True):\n    pass\n", "true for false", "def f(x=False):\n    pass\n"),
        ("if a:\n    b()\n", "never", "if False:\n    b()\n"),
        ("if a:\n    b()\n", "drop the statement", "if a:\n    pass\n"),
        ("y += 1\n", "assign only", "y = 1\n"),
        ("def f(x):\n    return x\n", "return nothing", "def f(x):\n    return None\n"),
    ],
)
def test_a_mistake_is_planted_where_it_says(tmp_path, source, kind, changed):
    assert (kind, changed) in planted(tmp_path, source)


@pytest.mark.parametrize(
    "source",
    [
        '"""A text with 1 < 2."""\n',
        'raise InputError(f"must be above {least + 1}")\n',
        "assert x is not None\n",
        "x: Annotated[int, Range(0, 1)]\n",
        'warnings.warn("slow", stacklevel=2)\n',
        "@method('grpo', arxiv=2402)\ndef f(): ...\n",
    ],
)
def test_words_and_types_are_left_alone(tmp_path, source):
    assert planted(tmp_path, source) == []


def test_sizes_in_pictures_are_a_matter_of_taste(tmp_path):
    source = "y = width * 3 if wide else f(x, size=1)\n"
    assert [kind for kind, _ in planted(tmp_path, source, "figures/charts.py")] == ["swap the branches"]
    assert len(planted(tmp_path, source, "objective/bars.py")) > 3


def test_a_draw_stays_as_it_is_where_a_file_changes_elsewhere(tmp_path):
    """Equal changes of equal lines are told apart, and what is excused is not drawn."""
    body = "".join(f"def f{n}(x, y):\n    return x * {n} + y\n\n" for n in range(40))
    (tmp_path / "a.py").write_text(body)
    before = draw(tmp_path, 12, 3)
    (tmp_path / "a.py").write_text("import math\n\n" + body)
    after = draw(tmp_path, 12, 3)
    assert len(before) == 12
    assert [key(mistake) for mistake in before] == [key(mistake) for mistake in after]
    assert [mistake.line + 2 for mistake in before] == [mistake.line for mistake in after]
    assert [key(mistake) for mistake in draw(tmp_path, 12, 4)] != [key(mistake) for mistake in before]
    assert key(before[0]) not in {key(mistake) for mistake in draw(tmp_path, 12, 3, frozenset({key(before[0])}))}


def test_a_draw_is_of_every_room_and_more_of_training():
    drawn = draw(SOURCE, NUMBER, SEED, frozenset(EQUIVALENT))
    rooms = {path.stem for path in SOURCE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert len(drawn) >= NUMBER
    assert {mistake.room for mistake in drawn} >= rooms - {"__init__", "__main__", "tensors"}
    assert WEIGHTS["training"] > 1
    assert len({mistake.kind.split()[0] for mistake in drawn}) > 8
