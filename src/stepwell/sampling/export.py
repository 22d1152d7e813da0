"""Samples as files: images as PNG with all of them side by side, arrays as .npy or .safetensors, the rest as JSON."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stepwell.errors import InputError, UnknownName
from stepwell.figures import pictures
from stepwell.paths import usable
from stepwell.writing import json_text, writable_folder, writing

FORMATS = ("png", "npy", "safetensors", "json")
ABOUT = "samples.json"


def format_for(values: Sequence[Any], wanted: str | None = None) -> str:
    """The format that samples are written in: `wanted`, else `png` for images, `npy` for other tensors, else `json`.

    An image is a tensor (H, W) or (C, H, W) of one or three channels with nothing outside [0, 1]. Raises `InputError`
    where the samples cannot be written as `wanted`.

    Example:
        >>> format_for([torch.rand(3, 8, 8)]), format_for([torch.randn(2)]), format_for(["a text"])
        ('png', 'npy', 'json')
    """
    if wanted is not None and wanted not in FORMATS:
        raise UnknownName("format of samples", wanted, FORMATS)
    tensors = [value for value in values if isinstance(value, Tensor)]
    if len(tensors) < len(values) or not values:
        if wanted not in (None, "json"):
            kind = type(values[0]).__name__ if values else "none"
            raise InputError(f"Samples must be tensors to be written as {wanted}, got {kind}; leave the format out.")
        return "json"
    images = all(pictures.is_image(value) and bool(((value >= 0) & (value <= 1)).all()) for value in tensors)
    if wanted == "png" and not images:
        raise InputError(
            f"Samples must be images with values from 0 to 1 to be written as png, got shape "
            f"{tuple(tensors[0].shape)}; write them as npy or safetensors."
        )
    return wanted or ("png" if images else "npy")


def write_samples(
    folder: str | os.PathLike[str],
    values: Sequence[Any],
    prompts: Sequence[Any],
    format: str | None = None,
    about: Mapping[str, Any] | None = None,
) -> list[Path]:
    """Write samples into a folder of their own, all or nothing, and return the files.

    Images are `sample-0000.png`, ... and `grid.png`; other tensors one array (N, *shape) in `samples.npy` or under the
    name `samples` in `samples.safetensors`. `samples.json` has the prompts, the entries of `about`, and samples that
    are no tensors. Raises `InputError` for a folder that holds anything already, and where nothing can be written.
    """
    target = check_place(folder)
    files = _files(values, format_for(values, format))
    entries = [{"prompt": prompt} for prompt in prompts]
    for row, entry in enumerate(entries):
        name = f"sample-{row:04d}.png"
        entry |= {"file": name} if name in files else {} if isinstance(values[row], Tensor) else {"sample": values[row]}
    files[ABOUT] = (json_text({**(about or {}), "samples": entries}, indent=2) + "\n").encode()
    temporary = target.with_name(f".{target.name}.tmp{os.getpid()}")
    with writing(target):
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            temporary.mkdir(parents=True)
            for name, content in files.items():
                (temporary / name).write_bytes(content)
            if target.exists():
                target.rmdir()
            os.replace(temporary, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return [target / name for name in files]


def check_place(folder: str | os.PathLike[str]) -> Path:
    """The folder, if samples can be written there: it is new or empty, and proven writable."""
    target = usable(folder, "The folder of the samples")
    if target.is_dir() and any(target.iterdir()):
        raise InputError(f"'{target}' holds files already, which are not overwritten; choose a new or an empty folder.")
    return writable_folder(target)


def _files(values: Sequence[Any], format: str) -> dict[str, bytes]:
    """The content of every file of samples, by name; none for JSON."""
    if format == "json":
        return {}
    if format == "png":
        images = {f"sample-{row:04d}.png": pictures.png(value) for row, value in enumerate(values)}
        return images | {"grid.png": pictures.png(pictures.grid(values))}
    whole = torch.stack(list(values)).detach().cpu().contiguous()
    if format == "safetensors":
        from safetensors.torch import save

        return {"samples.safetensors": save({"samples": whole})}
    content = io.BytesIO()
    np.save(content, (whole.float() if whole.dtype == torch.bfloat16 else whole).numpy(), allow_pickle=False)
    return {"samples.npy": content.getvalue()}
