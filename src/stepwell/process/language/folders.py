"""Folders and files of models: what is there is checked before a library reads it, and afterwards against the model."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from stepwell.errors import InputError, StepwellError
from stepwell.guarded import first_line_of
from stepwell.paths import usable
from stepwell.terminal import one_line

SETTINGS = ("config.json", "generation_config.json", "tokenizer_config.json", "model.safetensors.index.json")
"""Files that hold a JSON object."""

FILES = (".gguf", ".safetensors", ".bin", ".json", ".pt", ".pth", ".ckpt")
"""Endings of names of files, which no id of the hub has."""

QUANTISED = re.compile(r"[IU]8|[FI][46](_.*)?|U[46]|F8.*")
"""The formats of safetensors that stand for weights only together with their scales."""

PLAIN = re.compile(r"(inv_freq|masked_bias|position_ids|token_type_ids)$")
"""Tensors of older libraries that are computed and not learned."""

OTHER_SENSES = re.compile(r"vision|visual|image|video|audio|speech|projector|(^|\.)(mtp|v_head|value_head)(\.|$)")
"""Parts beside a language model that it does not need in order to read texts."""

HEADS = re.compile(r"score|classif|reward|regress|pooler|qa_outputs|^cls$|head")
"""Layers on top of the hidden states that make another kind of model."""


@contextlib.contextmanager
def reading(name: str) -> Iterator[None]:
    """Turn whatever libraries raise while they read a user's files into an `InputError`; messages call them `name`.

    A panic of a library in Rust is no `Exception`, so all are caught but what asks to stop and a lack of memory.
    """
    try:
        yield
    except (StepwellError, MemoryError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise InputError(f"{name} cannot be loaded: {first_sentence(error)}") from error


def first_sentence(error: BaseException) -> str:
    """The first line of an error's message, or the name of its kind, as a sentence."""
    line = first_line_of(error)
    if isinstance(error, RecursionError):
        line = "it is nested too deeply"
    if isinstance(error, KeyError):
        line = f"{line if error.args else 'an entry'} is missing"
    return one_line(line, 300).rstrip(" .:") + "."


def place_of(model: Any, kind: str = "model") -> Path | str:
    """The folder or file that a user named, its `~` filled in, or an id of the hub as it is.

    Raises `InputError` for no path, one that no file can have, an empty one, and one that can only be a folder's where
    there is none.
    """
    if not isinstance(model, (str, os.PathLike)):
        raise InputError(f"model must be a folder or a hub id, got a {type(model).__name__}.")
    if not str(model).strip():
        raise InputError("model must be a folder or a hub id, got an empty name.")
    found = usable(model, "model")
    if found.exists():
        return found
    if found.suffix.lower() in FILES:
        raise InputError(f"There is no file '{model}'.")
    # an id of the hub is 'name' or 'owner/name'; everything else can only mean a folder
    if found.is_absolute() or str(model).startswith((".", "~")) or len(found.parts) > 2:
        raise InputError(f"There is no {kind} folder '{model}'.")
    if found.is_symlink():
        raise InputError(f"The {kind} folder '{model}' is a link to nothing.")
    return str(model)


def check_files(folder: Path) -> None:
    """Raise `InputError` unless every entry of a folder can be read, and files that hold a JSON object hold one."""
    for entry in sorted(folder.iterdir()):
        usable(entry, "The model's file")
    for name in SETTINGS:
        file = folder / name
        if file.is_dir():
            raise InputError(f"'{file}' must be a file, got a folder.")
        if file.is_file():
            read_object(file)


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file; raises `InputError` for anything else."""
    with reading(f"'{file}'"):
        try:
            value = json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise InputError(f"'{file}' must be JSON, got an error: {first_sentence(error)}") from error
    if not isinstance(value, dict):
        raise InputError(f"'{file}' must hold a JSON object, got a {type(value).__name__}.")
    return value


def weight_files(folder: Path) -> list[Path]:
    """The files with the model's weights, as its index names them; raises `InputError` where one is missing."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists() or not index.is_file():
        files = [folder / "model.safetensors"]
        if not any(folder.glob("*.safetensors")):
            raise InputError(f"The folder '{folder}' holds no weights as *.safetensors, the only kind that is loaded.")
    else:
        places = read_object(index).get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
            raise InputError(f"'{index}' must have a weight_map from the tensors' names to those of files.")
        names = sorted(set(places.values()))
        if any(Path(name).name != name for name in names):
            raise InputError(f"'{index}' must name files of its own folder, got '{one_line(names[0], 80)}'.")
        files = [folder / name for name in names]
    for file in files:
        if file.is_dir():
            raise InputError(f"'{file}' must be a file, got a folder.")
        if not usable(file, "The model's file").is_file():
            raise InputError(f"The folder '{folder}' lacks '{one_line(file.name, 80)}', a file of its weights.")
    return files


