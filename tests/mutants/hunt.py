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
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import pytest
from mutants.cover import LINES, Cover, Recorder
from mutants.draw import draw
from mutants.equivalent import EQUIVALENT
from mutants.plant import Mistake

ROOT = Path(__file__).parents[2]
HEAVY = "scipy.stats torch.utils.data transformers transformers.modeling_utils transformers.models.auto.modeling_auto "
HEAVY += "transformers.models.qwen2.modeling_qwen2 transformers.models.gpt2.modeling_gpt2 peft diffusers hypothesis "
HEAVY += "matplotlib.pyplot sklearn.datasets rich.console tyro jinja2 safetensors.torch tokenizers"
OPTIONS = "-q -x -p no:cacheprovider -p no:xdist --timeout=60 --no-header --tb=line -W ignore".split()
SEEN, MISSED, UNTESTED = "caught", "survived", "untested"


def copied(folder: Path) -> Path:
    """A copy of the project as it stands, without what is built or hidden, compiled once."""
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


def recorded(copy: Path, folder: Path, only: Sequence[str] = ()) -> Cover:
    """The map of lines to tests, made by a pass of the quick tests over the copy."""
    source = copy / "src" / "stepwell"

    def run() -> int:
        options = [option for option in OPTIONS if option != "-x"]
        return int(pytest.main([*options, *only], plugins=[Recorder(source, folder)]))

    forked(copy, folder / "map.log", run, 3600.0)
    return Cover(source, folder)


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


def tried(copy: Path, cover: Cover, mistake: Mistake, seconds: float, log: Path) -> str:
    """`caught`, `survived`, or `untested` where no quick test comes near the line."""
    tests = cover.chosen(mistake, seconds)
    if not tests:
        return UNTESTED
    files = list(dict.fromkeys(test.split("::")[0] for test in tests))
    expected = sum(cover.seconds[test] for test in tests)
    with planted(copy, mistake):
        code = forked(copy, log, lambda: int(pytest.main([*OPTIONS, *files], plugins=[Chosen(tests)])), 60 + 4 * expected)
    return MISSED if code == 0 else SEEN


def hunt(number: int, seed: int, seconds: float, work: Path) -> Iterator[dict[str, object]]:
    """Draw, plant and try; a result for each mistake, with its file, line, before and after."""
    for module in HEAVY.split():
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
    copy = work / "copy"
    if not copy.is_dir():
        copied(copy)
    source = copy / "src" / "stepwell"
    cover = Cover(source, work) if (work / LINES).exists() else recorded(copy, work)
    for mistake in draw(source, number, seed, frozenset(EQUIVALENT)):
        begin = time.monotonic()
        log = work / "mutant.log"
        log.unlink(missing_ok=True)
        outcome = tried(copy, cover, mistake, seconds, log)
        last = log.read_text(errors="replace").splitlines()[-3:] if log.exists() and outcome == SEEN else []
        yield {"outcome": outcome, **asdict(mistake), "seconds": round(time.monotonic() - begin, 1), "by": last}


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--number", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=20.0, help="of tests for each mistake")
    parser.add_argument("--out", type=Path, required=True, help="a file for the results, a line each")
    parser.add_argument("--work", type=Path, help="a folder whose copy and map are kept and used again")
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
