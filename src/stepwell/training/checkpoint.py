"""Checkpoints: everything that the next step depends on, in a folder that is there whole or not at all.

A checkpoint is written beside its place and renamed into it. Tensors are safetensors, the rest is JSON, and a manifest
with the hash of every file comes last, so that a damaged checkpoint is recognised before anything is loaded.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from stepwell.errors import CheckpointError, InputError
from stepwell.writing import write_whole

MANIFEST = "manifest.json"


def write(folder: Path, state: Any, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Write `state` (nested dictionaries and lists with tensors in them) and groups of tensors as a checkpoint."""
    plain, inside = _split(state)
    temporary = folder.with_name(f".{folder.name}.tmp{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        files: dict[str, bytes] = {"state.json": json.dumps(plain).encode()}
        for name, group in {"state": inside, **tensors}.items():
            if group:
                files[f"{name}.safetensors"] = save({key: value.detach().contiguous() for key, value in group.items()})
        manifest = {}
        for name, content in files.items():
            write_whole(temporary / name, content)
            manifest[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        write_whole(temporary / MANIFEST, json.dumps(manifest))
        before = _replaced(folder)
        shutil.rmtree(before, ignore_errors=True)
        if folder.exists():  # a folder cannot be replaced at one stroke; `newest` puts it back after a kill in between
            os.replace(folder, before)
        os.replace(temporary, folder)
        shutil.rmtree(before, ignore_errors=True)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise InputError(f"The checkpoint '{folder}' could not be written: {error.strerror}.") from error
    except InputError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def read(folder: Path) -> tuple[Any, dict[str, dict[str, Tensor]]]:
    """The state and the groups of tensors of a checkpoint; raises `CheckpointError` where it is damaged."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"The checkpoint '{folder}' has no readable {MANIFEST}; remove the folder to resume from an earlier one."
        ) from error
    for name, expected in manifest.items():
        path = folder / name
        data = path.read_bytes() if path.is_file() else b""
        if len(data) != expected["bytes"] or hashlib.sha256(data).hexdigest() != expected["sha256"]:
            raise CheckpointError(
                f"'{path}' is damaged: {len(data)} bytes that do not match the manifest's {expected['bytes']}; "
                "remove its folder to resume from an earlier checkpoint."
            )
    groups = {Path(name).stem: load_file(folder / name) for name in manifest if name.endswith(".safetensors")}
    inside = groups.pop("state", {})
    return _join(json.loads((folder / "state.json").read_text()), inside), groups


def newest(parent: Path) -> Path | None:
    """The newest complete checkpoint in a folder of them.

    Where a run was killed while it replaced a checkpoint, the old one is put back.
    """
    for before in parent.glob(".update-*.replaced"):
        with contextlib.suppress(OSError):  # the new one is there, or another rank was faster
            os.rename(before, parent / before.name.removeprefix(".").removesuffix(".replaced"))
    complete = sorted(path for path in parent.glob("update-*") if path.is_dir())
    return complete[-1] if complete else None


def _replaced(folder: Path) -> Path:
    """The place of a checkpoint while another takes its own."""
    return folder.with_name(f".{folder.name}.replaced")


def prune(parent: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints, and those that killed runs left half-written."""
    for path in sorted(parent.glob("update-*"))[:-keep]:
        shutil.rmtree(path)
    for pattern in (".update-*.tmp*", ".update-*.replaced"):
        for path in parent.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)


def optimiser_tensors(optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's memory, one entry `index.name` a parameter and tensor."""
    state = optimiser.state_dict()["state"]
    return {
        f"{index}.{name}": torch.as_tensor(value) for index, entry in state.items() for name, value in entry.items()
    }


def load_optimiser(optimiser: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put the optimiser's memory back."""
    entries: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        entries.setdefault(int(index), {})[name] = value
    optimiser.load_state_dict({"state": entries, "param_groups": optimiser.state_dict()["param_groups"]})


def _split(state: Any, path: str = "") -> tuple[Any, dict[str, Tensor]]:
    """Nested state with its tensors taken out: JSON, and the tensors by path."""
    if isinstance(state, Tensor):
        return {"tensor": path}, {path: state}
    if isinstance(state, Mapping):
        parts = {str(key): _split(value, f"{path}/{key}") for key, value in state.items()}
        tensors = {name: value for _, inside in parts.values() for name, value in inside.items()}
        return {key: plain for key, (plain, _) in parts.items()}, tensors
    if isinstance(state, list | tuple):
        items = [_split(value, f"{path}/{place}") for place, value in enumerate(state)]
        return [plain for plain, _ in items], {name: value for _, inside in items for name, value in inside.items()}
    return state, {}


def _join(plain: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The nested state that `_split` took apart."""
    if isinstance(plain, dict):
        if set(plain) == {"tensor"} and plain["tensor"] in tensors:
            return tensors[plain["tensor"]]
        return {key: _join(value, tensors) for key, value in plain.items()}
    if isinstance(plain, list):
        return [_join(value, tensors) for value in plain]
    return plain
