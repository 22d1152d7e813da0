"""A run's folder: the content of a checkpoint, how a run goes on from one, and the model at the end."""

from __future__ import annotations

import copy
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stepwell.columns import Columns
from stepwell.errors import CheckpointError, InputError
from stepwell.meter import Cost
from stepwell.paths import usable
from stepwell.process.base import Samples
from stepwell.sampling.record import Drawn
from stepwell.training import checkpoint
from stepwell.training.distribute import World
from stepwell.training.fingerprint import refuse_another
from stepwell.training.log import METRICS, RunLog, check_logged, read_lines
from stepwell.training.state import RunState
from stepwell.trajectories import from_tensors, to_tensors
from stepwell.writing import writable_folder

CHECKPOINTS = "checkpoints"


def prepare(out: str | Path | None, resume: bool) -> Path | None:
    """The run's folder, whole and proven writable; an earlier run in it is an error unless it is resumed.

    A run that was ended before it made a step left nothing to lose: another one may begin in its folder, and one that
    is resumed begins anew.
    """
    if out is None:
        if resume:
            raise InputError("resume needs the folder of the run to go on with; name it with out.")
        return None
    folder = usable(out, "The folder").absolute()  # a user's code may change the working folder
    newest = checkpoint.newest(folder / CHECKPOINTS) if folder.is_dir() else None
    steps = len(read_lines(folder / METRICS))
    if resume and newest is None and steps:
        raise InputError(
            f"'{out}' holds {steps} logged steps and no checkpoint to resume from; start the run in another folder."
        )
    if not resume and (steps or (newest is not None and newest.name != checkpoint.FIRST)):
        raise InputError(f"'{out}' holds a run already; resume it with --resume or choose another folder.")
    if resume and not folder.is_dir():
        raise InputError(f"There is no run to resume in '{out}'; start it without --resume.")
    return writable_folder(out).absolute()


def description(state: RunState, config: Mapping[str, Any] | None) -> dict[str, Any]:
    """The content of run.json, besides the versions."""
    policy = state.models.policy
    return {
        "process": type(policy).__name__,
        "work": policy.work,
        **policy.describe(),
        "parts": state.recipe.parts(),
        "settings": state.settings.as_dict(),
        "threads": torch.get_num_threads(),
        "ranks": state.world.size,
        **(config or {}),
        "fingerprint": state.fingerprint,
    }


def save(state: RunState, meters: list[dict[str, Any]]) -> None:
    """Write a checkpoint of this moment, with the meter of every rank, and drop the oldest beyond `keep`."""
    assert state.out is not None
    at, parent = state.at, state.out / CHECKPOINTS
    content = _content(state, meters)
    groups: dict[str, dict[str, Tensor]] = {
        "parameters": {name: p.detach() for name, p in state.learning.items()},
        "optimiser": checkpoint.optimiser_tensors(state.optimiser),
    }
    if reference := _reference(state):
        groups["reference"] = {name: parameter.detach() for name, parameter in reference.items()}
    if at.drawn is not None:  # in the middle of a rollout's updates
        assert at.targets is not None
        groups["rows"] = to_tensors(at.drawn.trajectories)
        groups["targets"] = _flat(at.targets)
        content["samples"], groups["samples"] = _apart(at.drawn.samples)
        content["prompts"] = at.drawn.trajectories.prompt.tolist()
    checkpoint.write(parent / checkpoint.named(at.update), content, groups)
    checkpoint.prune(parent, state.settings.keep)


def _content(state: RunState, meters: list[dict[str, Any]]) -> dict[str, Any]:
    """Everything in a checkpoint that is no group of tensors; in the middle of a rollout its rows come on top."""
    return {
        "fingerprint": state.fingerprint,
        "position": {name: getattr(state.at, name) for name in PLAIN},
        "learning_rate": state.optimiser.param_groups[0]["lr"],
        "stream": state.stream.state_dict(),
        "planner": state.planner.state_dict(),
        "meters": meters,
    }


PLAIN = ("step", "update", "part", "made", "done", "states", "metrics", "names")
"""The fields of a `Position` that are numbers and texts."""


def forget(folder: Path, log: RunLog) -> None:
    """Remove what a run left in its folder that was ended before it made a step."""
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    if (folder / METRICS).exists():
        log.keep_until(0)


def restore(state: RunState, log: RunLog) -> None:
    """Bring a run to the place of the newest checkpoint in its folder that fits its log, and the log with it.

    A checkpoint that is damaged, or whose steps are not all in the log, is passed over with a warning if there is an
    earlier one. A folder without checkpoints leaves the run at its beginning, with a warning. Raises `CheckpointError`
    where none fits, and for one of another run.
    """
    assert state.out is not None
    parent = state.out / CHECKPOINTS
    form = copy.deepcopy(_content(state, [state.models.policy.meter.state_dict()])) | {"fingerprint": None}
    use = partial(_restore, state, form)
    if checkpoint.from_newest(parent, use, "The run goes on from the checkpoint before it.") is None:
        warnings.warn(f"There is no checkpoint in '{state.out}' yet, so the run begins anew.", stacklevel=2)
    if state.world.is_main:
        log.keep_until(state.at.step)
        state.at.history = read_lines(state.out / METRICS)


