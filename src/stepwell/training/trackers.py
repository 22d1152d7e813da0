"""Trackers: where metrics are sent besides the files of a run."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from stepwell.errors import InputError, UnknownName
from stepwell.writing import json_text


class Tracker(Protocol):
    """A place that takes the numbers of every step."""

    name: str

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """Take the numbers of a step."""
        ...

    def close(self) -> None:
        """Finish; nothing is logged afterwards."""
        ...


class TensorBoard:
    """Event files in the folder `tensorboard` of the run; a resumed run's later steps take the place of lost ones."""

    name = "tensorboard"

    def __init__(self, name: str, folder: Path | None, config: Mapping[str, Any]):
        self._module = _module("torch.utils.tensorboard", self.name, "'stepwell[tracking]'")
        if folder is None:
            raise InputError("The tracker 'tensorboard' needs a folder to write its files in; name one with out.")
        self._folder, self._config = folder / "tensorboard", config
        self._writer: Any = None

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        if self._writer is None:  # made here because older events are void from the first step that is logged
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
            reason = " ".join(str(error).split())
            raise InputError(f"The tracker '{service}' did not start ({reason}); mend that or leave it out.") from error

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
    """A tracker's module, imported; raises `InputError`, saying how to install it, where it is not there."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(
            f"The tracker '{tracker}' is not installed; install it with `pip install {package}` or leave it out."
        ) from error
