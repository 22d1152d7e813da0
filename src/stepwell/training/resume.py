"""A run's folder: what a checkpoint holds, how a run goes on from one, and the model at the end."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stepwell.columns import Columns
from stepwell.errors import CheckpointError, InputError
from stepwell.meter import Cost
from stepwell.process.base import Samples
from stepwell.sampling.record import Drawn
from stepwell.training import checkpoint
from stepwell.training.distribute import World
from stepwell.training.log import RunLog
from stepwell.trajectories import from_tensors, to_tensors
from stepwell.writing import writable_folder

if TYPE_CHECKING:
    from stepwell.training.loop import Trainer


def prepare(out: str | Path | None, resume: bool) -> Path | None:
    """The run's folder, proven writable; an earlier run in it is an error unless it is resumed."""
    if out is None:
        if resume:
            raise InputError("There is nothing to resume without an output folder; give the run's --out.")
        return None
    folder = Path(out)
    found = checkpoint.newest(folder / "checkpoints") if folder.is_dir() else None
    if resume and found is None:
        raise InputError(f"There is no checkpoint to resume in '{folder}'; start the run without --resume.")
    if not resume and (found is not None or (folder / "metrics.jsonl").exists()):
        raise InputError(f"'{folder}' holds a run already; resume it with --resume or choose another folder.")
    return writable_folder(folder)


def description(trainer: Trainer, config: dict[str, Any] | None) -> dict[str, Any]:
    """What run.json says of a run."""
    return {
        "process": type(trainer.process).__name__,
        **trainer.process.describe(),
        "parts": trainer.recipe.parts(),
        "settings": trainer.settings.as_dict(),
        "threads": torch.get_num_threads(),
        "processes": trainer.world.size,
        **(config or {}),
    }


def fingerprint(trainer: Trainer) -> dict[str, Any]:
    """What has to be the same for a checkpoint to fit: the parameters' names and shapes, and the method's parts."""
    shapes = [f"{name}:{tuple(p.shape)}:{p.dtype}" for name, p in _trainable(trainer).items()]
    kept = ("seed", "learning_rate", "schedule", "warmup", "weight_decay", "max_gradient_norm", "precision", "shuffle")
    process, prompts = trainer.process, [(prompt.id, prompt.value) for prompt in trainer.stream.prompts]
    return {
        "model": hashlib.sha256("\n".join(shapes).encode()).hexdigest(),
        "data": hashlib.sha256(repr(prompts).encode()).hexdigest(),
        "process": {"trained": process.describe(), "evaluated": trainer.given.describe()},
        "method": "\n".join(trainer.recipe.parts()),
        "reward": repr((trainer.rewards.names, trainer.rewards.weights)),
        "settings": {name: getattr(trainer.settings, name) for name in kept},
    }


def save(trainer: Trainer, meters: list[dict[str, Any]]) -> None:
    """Write a checkpoint of this moment, with the meter of every process, and drop the oldest beyond `keep`."""
    at, parent = trainer.at, trainer.out / "checkpoints"  # type: ignore[operator]
    state: dict[str, Any] = {
        "fingerprint": fingerprint(trainer),
        "step": at.step,
        "update": at.update,
        "part": at.part,
        "made": at.made,
        "done": trainer.done,
        "learning_rate": trainer.optimiser.param_groups[0]["lr"],
        "states": at.states,
        "metrics": at.metrics,
        "names": list(at.names),
        "stream": trainer.stream.state_dict(),
        "planner": trainer.planner.state_dict(),
        "meters": meters,
    }
    groups: dict[str, dict[str, Tensor]] = {
        "parameters": {name: p.detach() for name, p in _trainable(trainer).items()},
        "optimiser": checkpoint.optimiser_tensors(trainer.optimiser),
        "reference": _reference(trainer),
    }
    if at.drawn is not None and at.targets is not None:  # in the middle of a rollout's updates
        groups["rows"] = to_tensors(at.drawn.trajectories)
        groups["targets"] = _flat(at.targets)
        state["samples"], groups["samples"] = _apart(at.drawn.samples)
        state["prompts"] = at.drawn.trajectories.prompt.tolist()
    checkpoint.write(parent / f"update-{at.update:08d}", state, groups)
    checkpoint.prune(parent, trainer.settings.keep)


