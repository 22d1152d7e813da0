"""Samples on a page: texts beside each other, and images embedded in the page."""

from __future__ import annotations

import base64
import binascii
import struct
from typing import Any

from stepwell.comparison.findings import percent
from stepwell.comparison.results import Comparison, Entry
from stepwell.errors import InputError
from stepwell.reward.verifiers import text_of

LEAST = 40
"""The least pixels of an image's longer side on the page; smaller images are magnified by whole numbers."""


def samples_of(entry: Entry, series: int, comparison: Comparison) -> dict[str, Any]:
    """One method's samples before and after training, for the template: texts or images."""
    rows = [{**sample, "prompt": shown(sample["prompt"])} for sample in entry.samples]
    images = any("before_images" in row for row in rows)
    if images:
        rows = [
            row
            | {f"{when}_images": [embedded(image) for image in row[f"{when}_images"]] for when in ("before", "after")}
            for row in rows
        ]
    good = [sum(sample[f"{when}_reward"] == 1 for sample in entry.samples) for when in ("before", "after")]
    about = f"{good[0]} of these {len(rows)} {comparison.task['unit']} before, {good[1]} after"
    return {
        "label": entry.label,
        "series": series,
        "about": about if percent(comparison) and not images else f"{len(rows)} prompts",
        "columns": ("before", "after"),
        "rows": rows,
        "images": images,
    }


def samples_note(comparison: Comparison, images: bool) -> str:
    """The line above the samples of all methods."""
    when = f"before and after training on seed {comparison.shared_seeds[0]}"
    if images:
        return f"The first samples of each prompt, {when}; the number is their mean reward."
    if comparison.figure:
        return f"The first sample of a few prompts, {when}."
    return f"The first answer to a few held-out prompts, {when}."


def embedded(image: str | bytes) -> dict[str, Any]:
    """A PNG file, or its text in base64, for the template: a data address, magnified by a whole number.

    Raises `InputError` for anything that is not a PNG.
    """
    try:
        data = base64.b64decode(image, validate=True) if isinstance(image, str) else image
        if data[:8] != b"\x89PNG\r\n\x1a\n":
            raise ValueError("its first bytes are not those of a PNG")
        width, height = struct.unpack(">II", data[16:24])
    except (binascii.Error, struct.error, ValueError) as error:
        raise InputError(f"image must be a PNG file, got other data: {error}.") from error
    scale = max(1, round(LEAST / max(width, height, 1)))
    address = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    return {"address": address, "width": width * scale, "height": height * scale}


def shown(prompt: Any) -> str:
    """A prompt as text for a page."""
    return text_of(prompt) if isinstance(prompt, str | list | tuple) and prompt else str(prompt)
