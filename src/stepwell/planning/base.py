"""The planner's contract: where a step's budget goes, asked again after each part of it was rewarded."""

from __future__ import annotations

import copy
import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from stepwell.data.stream import PromptStream
from stepwell.errors import InputError
from stepwell.sampling.request import Request
from stepwell.tensors import Tensor, torch
from stepwell.trajectories import Trajectories

SETTINGS = {"prompts": "prompts_per_step", "size": "group_size"}
"""The names that a planner's numbers have among a run's settings."""


class Planner(ABC):
    """Plans the rollouts of a step: `plan` has to be written, everything else has a default.

    A planner may remember things between steps; what it remembers goes into checkpoints by `state_dict` and
    `load_state_dict`. `prompts` and `size` are the prompts of a step and the samples of each, where a planner has such
    numbers, and None where it has not; the settings `prompts_per_step` and `group_size` take their place (`resized`).

    `rewarded`: it plans, keeps, notes or learns by the rows' rewards. `judged`: all its requests bring their rewards
    (`Request.reward`), so that a run needs no reward function.
    """

    prompts: int | None = None
    size: int | None = None
    rewarded: ClassVar[bool] = False
    judged: ClassVar[bool] = False

    @abstractmethod
    def plan(self, step: int, so_far: Trajectories | None, prompts: PromptStream) -> list[Request]:
        """Requests for the next part of this step, given the rows of its earlier parts with their rewards.

        `so_far` is None at first; an empty list ends the step's rollout.
        """

    def keep(self, so_far: Trajectories) -> Tensor:
        """(M,) rows of this step's rollout that credit is given on, in order: all of them unless said otherwise."""
        return torch.arange(len(so_far))

    def note(self, so_far: Trajectories) -> dict[str, Tensor]:
        """Entries (N,) or (N, T) for the `info` of all rows of this step's rollout, such as the rewards of other rows.

        They are there when credit is given.
        """
        return {}

    def learn(self, trajectories: Trajectories, signals: Mapping[str, float]) -> None:
        """Take notice of the step's rewards and of the metrics of its updates, once both are there."""
        return

    def state_dict(self) -> dict[str, Any]:
        """Everything that the planner remembers: numbers, texts and tensors in dictionaries and lists."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`."""
        return

    def resized(self, prompts: int | None = None, size: int | None = None) -> Self:
        """The planner with another number of prompts a step, or of samples a prompt; None leaves a number as it is.

        Raises `InputError` for a number that this planner does not have.
        """
        changes = {name: value for name, value in (("prompts", prompts), ("size", size)) if value is not None}
        for name, value in changes.items():
            if getattr(self, name) is None:
                raise InputError(
                    f"{SETTINGS[name]} must be left out for the planner {type(self).__name__}, which has no '{name}' "
                    f"to set, got {value}."
                )
        if not changes:
            return self
        if dataclasses.is_dataclass(self):
            return dataclasses.replace(self, **changes)
        twin = copy.copy(self)
        vars(twin).update(changes)
        return twin
