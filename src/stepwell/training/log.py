"""The log of a run: metrics, times and completions, a line each, and a description of the run.

`metrics.jsonl` holds only numbers that the seed decides, so that an interrupted and resumed run ends with the very same
file; times go to `clock.jsonl`. `run.json` has the method, options, settings and versions. Completions that are images
are drawn side by side in `samples/step-000010.png`, at some steps and the last.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from stepwell.errors import CheckpointError, InputError
from stepwell.figures import pictures
from stepwell.training.trackers import open_tracker
from stepwell.writing import append_lines, json_text, sync_file, sync_folder, writable_folder, write_whole

METRICS, CLOCK, COMPLETIONS, RUN = "metrics.jsonl", "clock.jsonl", "completions.jsonl", "run.json"
SAMPLES = "samples"


class RunLog:
    """The record of one run in a folder (None: nothing is written), and in the trackers asked for.

    `trackers` are any of `tensorboard`, `wandb` and `trackio`; they get every numeric metric, and times under the
    prefix `clock/`. `config` goes to run.json and to the trackers.

    Raises `InputError` where the folder cannot be written, where a tracker is not installed (naming what to install)
    or does not start; `UnknownName` for any other tracker. A tracker that fails later is dropped with a warning: it
    does not end a run.
    """

    def __init__(
        self,
        folder: str | Path | None,
        trackers: Sequence[str] = (),
        name: str | None = None,
        config: Mapping[str, Any] | None = None,
    ):
        self.folder = None if folder is None else writable_folder(folder)
        self.name = name or ("run" if self.folder is None else self.folder.resolve().name)
        self.config = dict(config or {})
        self._trackers = [open_tracker(tracker, self.name, self.folder, self.config) for tracker in trackers]
        self._undrawn: tuple[int, list[Tensor]] | None = None  # the newest images, where their step was not due
        # An earlier run in the folder keeps its run.json until `keep_until` says that this run goes on from it.
        self._earlier = self.folder is not None and bool(read_lines(self.folder / METRICS))
        if not self._earlier:
            self._write_run()

    def step(
        self,
        metrics: Mapping[str, Any],
        clock: Mapping[str, Any] | None = None,
        completions: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """Write a line to metrics.jsonl and clock.jsonl and one a completion to completions.jsonl; then the trackers.

        Completions with a `picture`, an image, are drawn into a file at steps that are due and at evaluations; their
        lines name it.
        """
        if self._earlier:
            raise InputError(f"'{self.folder}' holds a run already; resume it or choose another folder.")
        clock = {"step": metrics["step"]} | dict(clock or {}) if "step" in metrics else dict(clock or {})
        if self.folder is not None:
            completions = self._draw(metrics, completions)
            # metrics come last: a step whose metrics are there is whole
            append_lines(self.folder / COMPLETIONS, [json_text(completion) for completion in completions])
            append_lines(self.folder / CLOCK, [json_text(clock)])
            append_lines(self.folder / METRICS, [json_text(metrics)])
        numbers = numeric(metrics) | numeric({name: value for name, value in clock.items() if name != "step"}, "clock/")
        for tracker in list(self._trackers):
            try:
                tracker.log(numbers, int(metrics.get("step", 0)))
            except Exception as error:
                warnings.warn(f"The tracker {tracker.name} failed and is left out from now on: {error}", stacklevel=2)
                self._trackers.remove(tracker)

    def keep_until(self, lines: int) -> None:
        """Go on after the first `lines` steps: the lines and pictures of later ones are dropped, torn lines too.

        Raises `CheckpointError` where the metrics hold fewer steps than that.
        """
        self._earlier = False
        if self.folder is None:
            return
        steps = {entry.get("step") for entry in check_logged(self.folder, lines)[:lines]}
        named = {entry.get("picture") for entry in read_lines(self.folder / COMPLETIONS) if entry.get("step") in steps}
        _keep(self.folder / METRICS, lambda place, entry: place < lines)
        _keep(self.folder / CLOCK, lambda place, entry: place < lines and entry.get("step") in steps)
        _keep(self.folder / COMPLETIONS, lambda place, entry: entry.get("step") in steps)
        for file in self.folder.glob(f"{SAMPLES}/step-*.png"):
            if f"{SAMPLES}/{file.name}" not in named:
                file.unlink(missing_ok=True)
        self._write_run()

    def sync(self) -> None:
        """Let what was logged survive a loss of power: called before a checkpoint that counts on it."""
        if self.folder is not None:
            for name in (COMPLETIONS, CLOCK, METRICS):
                sync_file(self.folder / name)
            sync_folder(self.folder)

    def _draw(
        self, metrics: Mapping[str, Any], completions: Sequence[Mapping[str, Any]]
    ) -> Sequence[Mapping[str, Any]]:
        """The completions for their lines: without pictures, and with the name of the file that these were drawn in."""
        images = [completion["picture"] for completion in completions if "picture" in completion]
        if not images:
            return completions
        step = int(metrics.get("step", 0))
        due = pictures.due(step) or "evaluation/reward" in metrics
        self._undrawn = None if due else (step, images)
        name = {"picture": self._write_picture(step, images)} if due else {}
        return [
            {key: value for key, value in completion.items() if key != "picture"}
            | (name if "picture" in completion else {})
            for completion in completions
        ]

    def _write_picture(self, step: int, images: Sequence[Tensor]) -> str:
        assert self.folder is not None
        name = f"{SAMPLES}/step-{step:06d}.png"
        writable_folder(self.folder / SAMPLES)
        write_whole(self.folder / name, pictures.png(pictures.grid(images)))
        return name

    def close(self) -> None:
        """Draw the last step's images if they are not drawn yet, and finish the trackers."""
        if self._undrawn is not None:
            try:
                self._write_picture(*self._undrawn)
            except InputError as error:  # an error that ended the run is more important
                warnings.warn(f"The last picture is missing: {error}", stacklevel=2)
            self._undrawn = None
        while self._trackers:
            tracker = self._trackers.pop()
            try:
                tracker.close()
            except Exception as error:
                warnings.warn(f"The tracker {tracker.name} failed while it was closed: {error}", stacklevel=2)

    def _write_run(self) -> None:
        if self.folder is not None:
            content = {"name": self.name, **self.config, "versions": versions()}
            write_whole(self.folder / RUN, json_text(content, indent=2) + "\n")


