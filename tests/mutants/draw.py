"""A draw of mistakes over all rooms: as many for each as its statements weigh, of all kinds, decided by a seed."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

from mutants.plant import Mistake, mistakes

WEIGHTS = {"training": 3.0, "check": 0.5}
"""Rooms whose statements count more or less than others: runs rest on the first, and the second are tests."""


def draw(root: Path, number: int, seed: int, without: frozenset[tuple[str, ...]] = frozenset()) -> list[Mistake]:
    """At least `number` mistakes of the files below `root`, by room; none of `without`, which are keys of mistakes."""
    rooms: dict[str, list[Mistake]] = defaultdict(list)
    statements: dict[str, float] = defaultdict(float)
    for file in sorted(root.rglob("*.py")):
        path = file.relative_to(root).as_posix()
        room = path.split("/")[0].removesuffix(".py")
        nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        statements[room] += WEIGHTS.get(room, 1.0) * sum(isinstance(node, ast.stmt) for node in nodes)
        rooms[room] += [mistake for mistake in mistakes(root, path) if key(mistake) not in without]
    total = sum(statements.values())
    chosen: list[Mistake] = []
    for room in sorted(rooms):
        share = round(number * statements[room] / total)
        chosen += _of_all_kinds(root, rooms[room], max(share, 1), seed)
    return chosen


def key(mistake: Mistake) -> tuple[str, ...]:
    """The names that a mistake is known by, wherever its line stands."""
    return (mistake.path, mistake.text, mistake.before, mistake.after)


def _of_all_kinds(root: Path, candidates: list[Mistake], number: int, seed: int) -> list[Mistake]:
    """The first of every kind come first: numbers are many, and would fill the draw."""
    kinds: dict[str, list[Mistake]] = defaultdict(list)
    for mistake in sorted(candidates, key=lambda mistake: mistake.order(seed)):
        kinds[mistake.kind.split()[0]].append(mistake)
    ranked = [(rank, mistake.order(seed), mistake) for kind in kinds.values() for rank, mistake in enumerate(kind)]
    chosen: list[Mistake] = []
    for _, _, mistake in sorted(ranked, key=lambda entry: entry[:2]):
        if len(chosen) == number:
            break
        if _compiles(mistake.planted((root / mistake.path).read_text(encoding="utf-8"))):
            chosen.append(mistake)
    return chosen


def _compiles(source: str) -> bool:
    try:
        compile(source, "mutant", "exec")
    except SyntaxError:
        return False
    return True
