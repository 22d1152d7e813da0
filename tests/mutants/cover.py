"""Which quick tests run a line: one pass of the tests under a tracer, and the choice of tests for a mistake."""

from __future__ import annotations

import ast
import functools
import itertools
import json
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import coverage
import pytest
from mutants.plant import Mistake

LINES, TIMES = "lines-{}.sqlite", "times-{}.json"
"""The files of a map, a pair for each process that made a part of it."""


class Recorder:
    """A plugin of pytest: lines of some files that each test runs, and the seconds that each test that passed took."""

    def __init__(self, included: Sequence[str], folder: Path, number: int):
        self.folder, self.number, self.seconds, self.failed = folder, number, defaultdict(float), set()
        os.environ["COVERAGE_CORE"] = "ctrace"
        lines = str(folder / LINES.format(number))
        self.tracer = coverage.Coverage(lines, include=list(included), config_file=False, messages=False)

    @pytest.hookimpl(wrapper=True)
    def pytest_collection(self):
        self.tracer.start()  # lines that run while modules are imported belong to no test
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        self.tracer.switch_context(item.nodeid)
        result = yield
        self.tracer.switch_context("")
        return result

    def pytest_runtest_logreport(self, report):
        self.seconds[report.nodeid] += report.duration
        if report.failed or report.skipped:
            self.failed.add(report.nodeid)

    def pytest_sessionfinish(self):
        self.tracer.stop()
        self.tracer.save()
        passed = {test: seconds for test, seconds in self.seconds.items() if test not in self.failed}
        (self.folder / TIMES.format(self.number)).write_text(json.dumps(passed))


class Cover:
    """The map of a pass that was recorded into `folder`, over the files below `source`."""

    def __init__(self, source: Path, folder: Path):
        self.source = source
        self.parts = [coverage.CoverageData(str(folder / LINES.format(number))) for number in range(2)]
        self.seconds: dict[str, float] = {}
        for number, part in enumerate(self.parts):
            part.read()
            self.seconds |= json.loads((folder / TIMES.format(number)).read_text())

    def covering(self, mistake: Mistake) -> list[str]:
        """The tests that run the mistake's line; of a line that is run by an import alone, what stands around it."""
        lines: dict[int, list[str]] = defaultdict(list)
        for part in self.parts:
            for line, tests in part.contexts_by_lineno(str(self.source / mistake.path)).items():
                lines[line] += tests
        for begin, end in self._around(mistake):
            tests = {test for line in range(begin, end + 1) for test in lines[line] if test in self.seconds}
            if tests:
                return sorted(tests)
        folder = f"tests/{mistake.room}/" if "/" in mistake.path else "tests/cli/"  # what programs of their own run
        return sorted(test for test in self.seconds if test.startswith(folder))

    def _around(self, mistake: Mistake) -> Iterator[tuple[int, int]]:
        """Lines from the nearest to the mistake to the whole file: its own, its function's, its class's, the file's."""
        yield mistake.line, mistake.line
        yield mistake.line, mistake.end
        text = (self.source / mistake.path).read_text(encoding="utf-8")
        nodes = [
            (node.lineno, node.end_lineno or node.lineno)
            for node in ast.walk(ast.parse(text))
            if isinstance(node, ast.stmt) and node.lineno <= mistake.line <= (node.end_lineno or 0)
        ]
        yield from sorted(nodes, key=lambda span: span[1] - span[0])
        yield 1, text.count("\n") + 1

    def chosen(self, mistake: Mistake, seconds: float) -> list[str]:
        """At most `seconds` of the tests that run the line.

        Half of the time is for those of its own file, a quarter for those that name what is changed, the rest for all.
        """
        covering, words = self.covering(mistake), _words(mistake)
        named = {test: len(words & self._names(test)) for test in covering}
        near = {test: _nearness(test, mistake.path) for test in covering}
        tiers = [
            [test for test in covering if near[test] == OWN],
            [test for test in covering if named[test] == max(named.values()) > 0],
            [test for test in covering if near[test] or named[test]],
            covering,
        ]
        chosen: dict[str, None] = {}
        spent = 0.0
        for share, tier in zip((0.5, 0.75, 0.85, 1.0), tiers, strict=True):
            for test in self._in_turns(test for test in tier if test not in chosen):
                if spent > share * seconds:
                    break
                spent += self.seconds[test]
                chosen[test] = None
        return list(chosen)

    def _in_turns(self, tests: Iterable[str]) -> Iterator[str]:
        """The tests, the quickest of every file first."""
        files: dict[str, list[str]] = defaultdict(list)
        for test in sorted(tests, key=lambda test: (self.seconds[test], test)):
            files[test.split("::")[0]].append(test)
        for turn in itertools.zip_longest(*files.values()):
            yield from (test for test in turn if test is not None)

    def _names(self, test: str) -> frozenset[str]:
        """The words in a test's own lines; of a doctest none."""
        file, _, rest = test.partition("::")
        if not file.startswith("tests/"):
            return frozenset()
        return _words_of_functions(self.source.parents[1] / file).get(rest.split("[")[0], frozenset())


@functools.cache
def _words_of_functions(file: Path) -> dict[str, frozenset[str]]:
    """The words of every function at the top of a file, by its name."""
    source = file.read_text(encoding="utf-8")
    nodes = (node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef))
    return {node.name: frozenset(re.findall(r"\w+", ast.get_source_segment(source, node) or "")) for node in nodes}


def _words(mistake: Mistake) -> frozenset[str]:
    """The names that a mistake takes away, or else those that it is about."""
    before, after = (frozenset(re.findall(r"[^\W\d]\w+", text)) for text in (mistake.before, mistake.after))
    return (before - after) or before


OWN = 3


def _nearness(test: str, path: str) -> int:
    """`OWN` for the tests named after a file, 2 for doctests in it, 1 for those of its folder, else 0."""
    parts = path.removesuffix(".py").split("/")
    if test == "/".join(["tests", *parts[:-1], f"test_{parts[-1]}.py"]):
        return OWN
    if test == f"src/stepwell/{path}":
        return 2
    return int(test.startswith("/".join(["tests", *parts[:-1], ""])))
