"""The digits task: a flow that draws the digit it is asked for only half of the time, and measures that see cheating.

The flow learnt from labels of which half were random, so its digits are well drawn but often the wrong ones. The
reward is the opinion of one classifier; `stepwell.tasks.digits.measures` tells better images from images that only
please that classifier.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stepwell.errors import InputError
from stepwell.tasks.digits.teaching import CLASSES, NO_LABEL, SHAPE, Teaching
from stepwell.tasks.registry import Task, task

if TYPE_CHECKING:  # tasks are listed without torch
    from stepwell.process.base import Process

SETTINGS: dict[str, Any] = {"learning_rate": 3e-4, "prompts_per_step": CLASSES, "group_size": 16}
"""Training settings under which a policy gradient learns much in ten seconds on one core."""


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

    `noise` is the share of labels that were replaced at random while the flow was taught, in `warm_steps` steps.
    Samples are judged by `solver` in `steps` steps with classifier-free `guidance` (1 is none, 3 undoes most of the
    noise at twice the cost); a method chooses its own sampler to train with. There are no digits to hold out, so each
    is judged on `draws` prompts of its own, from noise that training does not see. `seed` draws the flow's weights and
    lessons.
    """
    from stepwell.reward.mixing import Rewards
    from stepwell.sampling.request import Prompt
    from stepwell.tasks.digits.measures import MEASURES, recognised

    if not 0.0 <= noise <= 1.0:
        raise InputError(f"noise of task digits must be from 0 to 1, got {noise}.")
    for name, given in (("draws", draws), ("warm_steps", warm_steps)):
        if given < 1:
            raise InputError(f"{name} of task digits must be at least 1, got {given}.")
    teaching = Teaching(noise=noise, steps=warm_steps, seed=seed)

    def process() -> Process:
        import torch

        from stepwell.process.flow.build import flow
        from stepwell.tasks.digits.models import decoded, digits_network

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