def versions() -> dict[str, str]:
    """The installed versions of the packages that decide a run's numbers."""
    installed = {}
    for package in ("stepwell", "torch", "transformers", "tokenizers", "peft", "diffusers"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed[package] = importlib.metadata.version(package)
    return installed


def read_lines(path: str | Path) -> list[dict[str, Any]]:
    """The entries of a log's file in order, without lines that are broken; none where the file is missing."""
    return [entry for _, entry in _lines(Path(path))]


def numeric(metrics: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers among metrics; those of a nested entry are named `outer/inner`.

    Example:
        >>> numeric({"step": 1, "seconds": {"rollout": 0.5}, "note": "x"})
        {'step': 1.0, 'seconds/rollout': 0.5}
    """
    numbers: dict[str, float] = {}
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            numbers |= numeric(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            numbers[f"{prefix}{name}"] = float(value)
    return numbers


def _lines(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """The whole lines of a file with their entries; broken ones, which a loss of power may leave anywhere, are left
    out."""
    whole: list[tuple[bytes, dict[str, Any]]] = []
    for line in path.read_bytes().splitlines(keepends=True) if path.is_file() else []:
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if line.endswith(b"\n") and isinstance(entry, dict):
            whole.append((line, entry))
    return whole


def check_logged(folder: Path, steps: int) -> list[dict[str, Any]]:
    """The metrics of a run's first steps, one after another, up to the first that is missing; raises `CheckpointError`
    where they are fewer than `steps`."""
    entries = read_lines(folder / METRICS)
    whole = [entry for number, entry in enumerate(entries, 1) if entry.get("step", number) == number]
    if len(whole) < steps:
        raise CheckpointError(
            f"'{folder / METRICS}' holds {len(whole)} whole steps where the checkpoint has {steps}; "
            "put the file back, or start again in another folder."
        )
    return whole


def _keep(path: Path, wanted: Callable[[int, Mapping[str, Any]], bool]) -> None:
    """Keep the lines for which `wanted(place, entry)`; the file is replaced at one stroke, or made."""
    kept = b"".join(line for place, (line, entry) in enumerate(_lines(path)) if wanted(place, entry))
    if not path.is_file() or kept != path.read_bytes():
        write_whole(path, kept)
