"""Checkpoints: everything that the next step depends on, in a folder that is there whole or not at all.

A checkpoint is written beside its place and renamed into it. Tensors are safetensors, the rest is JSON, and a manifest
with the hash of every file comes last, so that a damaged checkpoint is recognised before anything is loaded. Tensors
are written, hashed and read one at a time, so that saving and resuming take hardly more memory than the run itself.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import torch
from torch import Tensor

from stepwell.errors import CheckpointError, InputError, StepwellError
from stepwell.training.optimiser import MASTER
from stepwell.training.tensor_files import TensorFile, write_tensors
from stepwell.writing import sync_folder, whole_file, write_whole

MANIFEST = "manifest.json"
STATE = "state.json"
EARLIER = "remove its folder to resume from an earlier checkpoint"
MOMENTS = ("exp_avg", "exp_avg_sq")


T = TypeVar("T")


class AnotherRun(CheckpointError):
    """A checkpoint is whole, but a run of something else than the present one wrote it."""


class _Hashing:
    """A file that is hashed while it is written."""

    def __init__(self, file: BinaryIO):
        self.file, self.hash, self.bytes = file, hashlib.sha256(), 0

    def write(self, data: Any) -> int:
        self.hash.update(data)
        self.bytes += len(data)
        return self.file.write(data)


def write(folder: Path, state: Any, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Write `state` (nested dictionaries and lists with tensors in them) and groups of tensors as a checkpoint."""
    plain, inside = _split(state)
    temporary = folder.with_name(f".{folder.name}.tmp{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    manifest = {}

    def put(name: str, fill: Callable[..., object], content: Any) -> None:
        with whole_file(temporary / name) as file:
            hashing = _Hashing(file)
            fill(hashing, content)
        manifest[name] = {"bytes": hashing.bytes, "sha256": hashing.hash.hexdigest()}

    try:
        temporary.mkdir(parents=True)
        put(STATE, _Hashing.write, json.dumps(plain).encode())
        for name, group in {**({"state": inside} if inside else {}), **tensors}.items():
            put(f"{name}.safetensors", write_tensors, group)
        write_whole(temporary / MANIFEST, json.dumps(manifest))
        before = _replaced(folder)
        shutil.rmtree(before, ignore_errors=True)
        if folder.exists():  # a folder cannot be replaced at one stroke; `newest` puts it back after a kill in between
            os.replace(folder, before)
        os.replace(temporary, folder)
        sync_folder(folder.parent)
        sync_folder(folder.parent.parent)  # which the first checkpoint puts a folder into
        shutil.rmtree(before, ignore_errors=True)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise InputError(f"The checkpoint '{folder}' could not be written: {error.strerror}.") from error
    except InputError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def read(folder: Path) -> tuple[Any, dict[str, TensorFile]]:
    """The state and the groups of tensors of a checkpoint; raises `CheckpointError` where it is damaged.

    A tensor of a group is read from its file whenever it is asked for.
    """
    manifest = _json(folder / MANIFEST, f"The checkpoint '{folder}' has no readable {MANIFEST}")
    files = manifest if isinstance(manifest, dict) else {}
    if STATE not in files or not all(_is_entry(name, entry) for name, entry in files.items()):
        raise CheckpointError(f"'{folder / MANIFEST}' is not the list of a checkpoint's files; {EARLIER}.")
    for name, expected in files.items():
        size, digest = _digest(folder / name)
        if (size, digest) != (expected["bytes"], expected["sha256"]):
            raise CheckpointError(
                f"'{folder / name}' is damaged: {size} bytes that do not match the manifest's "
                f"{expected['bytes']!s:.20}; "
                f"{EARLIER}."
            )
    plain = _json(folder / STATE, f"'{folder / STATE}' is no JSON that can be read")
    groups = {Path(name).stem: TensorFile(folder / name) for name in files if name.endswith(".safetensors")}
    with whole(folder):
        return _join(plain, groups.pop("state", {})), groups


@contextlib.contextmanager
def whole(folder: Path) -> Iterator[None]:
    """Turn what goes wrong inside where a checkpoint's content is not what a run writes into a `CheckpointError`."""
    try:
        yield
    except CheckpointError:
        raise
    except (StepwellError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [""])[0].rstrip(".")
        raise CheckpointError(
            f"The checkpoint '{folder}' does not hold what a run writes ({type(error).__name__}: {reason:.120}); "
            f"{EARLIER}."
        ) from error


def check_keys(path: object, stored: Any, keys: Iterable[str]) -> None:
    """Raise `CheckpointError` where what is stored in a place is no table with these keys."""
    if not isinstance(stored, dict):
        raise CheckpointError(f"The checkpoint '{path}' holds {stored!r:.40} where a table is needed; {EARLIER}.")
    for key in keys:
        if key not in stored:
            raise CheckpointError(f"The checkpoint '{path}' holds no '{key}'; {EARLIER}.")


def check_form(path: object, stored: Any, present: Any) -> None:
    """Raise `CheckpointError` where what is stored is not of the kind of the present value: a table with its keys, a
    list, a tensor of its number format, a text, a number. None stands for any kind."""
    if isinstance(present, Mapping):
        check_keys(path, stored, map(str, present))
        for key, value in present.items():
            check_form(f"{path}/{key}", stored[str(key)], value)
        return
    if isinstance(present, Tensor):
        right = isinstance(stored, Tensor) and (stored.dtype, stored.dim()) == (present.dtype, present.dim())
    elif isinstance(present, list | tuple):
        right = isinstance(stored, list)
    elif isinstance(present, float):
        right = type(stored) in (int, float)
    else:
        right = present is None or type(stored) is type(present)
    if not right:
        kind = type(present).__name__
        raise CheckpointError(f"The checkpoint '{path}' holds {stored!r:.40} where a {kind} is needed; {EARLIER}.")


def complete(parent: Path) -> list[Path]:
    """The complete checkpoints in a folder of them, newest first.

    Where a run was killed while it replaced a checkpoint, the old one is put back.
    """
    for before in parent.glob(".update-*.replaced"):
        with contextlib.suppress(OSError):  # the new one is there, or another rank was faster
            os.rename(before, parent / before.name.removeprefix(".").removesuffix(".replaced"))
    found = [path for path in parent.glob("update-*") if path.is_dir() and NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("update-")), reverse=True)


