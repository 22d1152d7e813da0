"""Rewards as functions that gradients pass through, for methods that backpropagate into the sample."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from stepwell.data.columns import Given
from stepwell.data.rows import by_number
from stepwell.errors import RewardError
from stepwell.guarded import Guarded, OutOfTime, said_of
from stepwell.meter import Meter
from stepwell.reward.mixing import Rewards
from stepwell.sampling.request import Prompt


class Judge:
    """The same reward functions, called on samples that carry a gradient; they have to return a tensor that does too.

    A function gets `completions` as a list of tensors, one a row; `torch.stack(completions)` is their batch.
    """

    def __init__(self, rewards: Rewards, prompts: Sequence[Prompt], meter: Meter):
        self.rewards, self.meter = rewards, meter
        self.prompts = prompts

    @functools.cached_property
    def by_id(self) -> Any:
        """The prompts by their numbers."""
        return by_number(self.prompts)

    def __call__(self, samples: Tensor, prompts: Tensor) -> Tensor:
        """(N,) the weighted sum of the rewards of samples (N, ...) for the prompts with these ids (N,).

        Raises `RewardError` for a reward that gradients do not pass through, or that is not one number a row.
        """
        if not samples.requires_grad:
            raise RewardError(
                "The samples carry no gradient, which this method needs: the network or the flow's `decode` runs under "
                "torch.no_grad, or detaches or rounds its result."
            )
        rows = [self.by_id[number] for number in prompts.tolist()]
        total = samples.new_zeros(len(samples))
        given = Given([prompt.value for prompt in rows], list(samples.unbind(0)), [False] * len(samples))
        keywords = self.rewards.keywords(given.with_data(rows))
        functions = zip(self.rewards.names, self.rewards.functions, self.rewards.weights, keywords, strict=True)
        for name, function, weight, arguments in functions:
            returned = self._returned(name, function, arguments)
            if isinstance(returned, list | tuple) and all(isinstance(value, Tensor) for value in returned):
                returned = torch.stack([value.reshape(()) for value in returned])
            self.meter.add(reward_calls=len(samples))
            if not isinstance(returned, Tensor) or not returned.requires_grad:
                raise RewardError(
                    f"Reward '{name}' is not differentiable: it must return a tensor computed from the samples by "
                    f"torch, got {type(returned).__name__} without a gradient."
                )
            if returned.shape != (len(samples),):
                raise RewardError(
                    f"Reward '{name}' must return one number a row, got a tensor of shape {tuple(returned.shape)} for "
                    f"{len(samples)} samples."
                )
            total = total + weight * returned.to(total.dtype)
        return total

    def _returned(self, name: str, function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        def refusal(error: BaseException) -> RewardError:
            if isinstance(error, OutOfTime):
                return RewardError(f"Reward '{name}' took longer than {self.rewards.timeout:g} seconds, its timeout.")
            return RewardError(
                f"Reward '{name}' raised {said_of(error)} on samples that carry a gradient, which this method needs."
            )

        with Guarded(refusal, self.rewards.timeout), warnings.catch_warnings():
            # taking numbers out of a tensor raises an error of its own later
            warnings.filterwarnings("ignore", message="Converting a tensor with requires_grad=True")
            return function(**arguments)
