"""The state of rows of a flow on their way from noise to data."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from stepwell.columns import Columns
from stepwell.solver.schedule import ScheduleHistory


@dataclass(frozen=True)
class FlowState:
    """Partial samples: x (N, *D) after `step` steps of the trajectory, 0 before the noise was drawn.

    A row has `last` denoising steps after its noise, and is done at step `last` + 1. `history` is what a solver
    remembers; `following` holds the history after the next step, once `propose` has computed it.
    """

    x: Tensor
    step: int
    last: int
    condition: Columns | None
    history: ScheduleHistory | None = None
    following: list[ScheduleHistory] = field(default_factory=list, compare=False)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: Tensor) -> FlowState:
        return replace(
            self,
            x=self.x[index],
            condition=None if self.condition is None else self.condition[index],
            history=None if self.history is None else self.history[index],
            following=[history[index] for history in self.following],
        )

    @property
    def over(self) -> bool:
        """True where all steps were taken; the rows of a flow end together."""
        return self.step > self.last

    @property
    def done(self) -> Tensor:
        return torch.full((len(self.x),), self.over, device=self.x.device)
