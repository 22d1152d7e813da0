"""The samples in a comparison's results: measures of them all, and a few to look at, before and after training."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from typing import Any

import torch

from stepwell.errors import InputError
from stepwell.figures import pictures
from stepwell.meter import Meter
from stepwell.sampling.record import Drawn
from stepwell.tasks.registry import Task

SHOWN = 12
"""Held-out prompts whose samples are kept."""
IMAGES = 8
"""The most images of one prompt that are kept."""
THUMBNAIL = 96
"""The longer side, in pixels, of an image that is kept, at most."""
PIXELS = 4 * THUMBNAIL**2
"""The most pixels of one prompt's images together; one image is kept in any case."""


def measured(task: Task, drawn: Drawn) -> dict[str, float | None]:
    """The task's measures of samples, None where one is not finite; raises `InputError` where one is not a number."""
    measures: dict[str, float | None] = {}
    for name, measure in task.measures.items():
        value: Any = measure(drawn.prompts, drawn.samples.values)
        try:
            number = float(value)
        except (TypeError, ValueError) as error:
            kind = type(value).__name__
            raise InputError(f"Measure '{name}' of task '{task.name}' must return a number, got a {kind}.") from error
        measures[name] = number if math.isfinite(number) else None
    return measures


def kept(task: Task, before: Drawn, after: Drawn, samples: int) -> list[dict[str, Any]]:
    """Rows of prompt, sample and reward for a report, from the same prompts before and after training.

    Both were drawn for the same requests, `samples` a prompt. Images have a row for each of the different prompts, up
    to `SHOWN`, with several images and their mean reward; anything else has the first sample of a prompt, as text.
    """
    number = len(task.evaluation)
    if all(map(pictures.is_image, [*before.samples.values, *after.samples.values])):
        return _images(task, before, after)
    places = [i * number // min(SHOWN, number) * samples for i in range(min(SHOWN, number))]
    rows = []
    few = [drawn[torch.tensor(places)] for drawn in (before, after)]
    rewards = [task.rewards(drawn, Meter()).total.tolist() for drawn in few]
    for row, prompt in enumerate(few[0].prompts):
        shown = [task.show(prompt, drawn.samples.values[row]) for drawn in few]
        rows.append(
            {"prompt": prompt.value, "before": shown[0], "before_reward": rewards[0][row]}
            | {"after": shown[1], "after_reward": rewards[1][row]}
        )
    return rows


def _images(task: Task, before: Drawn, after: Drawn) -> list[dict[str, Any]]:
    by_prompt: dict[str, list[int]] = {}
    for row, prompt in enumerate(before.prompts):
        by_prompt.setdefault(repr(prompt.value), []).append(row)
    groups = list(by_prompt.values())
    few = min(SHOWN, len(groups))
    rows = []
    for group in (groups[i * len(groups) // few] for i in range(few)):
        entry: dict[str, Any] = {"prompt": before.prompts[group[0]].value}
        for when, drawn in (("before", before), ("after", after)):
            images = _thumbnails([drawn.samples.values[row] for row in group])
            rewards = task.rewards(drawn[torch.tensor(group[: len(images)])], Meter()).total
            entry |= {when: "", f"{when}_reward": float(rewards.mean()), f"{when}_images": images}
        rows.append(entry)
    return rows


def _thumbnails(images: Sequence[torch.Tensor]) -> list[str]:
    """The first of the images as PNG files in base64."""
    files: list[str] = []
    spent = 0
    for image in images[:IMAGES]:
        small = pictures.reduced(image, THUMBNAIL)
        spent += small.shape[-1] * small.shape[-2]
        if files and spent > PIXELS:
            break
        files.append(base64.b64encode(pictures.png(small)).decode())
    return files
