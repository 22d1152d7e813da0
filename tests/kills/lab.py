"""Runs that are killed at any call to the file system, and gone on with until they end."""

from __future__ import annotations

import builtins
import json
import os
import random
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

CALLS = ("replace", "rename", "fsync", "mkdir", "rmdir", "unlink", "truncate")
"""The calls of `os` before and after which a run may be killed; in the middle of a write as well."""

AGAIN = 0.3
"""The share of killed runs that are killed a second time, after they were resumed."""


class Countdown:
    """Kills the process at its n-th place; without one it only counts them."""

    def __init__(self, last: int | None):
        self.last, self.passed = last, 0

    def place(self, halfway: Callable[[], Any] | None = None) -> None:
        self.passed += 1
        if self.passed == self.last:
            if halfway is not None:
                halfway()
            os.kill(os.getpid(), signal.SIGKILL)

    def patch(self) -> None:
        """Put the places into all that this process does with files from now on."""
        for name in CALLS:
            setattr(os, name, self._around(getattr(os, name)))
        plain = builtins.open

        def opened(file: Any, mode: str = "r", *arguments: Any, **keywords: Any) -> Any:
            made = plain(file, mode, *arguments, **keywords)
            return Watched(made, self) if "b" in mode and mode[0] in "wa" else made

        builtins.open = opened  # type: ignore[assignment]

    def _around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def around(*arguments: Any, **keywords: Any) -> Any:
            self.place()
            value = call(*arguments, **keywords)
            self.place()
            return value

        return around


class Watched:
    """A file in the middle of whose writes the process may be killed."""

    def __init__(self, file: Any, countdown: Countdown):
        self._file, self._countdown = file, countdown

    def write(self, data: Any) -> int:
        def half() -> None:
            self._file.write(bytes(data)[: len(data) // 2])
            self._file.flush()

        self._countdown.place(half)
        return self._file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> Watched:
        self._file.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._file.__exit__(*error)


def run(words: Sequence[str], log: Path, last: int | None = None) -> tuple[int, int]:
    """A command in a process of its own, killed at its `last` place: its exit code and the places that it passed."""
    end, begin = os.pipe()
    child = os.fork()
    if child == 0:
        code = 99
        try:
            os.close(end)
            handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(handle, 1)
            os.dup2(handle, 2)
            sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
            from stepwell.cli import main

            countdown = Countdown(last)
            countdown.patch()
            code = main(words)
            os.write(begin, str(countdown.passed).encode())
        except BaseException:
            import traceback

            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(code)
    os.close(begin)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    passed = os.read(end, 20)
    os.close(end)
    return code, int(passed or 0)


def contents(folder: Path) -> dict[str, bytes]:
    """All that a run has to end with, by the name of its file; the times of day are taken out."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if not path.is_file() or hidden or name in ("clock.jsonl", "run.json") or path.name == "manifest.json":
            continue
        found[name] = path.read_bytes()
        if path.name == "state.json":
            state = json.loads(found[name])
            for meter in state["meters"]:
                meter["wall_time"] = 0.0
            found[name] = json.dumps(state).encode()
    json.loads((folder / "run.json").read_text())
    assert not list((folder / "checkpoints").glob(".*")), "nothing half-written stays among the checkpoints"
    return found


def campaign(words: Sequence[str], folder: str, kills: int, seed: int) -> None:
    """Kill runs of a command at `kills` places, go on with each until it ends, and write what went wrong."""
    import torch

    torch.set_num_threads(1)
    os.chdir(folder)
    here, dice, faults, killed = Path(folder), random.Random(seed), [], 0
    code, places = run([*words, "--out", "whole"], here / "whole.log")
    if code:
        faults.append(f"the run that nobody kills: {code}, {(here / 'whole.log').read_text()[-2000:]}")
    else:
        wanted = contents(here / "whole")
        steps = [json.loads(line) for line in wanted["metrics.jsonl"].splitlines()]
        if not all(step["gradient_norm"] > 0 for step in steps):
            faults.append("a step of the whole run teaches nothing, so that weights that are lost would not be seen")
        early = [1, 2, *dice.sample(range(3, places // 4), 2)]  # before the first checkpoint, or in it
        for place in [*early, *dice.sample(range(places // 4, places + 1), kills - len(early))]:
            out, log = f"killed-{place}", here / f"killed-{place}.log"
            history = [run([*words, "--out", out], log, place)[0]]
            if dice.random() < AGAIN:
                history.append(run(_again(words, out), log, dice.randrange(1, places))[0])
            killed += history.count(-signal.SIGKILL)
            history.append(run(_again(words, out), log)[0])
            found = contents(here / out) if history[-1] == 0 else {}
            if history[0] != -signal.SIGKILL or found != wanted:
                others = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
                faults.append(f"place {place} of {places}, {history}: {others}, {log.read_text()[-1000:]}")
    (here / "result.json").write_text(json.dumps({"faults": faults, "killed": killed}))


def _again(words: Sequence[str], out: str) -> list[str]:
    """The words that go on with a run, or begin it where nothing was made of it."""
    return [*words, "--out", out, *(["--resume"] if Path(out).is_dir() else [])]