NAME = re.compile(r"update-[0-9]{1,18}")
"""The name of a checkpoint's folder: the updates that were made before it."""


def named(update: int) -> str:
    """The name of the checkpoint after so many updates."""
    return f"update-{update:08d}"


FIRST = named(0)
"""The name of the checkpoint of a run's beginning."""


def newest(parent: Path) -> Path | None:
    """The newest complete checkpoint in a folder of them."""
    return next(iter(complete(parent)), None)


def from_newest(parent: Path, use: Callable[[Path], T], instead: str) -> T | None:
    """The result of `use` on the newest checkpoint in a folder of them that it can use; None where there is none.

    One that it raises `CheckpointError` for is passed over with a warning that ends in `instead`, if there is an
    earlier one. Raises the error of the last where none can be used, and `AnotherRun` at once.
    """
    found = complete(parent)
    for place, folder in enumerate(found, 1):
        try:
            with whole(folder):
                return use(folder)
        except AnotherRun:
            raise
        except CheckpointError as error:
            if place == len(found):
                raise
            reason = str(error).partition(";")[0].rstrip(".")
            warnings.warn(f"{reason}. {instead}", stacklevel=3)
    return None


def _replaced(folder: Path) -> Path:
    """The place of a checkpoint while another takes its own."""
    return folder.with_name(f".{folder.name}.replaced")


def prune(parent: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints, and those that killed runs left half-written."""
    for path in complete(parent)[keep:]:
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
    """Put the optimiser's memory back; raises `ValueError` for one that does not fit its parameters."""
    parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    entries: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        known = name in ("step", MASTER, *MOMENTS) and index.isdecimal() and int(index) < len(parameters)
        if not known or value.shape != (() if name == "step" else parameters[int(index)].shape):
            raise ValueError(f"no parameter has a '{key:.40}' of shape {tuple(value.shape)!s:.40}")
        entries.setdefault(int(index), {})[name] = value
    for place, entry in entries.items():
        if len(entry.keys() & {"step", *MOMENTS}) not in (0, 3):
            raise ValueError(f"the moments of parameter {place} are not whole")
    optimiser.load_state_dict({"state": entries, "param_groups": optimiser.state_dict()["param_groups"]})


def _is_entry(name: str, entry: Any) -> bool:
    """True for a line of a manifest: the name of a file in the checkpoint's own folder, its size and its hash."""
    plain = Path(name).name == name and name.endswith((".json", ".safetensors"))
    return (
        plain and isinstance(entry, dict) and type(entry.get("bytes")) is int and isinstance(entry.get("sha256"), str)
    )


def _digest(path: Path) -> tuple[int, str]:
    """The size of a file in bytes and its hash; a file that cannot be read is empty."""
    digest, size = hashlib.sha256(), 0
    with contextlib.suppress(OSError, ValueError), open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            size += len(block)
    return size, digest.hexdigest()


def _json(path: Path, fault: str) -> Any:
    """The content of a JSON file; raises `CheckpointError` with the `fault` for one that cannot be read."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{fault}; {EARLIER}.") from error


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
        if set(plain) == {"tensor"} and isinstance(plain["tensor"], str) and plain["tensor"] in tensors:
            return tensors[plain["tensor"]]
        return {key: _join(value, tensors) for key, value in plain.items()}
    if isinstance(plain, list):
        return [_join(value, tensors) for value in plain]
    return plain
