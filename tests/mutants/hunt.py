"""Plant mistakes one by one in a copy of the project, run the tests that cover each, and say which were seen.

    python tests/mutants/hunt.py --number 222 --seed 2 --out found.jsonl

Each mistake is tried in a process forked from this one, which has imported what is heavy and nothing of Stepwell.
"""

from __future__ import annotations

import argparse
import compileall
import contextlib
import importlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from queue import Queue

sys.path.insert(0, str(Path(__file__).parents[1]))

import pytest
from mutants.cover import Cover, Recorder
from mutants.draw import draw
from mutants.equivalent import EQUIVALENT
from mutants.plant import Mistake

ROOT = Path(__file__).parents[2]
HEAVY = "scipy.stats torch.utils.data transformers transformers.modeling_utils transformers.models.auto.modeling_auto "
HEAVY += "transformers.models.qwen2.modeling_qwen2 transformers.models.gpt2.modeling_gpt2 peft diffusers hypothesis "
HEAVY += "matplotlib.pyplot sklearn.datasets rich.console tyro jinja2 safetensors.torch tokenizers"
OPTIONS = "-q -x -p no:cacheprovider -p no:xdist --timeout=60 --no-header --tb=line -W ignore".split()
CONTROLS = 5
"""Mistakes whose tests are also run with nothing planted, and have to pass."""
SEEN, MISSED, UNTESTED = "caught", "survived", "untested"


def copied(folder: Path) -> Path:
    """A copy of the project as it stands, without what is built or hidden, compiled once."""
    folder.mkdir(parents=True, exist_ok=True)
    hidden = shutil.ignore_patterns("__pycache__", "mutants", "runs", "*.egg-info", "build", "dist")
    for entry in sorted(ROOT.iterdir()):
        if entry.name.startswith(".") or entry.name == "runs":
            continue
        if entry.is_dir():
            shutil.copytree(entry, folder / entry.name, ignore=hidden)
        else:
            shutil.copy2(entry, folder / entry.name)
    compileall.compile_dir(folder / "src", quiet=1)
    return folder


def forked(copy: Path, log: Path, run: Callable[[], int], limit: float) -> int | None:
    """The exit code of `run` in a process of its own that imports Stepwell from the copy; None where it hangs."""
    child = os.fork()
    if child == 0:
        code = 70
        try:
            os.setsid()
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a program in the background has none
            for stream in (1, 2):
                os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
            os.chdir(copy)
            os.environ |= {"PYTHONPATH": str(copy / "src"), "PYTHONDONTWRITEBYTECODE": "1"}
            sys.dont_write_bytecode = True
            ours = {str(ROOT / "src"), str(ROOT / "tests")}
            sys.path[:] = [str(copy / "src"), *(path for path in sys.path if path not in ours)]
            code = run()
        finally:
            os._exit(code)
    code: int | None = None
    begin = time.monotonic()
    while code is None and time.monotonic() - begin < limit:
        done, status = os.waitpid(child, os.WNOHANG)
        code = None if done == 0 else os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    if code is None:
        os.waitpid(child, 0)
    return code


class Chosen:
    """A plugin of pytest that runs the tests named, in their order, and no others."""

    def __init__(self, tests: Sequence[str]):
        self.tests = tests

    def pytest_collection_modifyitems(self, items):
        found = {item.nodeid: item for item in items}
        items[:] = [found[test] for test in self.tests if test in found]


def recorded(copy: Path, folder: Path) -> None:
    """Make the map of all lines to tests: a pass of the quick tests in two processes."""
    source = copy / "src" / "stepwell"
    files = sorted((copy / "tests").rglob("test_*.py"), key=lambda file: file.stat().st_size)
    hands = [[], ["src/stepwell"]]
    for number, file in enumerate(files):
        hands[number % 2].append(str(file.relative_to(copy)))
    options = [option for option in OPTIONS if option != "-x"]

    def recording(number: int) -> Callable[[], int]:
        return lambda: int(pytest.main([*options, *hands[number]], plugins=[Recorder(included, folder, number)]))

    included = [str(source / "*")]
    with ThreadPoolExecutor(2) as pool:
        passes = [pool.submit(forked, copy, folder / f"map-{n}.log", recording(n), 3600.0) for n in range(2)]
        for made in passes:
            made.result()


