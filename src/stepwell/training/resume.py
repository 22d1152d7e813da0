"""A run's folder: the content of a checkpoint, how a run goes on from one, and the model at the end."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepwell.columns import Columns
from stepwell.errors import InputError
from stepwell.meter import Cost
from stepwell.process.base import Samples
from stepwell.sampling.record import Drawn
from stepwell.training import checkpoint
from stepwell.training.distribute import World
from stepwell.training.fingerprint import refuse_another
from stepwell.training.log import METRICS, RunLog
from stepwell.training.state import RunState
from stepwell.trajectories import from_tensors, to_tensors
from stepwell.writing import writable_folder

CHECKPOINTS = "checkpoints"


def prepare(out: str | Path | None, resume: bool) -> Path | None:
    """The run's folder, proven writable; an earlier run in it is an error unless it is resumed."""
    if out is None:
        if resume:
            raise InputError("resume needs the folder of the run to go on with; name it with out.")
        return None
    folder = Path(out)
    newest = checkpoint.newest(folder / CHECKPOINTS) if folder.is_dir() else None
    if resume and newest is None:
        raise InputError(f"There is no checkpoint to resume in '{folder}'; start the run without --resume.")
    if not resume and (newest is not None or (folder / METRICS).exists()):
        raise InputError(f"'{folder}' holds a run already; resume it with --resume or choose another folder.")
    return writable_folder(folder)


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
    }


def save(state: RunState, meters: list[dict[str, Any]]) -> None:
    """Write a checkpoint of this moment, with the meter of every rank, and drop the oldest beyond `keep`."""
    assert state.out is not None
    at, parent = state.at, state.out / CHECKPOINTS
    content: dict[str, Any] = {
        "fingerprint": state.fingerprint,
        "position": {name: getattr(at, name) for name in PLAIN},
        "learning_rate": state.optimiser.param_groups[0]["lr"],
        "stream": state.stream.state_dict(),
        "planner": state.planner.state_dict(),
        "meters": meters,
    }
    groups: dict[str, dict[str, Tensor]] = {
        "parameters": {name: p.detach() for name, p in state.learning.items()},
        "optimiser": checkpoint.optimiser_tensors(state.optimiser),
        "reference": _reference(state),
    }
    if at.drawn is not None and at.targets is not None:  # in the middle of a rollout's updates
        groups["rows"] = to_tensors(at.drawn.trajectories)
        groups["targets"] = _flat(at.targets)
        content["samples"], groups["samples"] = _apart(at.drawn.samples)
        content["prompts"] = at.drawn.trajectories.prompt.tolist()
    checkpoint.write(parent / f"update-{at.update:08d}", content, groups)
    checkpoint.prune(parent, state.settings.keep)


PLAIN = ("step", "update", "part", "made", "done", "states", "metrics", "names")
"""The fields of a `Position` that are numbers and texts."""


def restore(state: RunState, log: RunLog) -> None:
    """Bring a run to the place of the newest checkpoint in its folder, and its log with it.

    Raises `CheckpointError` for a checkpoint that is damaged or of another run.
    """
    assert state.out is not None
    folder = checkpoint.newest(state.out / CHECKPOINTS)
    assert folder is not None
    content, groups = checkpoint.read(folder)
    refuse_another(folder, content["fingerprint"], state.fingerprint)
    with torch.no_grad():
        for name, parameter in state.learning.items():
            parameter.copy_(groups["parameters"][name])
        if "reference" in groups:
            for name, parameter in state.models.of("reference").module.named_parameters():
                parameter.copy_(groups["reference"][name])
    checkpoint.load_optimiser(state.optimiser, groups.get("optimiser", {}))
    for group in state.optimiser.param_groups:
        group["lr"] = content["learning_rate"]
    state.stream.load_state_dict(content["stream"])
    state.planner.load_state_dict(content["planner"])
    state.models.policy.meter.load_state_dict(_own_meter(content["meters"], state.world))
    at = state.at
    for name in PLAIN:
        setattr(at, name, content["position"][name])
    at.names = tuple(at.names)
    if "rows" in groups:
        prompts = [state.stream.by_id[prompt] for prompt in content["prompts"]]
        samples = _together(content["samples"], groups.get("samples", {}))
        at.drawn = Drawn(from_tensors(groups["rows"]), samples, prompts)
        at.targets = _nested(groups.get("targets", {}), len(prompts), len(state.objective.terms))
    if state.world.is_main:
        log.keep_until(at.step)
        at.history = [json.loads(line) for line in (state.out / METRICS).read_text().splitlines()]


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


def _reference(state: RunState) -> dict[str, Tensor]:
    """The reference's own parameters; none where it shares the policy's (adapters switched off)."""
    reference = state.models.reference
    if reference is None or reference.module is state.models.policy.module:
        return {}
    return {name: p.detach() for name, p in reference.module.named_parameters()}


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


def _together(state: dict[str, Any], tensors: dict[str, Tensor]) -> Samples:
    """The samples that `_apart` took to pieces."""

    def get(name: str, column: list[Any]) -> list[Any]:
        return list(tensors[name].unbind(0)) if name in tensors else column

    columns = {name: get(f"columns/{name}", column) for name, column in state["columns"].items()}
    return Samples(get("values", state["values"]), columns)


def _flat(targets: Columns) -> dict[str, Tensor]:
    """The targets by `term/name`."""
    return {f"{term}/{name}": value for term, entry in targets.items() for name, value in entry.items()}


def _nested(flat: dict[str, Tensor], count: int, terms: int) -> Columns:
    """The targets that `_flat` took apart; a term without targets has a table without entries."""
    entries: dict[str, dict[str, Tensor]] = {str(term): {} for term in range(terms)}
    for path, value in flat.items():
        term, name = path.split("/", 1)
        entries[term][name] = value
    return Columns({term: Columns(table, count) for term, table in entries.items()}, count)
