"""Sampling and learning in one loop: unfinished samples move by one step between any two updates."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from stepwell.data.stream import PromptStream
from stepwell.planning.groups import Groups
from stepwell.ranges import Count, Size
from stepwell.sampling.request import Request
from stepwell.tensors import Tensor
from stepwell.trajectories import Trajectories, from_tensors, to_tensors


@dataclass
class Queue(Groups):
    """`steps` cohorts of `prompts` times `size` rows, one step apart: each rollout moves all by one, and one ends.

    A row is drawn by as many versions of the parameters as it has steps. Only rows that end are judged and kept. The
    first rollout draws every cohort as far as its place in the queue. `first` is the number of steps before a row's
    first that asks the model: 1 for flows.

    Source: the queue of Implicit Diffusion, Marion et al. 2024, arXiv 2402.05468, algorithm 3.
    """

    size: Size = 4
    steps: Size = 10
    first: Count = 1
    waiting: Trajectories | None = field(default=None, compare=False, repr=False)

    def plan(self, step: int, so_far: Trajectories | None, prompts: PromptStream) -> list[Request]:
        if so_far is not None:
            return []
        cohorts = range(1, self.steps + 1) if self.waiting is None else range(1, 2)
        requests = [
            Request(prompt, self.size, horizon=self.first + done, judged=done == self.steps)
            for done in cohorts
            for prompt in prompts.take(self.prompts)
        ]
        if self.waiting is None:
            return requests
        for row, length in enumerate(self.waiting.length.tolist()):
            start: Any = self.waiting[row : row + 1]
            ends = length + 1 == self.first + self.steps or not bool(start.truncated)  # a text may end before
            prompt = prompts.by_id[int(start.prompt)]
            requests.append(Request(prompt, 1, start=start, horizon=length + 1, judged=ends))
        return requests

    def keep(self, so_far: Trajectories) -> Tensor:
        self.waiting = _bare(so_far[~so_far.outcome])
        return so_far.outcome.nonzero()[:, 0]

    def state_dict(self) -> dict[str, Any]:
        return {} if self.waiting is None else to_tensors(self.waiting)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.waiting = from_tensors(state) if state else None


def _bare(rows: Trajectories) -> Trajectories:
    """Rows without the fields that belong to the rollout that they come from."""
    return rows.replace(condition=None, reward=None, rewards=None)