def restore(trainer: Trainer, log: RunLog) -> None:
    """Bring a trainer to where the newest checkpoint of its folder stands."""
    folder = checkpoint.newest(trainer.out / "checkpoints")  # type: ignore[operator]
    assert folder is not None
    state, groups = checkpoint.read(folder)
    _refuse_another_run(folder, state["fingerprint"], fingerprint(trainer))
    with torch.no_grad():
        for name, parameter in _trainable(trainer).items():
            parameter.copy_(groups["parameters"][name])
        if "reference" in groups:
            for name, parameter in trainer.models.of("reference").module.named_parameters():
                parameter.copy_(groups["reference"][name])
    checkpoint.load_optimiser(trainer.optimiser, groups.get("optimiser", {}))
    trainer.stream.load_state_dict(state["stream"])
    trainer.planner.load_state_dict(state["planner"])
    trainer.process.meter.load_state_dict(_own_meter(state["meters"], trainer.world))
    at = trainer.at
    at.step, at.update, at.part, at.made = (state[name] for name in ("step", "update", "part", "made"))
    trainer.done = state["done"]
    for group in trainer.optimiser.param_groups:
        group["lr"] = state["learning_rate"]
    at.states, at.metrics, at.names = state["states"], state["metrics"], tuple(state["names"])
    if "rows" in groups:
        by_id = {prompt.id: prompt for prompt in trainer.stream.prompts}
        prompts = [by_id[prompt] for prompt in state["prompts"]]
        samples = _together(state["samples"], groups.get("samples", {}))
        at.drawn = Drawn(from_tensors(groups["rows"]), samples, prompts)
        at.targets = _nested(groups.get("targets", {}), len(prompts), len(trainer.objective.terms))
    trainer.clock = {"begin": time.monotonic()}
    if trainer.world.is_main:
        log.keep_until(at.step)
        lines = (trainer.out / "metrics.jsonl").read_text().splitlines()  # type: ignore[operator]
        at.history = [json.loads(line) for line in lines]


def _refuse_another_run(folder: Path, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    """A checkpoint goes on only with what it was made with; CheckpointError says what differs."""
    for what, started_with in (
        ("model", "the model"),
        ("data", "the prompts"),
        ("process", f"the process ({_different(theirs, ours)})"),
        ("reward", "the rewards and weights"),
        ("method", "the method and options"),
    ):
        if theirs.get(what) != ours[what]:
            raise CheckpointError(
                f"The checkpoint '{folder}' is of another {what}; resume with {started_with} it was started with."
            )
    for name, value in theirs["settings"].items():
        if ours["settings"].get(name) != value:
            raise CheckpointError(
                f"The checkpoint '{folder}' is of a run with {name}={value}, not {ours['settings'].get(name)}; "
                "resume with the settings it was started with."
            )


def _different(theirs: dict[str, Any], ours: dict[str, Any]) -> str:
    """Which entries of `Process.describe` differ, in words."""
    pairs = [(theirs.get("process", {}).get(role, {}), ours["process"][role]) for role in ours["process"]]
    names = {name for before, now in pairs for name in before.keys() | now.keys() if before.get(name) != now.get(name)}
    return ", ".join(name.replace("_", " ") for name in sorted(names))


def export(trainer: Trainer) -> None:
    """The trained model where the user looks for it: the run's folder loads like any model folder."""
    assert trainer.out is not None
    trainer.process.save(trainer.out)


def _own_meter(meters: list[dict[str, Any]], world: World) -> dict[str, Any]:
    """What this process had spent; where there were more or fewer processes, the first takes all."""
    if len(meters) == world.size:
        return meters[world.rank]
    total = sum((Cost(**meter) for meter in meters), start=Cost())
    return asdict(replace(total if world.is_main else Cost(), wall_time=meters[0]["wall_time"]))


def _trainable(trainer: Trainer) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in trainer.process.module.named_parameters() if p.requires_grad}


def _reference(trainer: Trainer) -> dict[str, Tensor]:
    """The reference's own parameters; none where it shares the policy's (adapters switched off)."""
    reference = trainer.models.reference
    if reference is None or reference.module is trainer.process.module:
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
    return {f"{term}/{name}": value for term, entry in targets.items() for name, value in entry.items()}  # type: ignore[union-attr,misc]


def _nested(flat: dict[str, Tensor], count: int, terms: int) -> Columns:
    """The targets that `_flat` took apart; a term without targets has a table without entries."""
    entries: dict[str, dict[str, Tensor]] = {str(term): {} for term in range(terms)}
    for path, value in flat.items():
        term, name = path.split("/", 1)
        entries[term][name] = value
    return Columns({term: Columns(table, count) for term, table in entries.items()}, count)
