"""The command that takes the model out of a run that was stopped: `stepwell export`."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from stepwell.cli.command import Command, Flag, absolute, in_own_file, named
from stepwell.cli.processes.base import kind_of
from stepwell.cli.train import Train
from stepwell.errors import InputError
from stepwell.paths import usable

T = TypeVar("T")


@dataclass(kw_only=True)
class Export(Command):
    """Write the model of a run's newest checkpoint as a folder, also of a run that was stopped or killed."""

    run_folder: Annotated[str, tyro.conf.Positional]  # the folder of a run of `stepwell train`
    out: str  # the folder for the model
    adapter: Flag = False  # write the adapter alone, not merged into the model

    prints = False

    def folder(self) -> Path | None:
        return absolute(self.out)

    def run(self) -> None:
        self.load_plugins()
        source = usable(self.run_folder, "The run").absolute()
        about = _about(source, self.run_folder)
        from stepwell.training import checkpoint
        from stepwell.training.fingerprint import refuse_another_model
        from stepwell.training.resume import CHECKPOINTS
        from stepwell.writing import writable_folder

        if checkpoint.newest(source / CHECKPOINTS) is None:
            raise InputError(f"'{self.run_folder}' holds no checkpoint, so there is no model to export yet.")
        out = absolute(named(self.out))
        assert out is not None
        if out.is_dir() and any(out.iterdir()):
            raise InputError(f"'{self.out}' holds something already; choose another folder.")
        command = _filled(Train(model=about["model"]), about["command"]["arguments"])
        settings = command.adapter.settings()
        if self.adapter and settings is None:
            raise InputError(f"--adapter must be left out: '{self.run_folder}' has trained the whole model.")
        with _in_folder(about["command"]["folder"]), in_own_file(command.model):
            process: Any = kind_of(command.model, [about["kind"]]).build(command.model, command, settings)

        def filled(folder: Path) -> tuple[Any, int]:
            """The process with the weights of a checkpoint, and the steps that were made."""
            content, groups = checkpoint.read(folder)
            parameters = groups["parameters"]
            valued = any(name.startswith("value_head.") for name in parameters)
            trained = process.with_value_head() if valued else process
            refuse_another_model(folder, content["fingerprint"], trained)
            parameters.fill({name: p for name, p in trained.module.named_parameters() if p.requires_grad})
            return trained, content["position"]["step"]

        found = checkpoint.from_newest(source / CHECKPOINTS, filled, "The checkpoint before it is exported.")
        assert found is not None
        process, step = found
        folder = writable_folder(out)
        if self.adapter:
            process.save(folder, merged=False)
        else:
            process.save(folder)
        self.say(f"The model after {step} steps of '{self.run_folder}' is in {self.out}.")


def _about(source: Path, shown: str) -> dict[str, Any]:
    """The content of run.json, for a run of the command line."""
    from stepwell.training.log import RUN

    try:
        about = json.loads((source / RUN).read_bytes())
    except OSError as error:
        raise InputError(f"'{shown}' is no folder of a run: it holds no {RUN} that can be read.") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"'{shown}/{RUN}' is no JSON that can be read.") from error
    command = about.get("command") if isinstance(about, dict) else None
    kinds = {name: type(value) for name, value in command.items()} if isinstance(command, dict) else {}
    if kinds != {"folder": str, "arguments": dict} or not isinstance(about.get("model"), str):
        raise InputError(
            f"'{shown}' was not made by `stepwell train`, so that its model cannot be built again here; in Python, "
            "sw.train(..., resume=True) with as many steps as it has made writes its model."
        )
    return {"kind": None, **about}


def _filled(group: T, values: Mapping[str, Any]) -> T:
    """The arguments with those values that have a name among them, in the groups inside too."""
    changes: dict[str, Any] = {}
    for entry in fields(group):  # type: ignore[arg-type]
        value = getattr(group, entry.name)
        if is_dataclass(value):
            changes[entry.name] = _filled(value, values)
        elif entry.name in values:
            given = values[entry.name]
            changes[entry.name] = tuple(given) if isinstance(given, list) else given
    return replace(group, **changes)  # type: ignore[type-var]


@contextlib.contextmanager
def _in_folder(folder: str) -> Any:
    """Inside, names without a folder are those of the place that the run was started in, where it is still there."""
    if Path(folder).is_dir():
        with contextlib.chdir(folder):
            yield
    else:
        yield
