"""The results of a comparison as plain data: every score, curve, cost and setting, in one JSON file."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stepwell.errors import InputError
from stepwell.guarded import reason_of
from stepwell.writing import json_text, write_whole

FILE = "comparison.json"
_VERSION = 1


@dataclass(frozen=True)
class Trial:
    """One method on one seed.

    start, end: the mean reward on each held-out prompt, before and after. curve: the held-out scores at shares of the
    budget on the way, entries with `share`, `step`, `score`, `wall_time` and `cost/<unit>`. history: the training's own
    metrics, an entry a step. cost: all that was spent, by unit, without evaluation. model: the folder of the trained
    process, where it was kept. measures: the task's further numbers of all held-out samples, by name, before and after;
    None where one was not finite.
    """

    seed: int
    start: list[float]
    end: list[float]
    curve: list[dict[str, Any]]
    history: list[dict[str, Any]]
    cost: dict[str, float]
    steps: int
    model: str | None = None
    measures: dict[str, list[float | None]] = field(default_factory=dict)


@dataclass(frozen=True)
class Entry:
    """A method in a comparison: its card, a trial a seed, completions to look at, and its error, if it failed."""

    label: str
    method: str
    options: dict[str, Any]
    card: dict[str, Any]
    trials: list[Trial] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    error: str | None = None

    def has(self, seed: int) -> bool:
        """True where the trial of a seed is done."""
        return any(trial.seed == seed for trial in self.trials)

    def scores(self, which: str, seeds: list[int]) -> NDArray[np.float64]:
        """`start` or `end` scores of the given seeds, (S, P)."""
        by_seed = {trial.seed: trial for trial in self.trials}
        return np.array([getattr(by_seed[seed], which) for seed in seeds])


@dataclass(frozen=True)
class Comparison:
    """A whole comparison.

    task: its name, title, description and unit. made: the time, the machine and the versions. figure: the task's
    picture of all methods' samples, an `<svg>`, or empty.
    """

    task: dict[str, Any]
    budget: str
    budget_unit: str
    seeds: list[int]
    entries: list[Entry]
    settings: dict[str, Any]
    evaluation: dict[str, int]
    made: dict[str, Any]
    figure: str = ""

    @property
    def held_out(self) -> str:
        """The words for the prompts that scores are means over."""
        return "prompts drawn anew" if self.task.get("same_prompts") else "held-out prompts"

    @property
    def work(self) -> str:
        """The units of a network's forward passes (`Process.work`): `tokens`, `latents`, ..."""
        return str(self.task.get("work", "tokens"))

    @property
    def complete(self) -> list[Entry]:
        """The entries that did not fail."""
        return [entry for entry in self.entries if entry.error is None and entry.trials]

    @property
    def errors(self) -> dict[str, str]:
        """The errors of methods that failed, by label."""
        return {entry.label: entry.error for entry in self.entries if entry.error is not None}

    @property
    def shared_seeds(self) -> list[int]:
        """The seeds that every complete entry has finished; only these are compared."""
        done = [{trial.seed for trial in entry.trials} for entry in self.complete]
        return [seed for seed in self.seeds if done and all(seed in seeds for seeds in done)]

    def save(self, folder: str | Path) -> Path:
        """Write comparison.json into the folder, at one stroke."""
        path = Path(folder) / FILE
        write_whole(path, json_text({"version": _VERSION, **asdict(self)}) + "\n")
        return path

    @classmethod
    def load(cls, path: str | Path) -> Comparison:
        """Read what `save` wrote, from the file or its folder; raises `InputError` for any other file."""
        path = Path(path) / FILE if Path(path).is_dir() else Path(path)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content.pop("version") != _VERSION:
                raise InputError(f"'{path}' was written by another version of Stepwell; run the comparison again.")
            entries = [
                Entry(**{**entry, "trials": [Trial(**trial) for trial in entry["trials"]]})
                for entry in content.pop("entries")
            ]
            return cls(entries=entries, **content)
        except OSError as error:
            raise InputError(f"There is no comparison at '{path}': {error.strerror}.") from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise InputError(f"'{path}' holds no comparison ({reason_of(error)}); run the comparison again.") from error
