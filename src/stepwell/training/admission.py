"""The conditions on a process and its data that are checked before a run begins, whoever begins it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from stepwell.data.columns import check_columns
from stepwell.errors import InputError
from stepwell.process.base import Process, check_process
from stepwell.sampling.request import Prompt


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
    check_columns(sorted({name for prompt in prompts for name in prompt.columns}), "A prompt")
