"""Rollouts that are random and trained in a window of steps only; the window may move from rollout to rollout."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from stepwell.data.stream import PromptStream
from stepwell.errors import InputError
from stepwell.planning.groups import Groups
from stepwell.ranges import Count, NotNegative, Portion, Size
from stepwell.rng import Rng
from stepwell.sampling.request import Branch, Request
from stepwell.tensors import Tensor, torch
from stepwell.trajectories import Trajectories

Schedule = Literal["fixed", "progressive", "random", "decay", "exponential-decay"]


@dataclass
class Windows(Groups):
    """`width` of `steps` steps are random, from `begin` on at first; outside, rows take the deterministic step.

    Steps are counted from `first`, the first that can be random: 1 for flows, whose step 0 is the noise. schedule:
    `fixed`; `progressive`, `stride` steps on every `hold` rollouts; `random`, anywhere, anew each rollout; `decay`,
    progressive with a hold of hold + (max(hold / 4, 1) - hold) p / steps, rounded up, at the position p of the window;
    `exponential-decay`, progressive with a hold of hold exp(-rate max(0, p - free)), rounded up. A window that would
    reach beyond the last step begins again at the start; `variant="published"` does so only after it has left the last
    step altogether, as MixGRPO's code does: with 25 steps, a width of 4 and a hold of 25 a cycle has 650 rollouts, of
    which 75 train one to three steps and 25 none at all. `roll_back=False` keeps the last window instead. `same_noise`:
    all rows of a prompt share the noise they start from.

    Source: MixGRPO, arXiv 2507.21802, with the schedules of its code.
    """

    steps: Size = 10
    width: int = 4
    begin: int = 0
    schedule: Schedule = "fixed"
    stride: Size = 1
    hold: Size = 25
    rate: NotNegative = 0.1
    free: Count = 13
    roll_back: bool = True
    variant: Literal["corrected", "published"] = "corrected"
    same_noise: bool = False
    first: Count = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.width <= self.steps:
            raise InputError(f"{type(self).__name__}.width must be from 1 to {self.steps}, got {self.width}.")
        if not 0 <= self.begin <= self.steps - self.width:
            raise InputError(
                f"{type(self).__name__}.begin must be from 0 to {self.steps - self.width} for {self.width} of "
                f"{self.steps} steps, got {self.begin}."
            )

    def plan(self, step: int, so_far: Trajectories | None, prompts: PromptStream) -> list[Request]:
        begin, end = self.window(step, prompts.rng)
        window = (begin + self.first, end + self.first)
        if so_far is None:
            count = 1 if self.same_noise else self.size
            return [Request(prompt, count, window=window) for prompt in prompts.take(self.prompts)]
        if not self.same_noise or self.size == 1 or len(so_far) >= self.prompts * self.size:
            return []
        return [
            Request(prompts.by_id[prompt], self.size - 1, start=Branch(row, self.first), window=window)
            for row, prompt in enumerate(so_far.prompt.tolist())
        ]

    def window(self, rollout: int, rng: Rng) -> tuple[int, int]:
        """[begin, end) of a rollout's window, counted from the first step that can be random."""
        if self.schedule == "fixed":
            return self.begin, self.begin + self.width
        if self.schedule == "random":
            begin = int(rng.split("window", rollout).permutation(self.steps - self.width + 1)[0])
            return begin, begin + self.width
        begin = self._position(rollout)
        return begin, min(begin + self.width, self.steps)

    def _position(self, rollout: int) -> int:
        """The window's begin: it is moved on as often as the holds before this rollout allow."""
        last = self.steps - self.width if self.variant == "corrected" else self.steps
        position, left = self.begin, rollout
        while left >= self._hold(position):
            left -= self._hold(position)
            position += self.stride
            if position > last:
                if not self.roll_back:
                    return min(last, self.steps - self.width)
                position = self.begin
        return position

    def _hold(self, position: int) -> int:
        if self.schedule == "decay":
            least = max(self.hold / 4, 1.0)
            return math.ceil(self.hold + (least - self.hold) * position / self.steps)
        if self.schedule == "exponential-decay":
            return max(math.ceil(self.hold * math.exp(-self.rate * max(0, position - self.free))), 1)
        return self.hold


@dataclass
class Tail(Windows):
    """Windows after which another solver finishes the row: n steps left become max(1, ratio n), rounded down.

    `after`: the number of steps after those that can be random, 1 for flows, whose last step draws no noise.

    Source: MixGRPO-Flash, arXiv 2507.21802, section 3.3, with DPM-Solver++ 2M for the steps after the window.
    """

    solver: str = "dpmpp-2m"
    ratio: Portion = 0.4
    after: int = 1

    def plan(self, step: int, so_far: Trajectories | None, prompts: PromptStream) -> list[Request]:
        _, end = self.window(step, prompts.rng)
        requests = super().plan(step, so_far, prompts)
        left = self.steps + self.after - end
        if left < 2:
            return requests
        sampler = {"tail": (end, self.solver, max(1, int(left * self.ratio)))}
        return [replace(request, sampler=sampler) for request in requests]


@dataclass
class Backward(Groups):
    """The last steps first: `size` rows branch off a shared beginning, and the part they train grows.

    Each of `trunks` rows a prompt is drawn to its end; `size` more rows branch off it before its last `least` of
    `steps` steps, and every `hold` rollouts one step earlier. Only the branches train, on their own part.

    Source: B2-DiffuRL (Hu et al. 2025, arXiv 2503.11240), whose stages grow by a rule of its scripts; here by one step.
    """

    size: Size = 3
    trunks: Size = 2
    steps: Size = 20
    least: Size = 14
    hold: Size = 10
    first: Count = 1

    def plan(self, step: int, so_far: Trajectories | None, prompts: PromptStream) -> list[Request]:
        if so_far is None:
            return [Request(prompt, self.trunks, judged=False) for prompt in prompts.take(self.prompts)]
        if len(so_far) > self.prompts * self.trunks:
            return []
        split = self.first + max(self.steps - self.least - step // self.hold, 0)
        requests = []
        for row, (prompt, length) in enumerate(zip(so_far.prompt.tolist(), so_far.length.tolist(), strict=True)):
            begin = min(split, length - 1)  # a text may be shorter
            window = (begin, self.first + self.steps)
            requests.append(Request(prompts.by_id[prompt], self.size, start=Branch(row, begin), window=window))
        return requests

    def keep(self, so_far: Trajectories) -> Tensor:
        return torch.arange(min(self.prompts * self.trunks, len(so_far)), len(so_far))
