"""Going on with a comparison that was interrupted: what is in its folder, and whether it is the same comparison."""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from stepwell.comparison.results import FILE, Comparison
from stepwell.errors import CheckpointError, InputError
from stepwell.tasks.registry import Task
from stepwell.training.fingerprint import differences, rows_digest
from stepwell.writing import json_text, write_whole

ENDS = "ends.safetensors"
"""The first seed's last samples of the methods that are done, for the figure of all of them; gone at the end."""
REQUEST = ("task", "budget", "seeds", "settings", "evaluation")
"""The entries that have to be the same for results to belong together, besides the methods."""


def data_of(task: Task) -> str:
    """A digest of the task's prompts and rewards, which a task's name alone does not tell."""
    rewards = (task.rewards.names, task.rewards.weights)
    content = repr((rewards, rows_digest(task.prompts), rows_digest(task.evaluation)))
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def gone_on_from(folder: Path | None, fresh: Comparison, resume: bool) -> Comparison:
    """The comparison to go on with: the one in the folder, without its errors, or a fresh one where there is none.

    Raises `InputError` for a folder that holds a comparison where none is to be resumed, `CheckpointError` for one that
    holds another.
    """
    if folder is None or not (folder / FILE).exists():
        return fresh
    if not resume:
        raise InputError(
            f"'{folder}' holds a comparison already; go on with it by resume (--resume), or choose another folder."
        )
    earlier = Comparison.load(folder)
    difference = next(differences(_request(earlier), _request(fresh)), None)
    if difference is not None:
        raise CheckpointError(
            f"'{folder}' holds another comparison: {difference}; resume with what it was started with, or choose "
            "another folder."
        )
    return replace(earlier, entries=[replace(entry, error=None) for entry in earlier.entries])


def _request(comparison: Comparison) -> dict[str, Any]:
    """The request of a comparison, as its file has it."""
    content = {name: value for name, value in asdict(comparison).items() if name in REQUEST}
    content["task"] = {name: value for name, value in content["task"].items() if name != "work"}  # found out later
    content["methods"] = [entry.label for entry in comparison.entries]
    content["parts"] = [entry.card for entry in comparison.entries]
    whole: dict[str, Any] = json.loads(json_text(content))
    return whole


def begun_anew(folder: Path) -> Path:
    """The folder of a run, without what a run that was interrupted left there: it is made again from its start."""
    if folder.exists():
        shutil.rmtree(folder)
    return folder


def keep_ends(folder: Path, ends: Mapping[str, Sequence[Any]], labels: Sequence[str]) -> None:
    """Write the last samples of methods, where they are tensors."""
    tensors = {}
    for label, values in ends.items():
        if all(isinstance(value, Tensor) for value in values):
            for place, value in enumerate(values):
                tensors[f"{labels.index(label)}/{place:08d}"] = value.detach().cpu().clone().contiguous()
    write_whole(folder / ENDS, save(tensors))


def kept_ends(folder: Path | None, labels: Sequence[str]) -> dict[str, list[Any]]:
    """The last samples that `keep_ends` wrote, by label."""
    if folder is None or not (folder / ENDS).is_file():
        return {}
    try:
        ends: dict[str, list[Any]] = {}
        for name, value in sorted(load((folder / ENDS).read_bytes()).items()):
            ends.setdefault(labels[int(name.partition("/")[0])], []).append(value)
        return ends
    except (SafetensorError, OSError, ValueError, IndexError) as error:  # a picture must not cost the results
        warnings.warn(f"The figure is drawn without the methods that were done before: {error}", stacklevel=2)
        return {}