@contextlib.contextmanager
def planted(copy: Path, mistake: Mistake) -> Iterator[None]:
    """The mistake stands in the copy for as long as this lasts."""
    file = copy / "src" / "stepwell" / mistake.path
    source, stamp = file.read_text(encoding="utf-8"), file.stat()
    for compiled in file.parent.glob(f"__pycache__/{file.stem}.*"):
        compiled.unlink()
    file.write_text(mistake.planted(source), encoding="utf-8")
    try:
        yield
    finally:
        file.write_text(source, encoding="utf-8")
        os.utime(file, (stamp.st_atime, stamp.st_mtime))


def tried(copy: Path, cover: Cover, mistake: Mistake, seconds: float, log: Path, control: bool = False) -> str:
    """`caught`, `survived`, or `untested` where no quick test comes near the line; of a control, if its tests passed.

    A control runs the same tests with nothing planted.
    """
    tests = cover.chosen(mistake, seconds)
    if not tests:
        return UNTESTED
    files = list(dict.fromkeys(test.split("::")[0] for test in tests))
    expected = sum(cover.seconds[test] for test in tests)
    with contextlib.nullcontext() if control else planted(copy, mistake):
        run = lambda: int(pytest.main([*OPTIONS, *files], plugins=[Chosen(tests)]))  # noqa: E731
        code = forked(copy, log, run, 60 + 4 * expected)
    if control:
        return "control passed" if code == 0 else "control failed"
    return MISSED if code == 0 else SEEN


def hunt(number: int, seed: int, seconds: float, work: Path) -> Iterator[dict[str, object]]:
    """Draw, plant and try; a result for each mistake, with its file, line, before and after."""
    for module in HEAVY.split():
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
    copies = [work / "copy-0", work / "copy-1"]
    for copy in copies:
        if not copy.is_dir():
            copied(copy)
    source = copies[0] / "src" / "stepwell"
    mistakes = draw(source, number, seed, frozenset(EQUIVALENT))
    if not (work / "times-1.json").exists():
        recorded(copies[0], work)
    free: Queue[Path] = Queue()
    for copy in copies:
        free.put(copy)

    def one(mistake: Mistake, control: bool = False) -> dict[str, object]:
        begin, copy = time.monotonic(), free.get()
        log = work / f"{copy.name}.log"
        log.unlink(missing_ok=True)
        outcome = tried(copy, cover, mistake, seconds, log, control)
        last = log.read_text(errors="replace").splitlines()[-3:] if log.exists() and outcome == SEEN else []
        free.put(copy)
        return {"outcome": outcome, **asdict(mistake), "seconds": round(time.monotonic() - begin, 1), "by": last}

    cover = Cover(source, work)
    with ThreadPoolExecutor(len(copies)) as pool:
        controls = mistakes[:: max(len(mistakes) // CONTROLS, 1)]
        yield from pool.map(one, controls, [True] * len(controls))
        yield from pool.map(one, mistakes)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--number", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=20.0, help="of tests for each mistake")
    parser.add_argument("--out", type=Path, required=True, help="a file for the results, a line each")
    parser.add_argument("--work", type=Path, help="a folder for the copies and the map, which are kept")
    given = parser.parse_args(words)
    with contextlib.ExitStack() as stack:
        work = given.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        work.mkdir(parents=True, exist_ok=True)
        with given.out.open("w") as out:
            for result in hunt(given.number, given.seed, given.seconds, work):
                out.write(json.dumps(result) + "\n")
                out.flush()


if __name__ == "__main__":
    main()
