"""The conditions on a process and its data that are checked before a run begins, whoever begins it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from stepwell.data.columns import check_columns
from stepwell.data.rows import names_of_columns
from stepwell.errors import InputError
from stepwell.parts import Node, parts_of
from stepwell.process.base import Process, check_process
from stepwell.recipe.recipe import Recipe
from stepwell.reward.mixing import Rewards
from stepwell.sampling.request import Prompt


def admit_rewards(recipe: Recipe, rewards: Rewards, evaluated: bool) -> None:
    """Raise `InputError` for a method that learns from rewards, and for an evaluation, without any reward."""
    if rewards.functions:
        return
    if recipe.rewarded:
        nodes = (part for part in parts_of(recipe.whole.terms) if isinstance(part, Node) and part.rewarded)
        reader = next(nodes, recipe.guide or recipe.planner)
        raise InputError(
            "A reward must be a function, or several in a list, got none; the method learns from rewards, which its "
            f"{type(reader).__name__} reads."
        )
    if evaluated:
        raise InputError("reward must be given where there is an evaluation, which is the mean reward of its prompts.")


def admit(process: Process, prompts: Sequence[Prompt]) -> None:
    """Raise `InputError` for a process or data with which a run would fail, or learn nothing, at its first step.

    Parameters that learn in float16 are refused: the gradients of a policy are often below float16's smallest number,
    and their squares, which AdamW keeps, always are.
    """
    module = check_process(process, "process").module
    learning = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    if not learning:
        raise InputError(f"{type(process).__name__} has no parameter that can learn; train a network, not a function.")
    half = [name for name, parameter in learning.items() if parameter.dtype == torch.float16]
    if half:
        raise InputError(
            f"Parameters that learn must not be float16, which is too coarse for their updates, got '{half[0]}'; load "
            "the model as float32, or train a LoRA adapter."
        )
    check_columns(names_of_columns(prompts), "A prompt")
