"""What is refused before a run begins, whoever begins it: parameters that cannot be trained, columns that are taken."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from stepwell.data.prompts import check_columns
from stepwell.errors import InputError
from stepwell.process.base import Process, check_process
from stepwell.sampling.request import Prompt


def admit(process: Process, prompts: Sequence[Prompt]) -> None:
    """Raise `InputError` for what would fail, or teach nothing, at the first step.

    Parameters that learn in float16 are refused: the gradients of a policy are often below its smallest number, and
    AdamW's squares of them always.
    """
    module = check_process(process, "What is trained").module
    learning = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    if not learning:
        raise InputError(f"{type(process).__name__} has no parameter that can learn; train a network, not a function.")
    half = [name for name, parameter in learning if parameter.dtype == torch.float16]
    if half:
        raise InputError(
            f"The parameters that learn are float16, first '{half[0]}', too coarse a format for their updates; load "
            "the model as float32, or train a LoRA adapter."
        )
    check_columns(sorted({name for prompt in prompts for name in prompt.columns}), "A prompt")