def _restore(state: RunState, form: Mapping[str, Any], folder: Path) -> Path:
    """`restore` from a checkpoint whose files are as they were written, by whomever; its folder."""
    content, groups = checkpoint.read(folder)
    checkpoint.check_keys(folder, content, ("fingerprint",))
    refuse_another(folder, content["fingerprint"], state.fingerprint)
    checkpoint.check_form(folder, content, form)
    place, parts = content["position"], state.recipe.epochs * state.recipe.minibatches
    if min(place["step"], place["update"], place["part"], place["made"]) < 0 or place["part"] > parts:
        raise CheckpointError(f"The checkpoint '{folder}' is of no place that a run reaches: {place!s:.120}.")
    check_logged(folder.parents[1], place["step"])
    groups["parameters"].fill(state.learning)
    if reference := _reference(state):
        groups["reference"].fill(reference)
    checkpoint.load_optimiser(state.optimiser, groups["optimiser"])
    for group in state.optimiser.param_groups:
        group["lr"] = content["learning_rate"]
    state.stream.load_state_dict(content["stream"])
    state.planner.load_state_dict(content["planner"])
    state.models.policy.meter.load_state_dict(_own_meter(content["meters"], state.world))
    at = state.at
    for name in PLAIN:
        setattr(at, name, content["position"][name])
    at.names = tuple(at.names)
    at.drawn = at.targets = None  # a later checkpoint, which was passed over, may have left some
    if "rows" in groups:
        prompts = [state.stream.by_id[prompt] for prompt in content["prompts"]]
        samples = _together(content["samples"], groups["samples"])
        if any(groups["rows"].form(name)[1][:1] != (len(prompts),) for name in groups["rows"]):
            raise CheckpointError(f"The rows of the checkpoint '{folder}' are not one for each of its prompts.")
        at.drawn = Drawn(from_tensors(groups["rows"]), samples, prompts)
        at.targets = _nested(groups["targets"], len(prompts), len(state.objective.terms))
    return folder


def export(state: RunState) -> None:
    """Write the trained model into the run's folder, which loads like any model folder."""
    assert state.out is not None
    state.trained.save(state.out)


def _own_meter(meters: list[dict[str, Any]], world: World) -> dict[str, Any]:
    """The amounts that this rank had spent; where there were more or fewer ranks, the first takes all."""
    if len(meters) == world.size:
        return meters[world.rank]
    total = sum((Cost(**meter) for meter in meters), start=Cost())
    return asdict(replace(total if world.is_main else Cost(), wall_time=meters[0]["wall_time"]))


def _reference(state: RunState) -> dict[str, nn.Parameter]:
    """The reference's own parameters; none where it shares the policy's (adapters switched off)."""
    reference = state.models.reference
    if reference is None or reference.module is state.models.policy.module:
        return {}
    return dict(reference.module.named_parameters())


def _apart(samples: Samples) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The samples for JSON, and the lists of equal tensors among them, one tensor (N, ...) each: views of one storage,
    which is written once."""
    tensors: dict[str, Tensor] = {}

    def put(name: str, column: list[Any]) -> list[Any]:
        kinds = {(value.shape, value.dtype) if isinstance(value, Tensor) else None for value in column}
        if len(kinds) == 1 and None not in kinds:
            tensors[name] = torch.stack(column)
            return []
        return [value.clone() if isinstance(value, Tensor) else value for value in column]

    columns = {name: put(f"columns/{name}", column) for name, column in samples.columns.items()}
    return {"values": put("values", samples.values), "columns": columns}, tensors


def _together(state: dict[str, Any], tensors: Mapping[str, Tensor]) -> Samples:
    """The samples that `_apart` took to pieces."""

    def get(name: str, column: list[Any]) -> list[Any]:
        return list(tensors[name].unbind(0)) if name in tensors else column

    columns = {name: get(f"columns/{name}", column) for name, column in state["columns"].items()}
    return Samples(get("values", state["values"]), columns)


def _flat(targets: Columns) -> dict[str, Tensor]:
    """The targets by `term/name`."""
    return {f"{term}/{name}": value for term, entry in targets.items() for name, value in entry.items()}


def _nested(flat: Mapping[str, Tensor], count: int, terms: int) -> Columns:
    """The targets that `_flat` took apart; a term without targets has a table without entries."""
    entries: dict[str, dict[str, Tensor]] = {str(term): {} for term in range(terms)}
    for path, value in flat.items():
        term, name = path.split("/", 1)
        entries[term][name] = value
    return Columns({term: Columns(table, count) for term, table in entries.items()}, count)
