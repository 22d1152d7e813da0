"""The planner's contract: where a step's budget goes, asked again after each part has been seen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from stepwell.data.stream import PromptStream
from stepwell.sampling.request import Request
from stepwell.trajectories import Trajectories


@runtime_checkable
class Planner(Protocol):
    """Plans the rollouts of a step. It may remember things between steps; what it remembers is saved.

    A planner may also have `note(so_far) -> dict[str, Tensor]`: entries (N,) or (N, T) for the `info` of all rows of
    this step's rollout, such as what other rows say of a row. They are there when credit is given.
    """

    def plan(self, step: int, so_far: Trajectories | None, prompts: PromptStream) -> list[Request]:
        """Requests for the next part of this step, given what it drew so far with rewards; an empty list is done."""
        ...

    def keep(self, so_far: Trajectories) -> Tensor:
        """(M,) rows of this step's rollout that credit is given on, in order."""
        ...

    def learn(self, trajectories: Trajectories, signals: Mapping[str, float]) -> None:
        """See what the step's rows earned, and what the update reported."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...
