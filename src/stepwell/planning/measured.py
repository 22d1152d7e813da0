"""Rollouts whose purpose is to judge others: greedy answers and continuations of prefixes, which do not train."""

from __future__ import annotations

from dataclasses import dataclass

from stepwell.data.stream import PromptStream
from stepwell.planning.groups import Groups
from stepwell.ranges import Size
from stepwell.sampling.request import Branch, Request
from stepwell.tensors import Tensor, torch
from stepwell.trajectories import Trajectories

MEASURE = 1
"""The source of rows that are drawn to judge others by."""


@dataclass
class WithGreedy(Groups):
    """`size` samples of each prompt and its greedy answer, whose reward is noted as `greedy` (N,) on the samples.

    Only the samples train. The greedy answer takes the likeliest action at every step, for which the process needs
    `deterministic` (`abilities.Likeliest`). Source: ReMax, arXiv 2310.10505.
    """

    rewarded = True

    size: Size = 1
    prompts: Size = 64

    def plan(self, step: int, so_far: Trajectories | None, prompts: PromptStream) -> list[Request]:
        requests = super().plan(step, so_far, prompts)
        return requests + [Request(request.prompt, 1, window=(0, 0), source=MEASURE) for request in requests]

    def keep(self, so_far: Trajectories) -> Tensor:
        return (so_far.source != MEASURE).nonzero()[:, 0]

    def note(self, so_far: Trajectories) -> dict[str, Tensor]:
        assert so_far.reward is not None
        greedy = (so_far.source == MEASURE).nonzero()[:, 0]
        asked, order = so_far.prompt[greedy].sort(stable=True)
        first = torch.searchsorted(asked, so_far.prompt)
        return {"greedy": so_far.reward[greedy[order]][first]}


@dataclass
class Vines(Groups):
    """`size` samples of each prompt, and `vines` rows from the state before each of their segments, which judge it.

    A segment has `segment` steps. The vines of the root are drawn for each row too, and are no samples of the group.
    Noted on the samples (N, T): `value_before` and `value_after`, the mean rewards of the vines before and after the
    segment that a step belongs to, and `ends`, 1 where the row ends with it. Source: VinePPO, arXiv 2410.01679.
    """

    rewarded = True

    prompts: Size = 4
    size: Size = 4
    segment: Size = 16
    vines: Size = 4

    def plan(self, step: int, so_far: Trajectories | None, prompts: PromptStream) -> list[Request]:
        if so_far is None:
            return super().plan(step, so_far, prompts)
        if bool((so_far.source == MEASURE).any()):
            return []
        return [
            Request(prompts.by_id[int(so_far.prompt[row])], self.vines, start=Branch(row, place), source=MEASURE)
            for row, place in self._places(so_far)
        ]

    def _places(self, samples: Trajectories) -> list[tuple[int, int]]:
        """The rows of the samples and the steps before which a segment of theirs begins, in order."""
        lengths = samples.length.tolist()
        return [(row, place) for row, length in enumerate(lengths) for place in range(0, length, self.segment)]

    def keep(self, so_far: Trajectories) -> Tensor:
        return (so_far.source != MEASURE).nonzero()[:, 0]

    def note(self, so_far: Trajectories) -> dict[str, Tensor]:
        assert so_far.reward is not None
        samples = so_far[so_far.source != MEASURE]
        measured = so_far.reward[so_far.source == MEASURE].reshape(-1, self.vines).mean(1)
        segments = -(-so_far.mask.shape[1] // self.segment)
        values = so_far.reward.new_zeros(len(so_far), segments + 1)
        for (row, place), value in zip(self._places(samples), measured, strict=True):
            values[row, place // self.segment] = value
        steps = torch.arange(so_far.mask.shape[1], device=so_far.mask.device) // self.segment
        last = (so_far.length[:, None] - 1).div(self.segment, rounding_mode="floor")
        return {
            "value_before": values[:, steps],
            "value_after": values[:, steps + 1],
            "ends": (steps == last).to(values.dtype),
        }