def check_weights(folder: Path, config: Mapping[str, Any]) -> None:
    """Raise `InputError` for weights in a format that needs scales, and for a model of more layers than tensors."""
    from safetensors import safe_open

    count = 0
    for file in weight_files(folder):
        with reading(f"'{file}'"), safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - it is no mapping
                count += 1
                kind = str(tensors.get_slice(name).get_dtype())
                if QUANTISED.fullmatch(kind) and not name.endswith(("bias", "mask")):
                    raise InputError(
                        f"The weights in '{folder}' are quantised ('{name}' is {kind}); only floating-point weights "
                        "from 16 bits can be trained, so dequantise the model first."
                    )
    layers = config.get("num_hidden_layers")
    if isinstance(layers, int) and layers > count:
        raise InputError(
            f"The folder '{folder}' holds {count} tensors, too few for the {layers} layers of its config.json."
        )


def check_loaded(name: str, model: nn.Module, info: Mapping[str, Iterable[Any]]) -> None:
    """Raise `InputError` unless the files gave every weight of the model, and have none that makes another model.

    `info` is the loading info of transformers or diffusers: missing, unexpected and mismatched keys.
    """
    kind = type(model).__name__
    missing = sorted(info.get("missing_keys", ()))
    if missing:
        raise InputError(
            f"{name} does not hold a whole {kind}: its weights lack {_listed(missing)}, which would be made up at "
            "random."
        )
    wrong = sorted(entry[0] if isinstance(entry, tuple) else entry for entry in info.get("mismatched_keys", ()))
    if wrong:
        raise InputError(f"{name} does not fit its config.json: {_listed(wrong)} must have another shape in a {kind}.")
    foreign = sorted(key for key in info.get("unexpected_keys", ()) if _is_foreign(key, model))
    if foreign:
        raise InputError(f"{name} holds another model than a {kind}, which has no {_listed(foreign)}.")


def check_numbers(name: str, model: nn.Module) -> None:
    """Raise `InputError` for weights that are NaN or infinite, or were never read."""
    for key, parameter in model.named_parameters():
        if parameter.is_meta:
            raise InputError(f"{name} has no weights for '{key}' in its files.")
        if parameter.is_floating_point() and parameter.numel():
            least, most = parameter.detach().aminmax()  # NaN if any is; no tensor of that size is made
            if not bool(least.isfinite() & most.isfinite()):
                raise InputError(f"{name} has weights that are NaN or infinite, first in '{key}'.")


def _is_foreign(key: str, model: nn.Module) -> bool:
    """True for a tensor in the place of a layer of the model, or of a head of another kind, that the model lacks."""
    if PLAIN.search(key) or OTHER_SENSES.search(key):
        return False
    base = str(getattr(model, "base_model_prefix", ""))
    modules = {name for name, _ in model.named_modules()}
    path = key.split(".")
    if path[0] == base and len(path) > 2:
        path = path[1:]
    top = path[0]
    return top in modules or f"{base}.{top}" in modules or key.split(".")[0] == base or bool(HEADS.search(top))


def _listed(keys: list[str]) -> str:
    shown = ", ".join(f"'{one_line(key, 80)}'" for key in keys[:3])
    return shown + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
