"""Which quick tests run a line: one pass of the tests under a tracer, and the choice of tests for a mistake."""

from __future__ import annotations

import ast
import json
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
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
        return []

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
        """At most `seconds` of the tests that run the line: those of its own file first, then a few of every file."""
        files: dict[str, list[str]] = defaultdict(list)
        for test in sorted(self.covering(mistake), key=lambda test: (self.seconds[test], test)):
            files[test.split("::")[0]].append(test)
        ordered = sorted(files, key=lambda file: (-_nearness(file, mistake.path), file))
        return list(self._within(seconds, ordered, files))

    def _within(self, seconds: float, ordered: Sequence[str], files: dict[str, list[str]]) -> Iterator[str]:
        spent, rest = 0.0, {file: list(tests) for file, tests in files.items()}
        for share in (0.5, 1.0):  # half of the time for the nearest file, then all files in turns
            turns = ordered[:1] if share < 1 else ordered
            while any(rest[file] for file in turns):
                for file in turns:
                    if not rest[file]:
                        continue
                    test = rest[file].pop(0)
                    spent += self.seconds[test]
                    yield test
                    if spent > share * seconds:
                        break
                if spent > share * seconds:
                    break


def _nearness(test: str, path: str) -> int:
    """3 for the tests named after a file, 2 for doctests in it, 1 for those of its folder, else 0."""
    parts = path.removesuffix(".py").split("/")
    if test == "/".join(["tests", *parts[:-1], f"test_{parts[-1]}.py"]):
        return 3
    if test == f"src/stepwell/{path}":
        return 2
    return int(test.startswith("/".join(["tests", *parts[:-1], ""])))
