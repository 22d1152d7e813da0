"""The identity of a run: everything that has to be the same for a checkpoint of it to be gone on from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from stepwell.errors import CheckpointError
from stepwell.process.base import Process
from stepwell.recipe.recipe import Recipe
from stepwell.reward.mixing import Rewards
from stepwell.sampling.request import Prompt
from stepwell.training.settings import Settings

SETTINGS = (
    "seed",
    "learning_rate",
    "schedule",
    "warmup",
    "weight_decay",
    "max_gradient_norm",
    "precision",
    "shuffle",
)
"""The settings that decide the numbers of a run; a longer or more often saved run is the same one."""

STARTED_WITH = {
    "model": "the model",
    "data": "the prompts",
    "process": "the process",
    "reward": "the rewards and weights",
    "method": "the method and options",
}
"""The entries of a fingerprint besides the settings, in words."""


def fingerprint(
    trained: Process,
    evaluated: Process,
    recipe: Recipe,
    prompts: Sequence[Prompt],
    rewards: Rewards,
    settings: Settings,
) -> dict[str, Any]:
    """The identity of a run as values for JSON.

    It is taken before anything is drawn: a process may count its own steps in an attribute that `describe` gives.
    """
    learning = {name: p for name, p in trained.module.named_parameters() if p.requires_grad}
    shapes = [f"{name}:{tuple(p.shape)}:{p.dtype}" for name, p in learning.items()]
    return {
        "model": hashlib.sha256("\n".join(shapes).encode()).hexdigest(),
        "data": hashlib.sha256(repr([(prompt.id, prompt.value) for prompt in prompts]).encode()).hexdigest(),
        "process": {"trained": trained.describe(), "evaluated": evaluated.describe()},
        "method": "\n".join(recipe.parts()),
        "reward": repr((rewards.names, rewards.weights)),
        "settings": {name: getattr(settings, name) for name in SETTINGS},
    }


def refuse_another(folder: Path, saved: Mapping[str, Any], present: Mapping[str, Any]) -> None:
    """Raise `CheckpointError`, saying what differs, where a checkpoint's fingerprint is not the present run's."""
    others = [entry for entry in STARTED_WITH if _text(saved.get(entry)) != _text(present[entry])]
    if "method" in others and "process" not in others:
        others.insert(0, "method")  # a critic makes it another model, too
    if others:
        entry = others[0]
        differences = dict.fromkeys(_differences(saved, present)) if entry == "process" else ()
        details = f" ({'; '.join(differences)})" if differences else ""
        raise CheckpointError(
            f"The checkpoint '{folder}' is of another {entry}{details}; resume with {STARTED_WITH[entry]} it was "
            "started with."
        )
    for name, value in saved["settings"].items():
        if present["settings"].get(name) != value:
            raise CheckpointError(
                f"The checkpoint '{folder}' is of a run with {name}={value}, not {present['settings'].get(name)}; "
                "resume with the settings it was started with."
            )


def _text(value: Any) -> str:
    """A value as the checkpoint has it, in which tuples are lists."""
    return json.dumps(value, sort_keys=True)


def _differences(saved: Mapping[str, Any], present: Mapping[str, Any]) -> Iterator[str]:
    """The entries of `Process.describe` that differ, in words, for the process as trained and as evaluated."""
    for role, entries in present["process"].items():
        earlier = saved.get("process", {}).get(role, {})
        for name in sorted(earlier.keys() | entries.keys()):
            before, after = _text(earlier.get(name)), _text(entries.get(name))
            if before != after and name == "source":  # a digest, which says nothing to a reader
                yield "its code has changed"
            elif before != after:
                words = name.replace("_", " ")
                yield f"{words} was {before}, now {after}" if len(before + after) < 80 else f"{words} was another"
