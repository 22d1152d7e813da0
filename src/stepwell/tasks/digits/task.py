"""The digits task: a flow that draws the digit it is asked for only half of the time, and measures that see cheating.

The flow learnt from labels of which half were random, so what it draws is fine and often not what was asked. The reward
is what one classifier says; whether images also became better, or only better at pleasing that classifier, is for
`MEASURES` to say, which hold samples against a second judge and against digits that nothing has learnt from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from stepwell.errors import InputError
from stepwell.process.base import Process
from stepwell.reward.mixing import Rewards
from stepwell.sampling.request import Prompt
from stepwell.tasks.digits.models import (
    CLASSES,
    NO_LABEL,
    SHAPE,
    Teaching,
    decoded,
    digits,
    digits_network,
    distances,
    most_alike,
    read,
)
from stepwell.tasks.registry import Task, task

SETTINGS: dict[str, Any] = {"learning_rate": 3e-4, "prompts_per_step": CLASSES, "group_size": 16}
"""Training settings under which a policy gradient learns much in ten seconds on one core."""


def recognised(prompts: Sequence[int], completions: Sequence[Tensor] | Tensor) -> Tensor:
    """The reward: the first judge's probability (N,) of the digit that was asked for, differentiable in the images.

    `completions` are images (1, 8, 8) in [0, 1], a list of them or a batch (N, 1, 8, 8).
    """
    images, wanted = _batch(prompts, completions)
    return read(images)[torch.arange(len(images), device=images.device), wanted]


def accuracy(prompts: Sequence[Prompt], samples: Sequence[Any]) -> float:
    """The share of samples in which the second judge, who has no part in the reward, sees the digit asked for.

    A reward that rises above it has found out what pleases the first judge alone; 0.97 for real digits.
    """
    images, wanted = _asked(prompts, samples)
    return float((most_alike(images) == wanted).float().mean())


def diversity(prompts: Sequence[Prompt], samples: Sequence[Any]) -> float:
    """The mean distance of two samples of one prompted digit, relative to that of two real ones of one class.

    1 for real digits, 0 where all samples of a digit are the same; above 1 where prompts are not followed, since
    different digits differ more. Digits that only one sample answers are left out; raises `InputError` if all are.
    """
    images, wanted = _asked(prompts, samples)
    classes = [digit for digit in range(CLASSES) if int((wanted == digit).sum()) > 1]
    if not classes:
        raise InputError("Diversity compares samples of the same digit; there is no digit with two samples.")
    here, real = (_spread(images[wanted == digit]) for digit in classes), (_real_spread(digit) for digit in classes)
    return sum(here) / sum(real)


def distance(prompts: Sequence[Prompt], samples: Sequence[Any]) -> float:
    """The energy distance of the pixels of all samples from held-out digits, (2 A - B - C) / 2 A.

    A is the mean distance of a sample and a real digit, B of two samples, C of two real digits, pairs of one with
    itself left out, so that it is 0 on average for real digits (a little to either side) whatever the number of
    samples. It does not see whether prompts are followed; it sees images that no hand writes, and classes or styles
    that went missing. Source: Rizzo and Szekely 2016, doi 10.1002/wics.1375; divided by 2 A, so that it has no unit.
    """
    images, _ = _asked(prompts, samples)
    if len(images) < 2:
        raise InputError("The distance from real digits needs two samples or more.")
    between = float(distances(images, digits("held out")[0]).mean())
    return (2.0 * between - _spread(images) - _real_spread()) / (2.0 * between)


def nearest(prompts: Sequence[Prompt], samples: Sequence[Any]) -> float:
    """The mean distance of a sample to the nearest held-out digit, relative to that of real digits, which score 1.

    Above 1: images unlike any real one. Below: images more typical than real ones are.
    """
    images, _ = _asked(prompts, samples)
    return float(distances(images, digits("held out")[0]).amin(1).mean()) / _nearest_real()


MEASURES: Mapping[str, Callable[[Sequence[Prompt], Sequence[Any]], float]] = {
    "second judge (higher is better)": accuracy,
    "diversity (real digits: 1)": diversity,
    "distance from real digits (lower is better)": distance,
    "nearest real digit (real digits: 1)": nearest,
}
"""What a report says of held-out samples besides their reward, each called as measure(prompts, samples)."""


@task("digits")
def digits_task(
    noise: float = Teaching.noise,
    solver: str = "euler",
    steps: int = 10,
    guidance: float = 1.0,
    draws: int = 32,
    warm_steps: int = Teaching.steps,
    seed: int = 0,
) -> Task:
    """Draw the digit that is asked for: a flow of 8x8 images, taught on noisy labels in seconds, then cached.

    `noise`: the share of labels that were replaced at random while the flow was taught, in `warm_steps` steps. Samples
    are judged by `solver` in `steps` steps with classifier-free `guidance` (1 is none, 3 undoes most of the noise at
    twice the cost); a method says itself how it trains. There are no digits to hold out, so each is judged on `draws`
    prompts of its own, from noise that training does not see. `seed` draws the flow's weights and lessons.
    """
    if not 0.0 <= noise <= 1.0:
        raise InputError(f"The share of random labels is {noise}; a number from 0 to 1 is right.")
    if draws < 1 or warm_steps < 1:
        raise InputError(f"The digits task takes 1 draw and 1 warm step or more, not {draws} and {warm_steps}.")
    teaching = Teaching(noise=noise, steps=warm_steps, seed=seed)

    def process() -> Process:
        from stepwell.process.flow.process import flow

        return flow(
            digits_network(teaching),
            SHAPE,
            solver=solver,
            steps=steps,
            guidance=guidance,
            encode="label",
            unconditional={"label": torch.tensor([NO_LABEL])},
            decode=decoded,
        )

    return Task(
        name="digits",
        title="Digits",
        description=(
            f"Draw the digit that is asked for, 8x8 pixels. The flow was taught labels of which {noise:.0%} were "
            f"random; the reward is a classifier's probability of the digit that was asked for."
        ),
        process=process,
        prompts=[Prompt(digit, digit) for digit in range(CLASSES)],
        evaluation=[Prompt(CLASSES + place, place // draws) for place in range(CLASSES * draws)],
        rewards=Rewards(recognised),
        settings=SETTINGS,
        unit="recognised",
        threads=1,
        measures=MEASURES,
        same_prompts=True,
    )


def _batch(prompts: Sequence[int], completions: Sequence[Tensor] | Tensor) -> tuple[Tensor, Tensor]:
    """Images (N, 1, 8, 8) and the digits asked for (N,)."""
    images = completions if isinstance(completions, Tensor) else torch.stack(list(completions))
    if images.dim() != 4 or images.shape[1:] != SHAPE or len(images) != len(prompts):
        raise InputError(
            f"{len(prompts)} prompts have images of shape {tuple(images.shape)}; (prompts, 1, 8, 8) is right."
        )
    return images, torch.tensor(list(prompts), dtype=torch.long, device=images.device)


@torch.no_grad()
def _asked(prompts: Sequence[Prompt], samples: Sequence[Any]) -> tuple[Tensor, Tensor]:
    images, wanted = _batch([prompt.value for prompt in prompts], samples)
    return images.detach().cpu().float(), wanted.cpu()


def _spread(images: Tensor) -> float:
    """The mean distance of two different rows."""
    return float(distances(images, images).sum()) / (len(images) * (len(images) - 1))


@lru_cache(maxsize=CLASSES + 1)
def _real_spread(digit: int | None = None) -> float:
    """The mean distance of two held-out digits, of one class where it is given."""
    images, classes = digits("held out")
    return _spread(images if digit is None else images[classes == digit])


@lru_cache(maxsize=1)
def _nearest_real() -> float:
    return float(distances(digits("judge")[0], digits("held out")[0]).amin(1).mean())
