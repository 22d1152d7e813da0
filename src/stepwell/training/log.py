"""What a run writes down: metrics, times and completions, a line each, and what the run was made of.

`metrics.jsonl` holds only what the seed decides, so that an interrupted and resumed run ends with the very same file;
times go to `clock.jsonl`. `run.json` says method, options, settings and versions. Completions that are images are drawn
side by side in `samples/step-000010.png`, at some steps and the last.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from stepwell.errors import CheckpointError, InputError, UnknownName
from stepwell.figures import pictures
from stepwell.writing import append_lines, json_text, writable_folder, write_whole

METRICS, CLOCK, COMPLETIONS, RUN = "metrics.jsonl", "clock.jsonl", "completions.jsonl", "run.json"
SAMPLES = "samples"


class RunLog:
    """The record of one run in a folder (None: nothing is written), and in the trackers asked for.

    `trackers` are any of `tensorboard`, `wandb` and `trackio`; they get every numeric metric, and a prefix `clock/`
    before times. `config` goes to run.json and to the trackers.

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
        # An earlier run in the folder keeps its run.json until `keep_until` has said that this run goes on from it.
        self._earlier = self.folder is not None and bool(read_lines(self.folder / METRICS))
        if not self._earlier:
            self._write_run()

    def step(
        self,
        metrics: Mapping[str, Any],
        clock: Mapping[str, Any] | None = None,
        completions: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """One line in metrics.jsonl and in clock.jsonl, one a completion in completions.jsonl; then the trackers.

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
        """Go on after the first `lines` steps: whatever later ones left in the files is dropped, torn lines too.

        Raises `CheckpointError` where the metrics hold fewer steps than that.
        """
        self._earlier = False
        if self.folder is None:
            return
        metrics = read_lines(self.folder / METRICS)
        if len(metrics) < lines:
            raise CheckpointError(
                f"'{self.folder / METRICS}' holds {len(metrics)} steps where its checkpoint has {lines}; "
                "put the file back, or start again in another folder."
            )
        steps = {entry.get("step") for entry in metrics[:lines]}
        named = {entry.get("picture") for entry in read_lines(self.folder / COMPLETIONS) if entry.get("step") in steps}
        _keep(self.folder / METRICS, lambda place, entry: place < lines)
        _keep(self.folder / CLOCK, lambda place, entry: place < lines)
        _keep(self.folder / COMPLETIONS, lambda place, entry: entry.get("step") in steps)
        for file in self.folder.glob(f"{SAMPLES}/step-*.png"):
            if f"{SAMPLES}/{file.name}" not in named:
                file.unlink(missing_ok=True)
        self._write_run()

    def _draw(
        self, metrics: Mapping[str, Any], completions: Sequence[Mapping[str, Any]]
    ) -> Sequence[Mapping[str, Any]]:
        """The completions as their lines say them: the name of the file where a picture was drawn, and no picture."""
        images = [completion["picture"] for completion in completions if "picture" in completion]
        if not images:
            return completions
        step = int(metrics.get("step", 0))
        now = pictures.due(step) or "evaluation/reward" in metrics
        self._undrawn = None if now else (step, images)
        name = {"picture": self._write_picture(step, images)} if now else {}
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
        """Draw the last step's images, where it was not due, and finish the trackers."""
        if self._undrawn is not None:
            try:
                self._write_picture(*self._undrawn)
            except InputError as error:  # what ended the run, if that was an error, is more important
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
    """The installed versions that decide a run's numbers."""
    found = {}
    for package in ("stepwell", "torch", "transformers"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def read_lines(path: str | Path) -> list[dict[str, Any]]:
    """The entries of a log's file in order; none where it is missing, and without a last line that was torn."""
    return [entry for _, entry in _lines(Path(path))]


def numeric(metrics: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers among metrics; those of a nested entry are named `outer/inner`.

    Example:
        >>> numeric({"step": 1, "seconds": {"rollout": 0.5}, "note": "x"})
        {'step': 1.0, 'seconds/rollout': 0.5}
    """
    found: dict[str, float] = {}
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            found |= numeric(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            found[f"{prefix}{name}"] = float(value)
    return found


def _lines(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """Whole lines with what they say, up to the first that is broken."""
    found: list[tuple[bytes, dict[str, Any]]] = []
    for line in path.read_bytes().splitlines(keepends=True) if path.is_file() else []:
        try:
            entry = json.loads(line)
        except ValueError:
            break
        if not line.endswith(b"\n") or not isinstance(entry, dict):
            break
        found.append((line, entry))
    return found


def _keep(path: Path, wanted: Any) -> None:
    """Keep the lines for which `wanted(place, entry)`; the file is replaced at one stroke, or made."""
    kept = b"".join(line for place, (line, entry) in enumerate(_lines(path)) if wanted(place, entry))
    if not path.is_file() or kept != path.read_bytes():
        write_whole(path, kept)


class Tracker(Protocol):
    """Where metrics are sent besides the run's own files."""

    name: str

    def log(self, numbers: Mapping[str, float], step: int) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in the folder `tensorboard` of the run; a resumed run's later steps take the place of lost ones."""

    name = "tensorboard"

    def __init__(self, name: str, folder: Path | None, config: Mapping[str, Any]):
        self._module = _module("torch.utils.tensorboard", self.name, "'stepwell[tracking]'")
        if folder is None:
            raise InputError("The tracker 'tensorboard' writes files into the run's folder; name one with out.")
        self._folder, self._config = folder / "tensorboard", config
        self._writer: Any = None

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        if self._writer is None:  # made here since only the first step tells from where on older events are void
            self._writer = self._module.SummaryWriter(str(self._folder), purge_step=step)
            self._writer.add_text("run", f"```\n{json_text(self._config, indent=2)}\n```", step)
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class Service:
    """`wandb`, or `trackio`, whose interface is the same. A resumed run is a new run there, of the same name."""

    def __init__(self, service: str, name: str, folder: Path | None, config: Mapping[str, Any]):
        self.name = service
        self._module = _module(service, service, service)
        place = {} if folder is None or service != "wandb" else {"dir": str(folder)}
        try:
            self._module.init(project="stepwell", name=name, config=json.loads(json_text(config)), **place)
        except Exception as error:
            said = " ".join(str(error).split())
            raise InputError(f"The tracker '{service}' did not start ({said}); mend that or leave it out.") from error

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        self._module.log(dict(numbers), step=step)

    def close(self) -> None:
        self._module.finish()


TRACKERS = ("tensorboard", "wandb", "trackio")


def open_tracker(tracker: str, name: str, folder: Path | None, config: Mapping[str, Any]) -> Tracker:
    """A tracker by name, ready to log; its package is imported only here."""
    if tracker not in TRACKERS:
        raise UnknownName("tracker", tracker, TRACKERS)
    return TensorBoard(name, folder, config) if tracker == "tensorboard" else Service(tracker, name, folder, config)


def _module(module: str, tracker: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(
            f"The tracker '{tracker}' is not installed; install it with `pip install {package}` or leave it out."
        ) from error
