"""Rollouts that branch: children share a state, so that only the steps they own can make their rewards differ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from stepwell.data.stream import PromptStream
from stepwell.errors import InputError
from stepwell.planning.groups import Groups
from stepwell.planning.trees import Parted
from stepwell.ranges import Count, Size
from stepwell.sampling.request import Branch, Prompt, Request
from stepwell.tensors import Tensor, torch
from stepwell.trajectories import Trajectories


@dataclass
class Branches(Groups):
    """From a deterministic trunk a prompt, `size` children at each of the steps `at`: one random step, then the ODE.

    A child differs from its siblings in one step, so its advantage among them (`keys=("prompt", "origin")`) is that
    step's own. Steps are counted from `first`, the first that can be random: 1 for flows. A trunk that is shorter, as
    texts may be, has its last step in place of those it lacks. `trunks`: trunks of each prompt, each from noise of its
    own. `strides`: every child is finished once with each of these step sizes after its random step; the finishes,
    numbered by `source`, all judge that one step.

    Source: TempFlow-GRPO, arXiv 2508.04324; with one trunk and several strides G2RPO, arXiv 2510.01982.
    """

    at: tuple[int, ...] = (0, 1, 2)
    trunks: Size = 1
    strides: tuple[int, ...] = (1,)
    first: Count = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("at", 0), ("strides", 1)):
            if min(getattr(self, name), default=-1) < least:
                raise InputError(
                    f"Branches.{name} must be one or more whole numbers, {least} or more, got {getattr(self, name)}."
                )

    def plan(self, step: int, so_far: Trajectories | None, prompts: PromptStream) -> list[Request]:
        if so_far is None:
            taken = prompts.take(self.prompts)
            return [Request(prompt, self.trunks, window=(0, 0), judged=False) for prompt in taken]
        trunks = self.prompts * self.trunks
        children = trunks * self.size * len(self.at)
        if len(so_far) == trunks:
            return [
                self._child(prompts.by_id[prompt], self.size, Branch(row, place), place)
                for row, prompt in enumerate(so_far.prompt.tolist())
                for place in self._places(int(so_far.length[row]))
            ]
        if len(so_far) > trunks + children:
            return []
        lengths = so_far.length[:trunks].tolist()
        places = [place for length in lengths for place in self._places(length) for _ in range(self.size)]
        return [
            self._child(prompts.by_id[int(so_far.prompt[row])], 1, Branch(row, place + 1), place, source)
            for source in range(1, len(self.strides))
            for row, place in enumerate(places, trunks)
        ]

    def _places(self, length: int) -> list[int]:
        """The steps at which a trunk of this length has children."""
        return [min(self.first + k, length - 1) for k in self.at]

    def _child(self, prompt: Prompt, count: int, start: Branch, place: int, source: int = 0) -> Request:
        """Children whose random step is at `place`, finished with the stride of number `source`."""
        stride = self.strides[source]
        sampler = None if stride == 1 and source == 0 else {"stride": (place - self.first + 1, stride)}
        return Request(prompt, count, start=start, window=(place, place + 1), source=source, sampler=sampler)

    def keep(self, so_far: Trajectories) -> Tensor:
        return torch.arange(min(self.prompts * self.trunks, len(so_far)), len(so_far))


@dataclass
class Tree(Parted):
    """A tree of `size` leaves a prompt: from step `begin` on, every row parts into `branching` at each step.

    Its depth is the number of such steps; `size` is `branching` to the power of the depth. Before and after these steps
    rows are deterministic. All leaves are judged; a step that leaves share is theirs together (`TreeCredit`, reduction
    `edge`). Steps are counted from `first`. With a `hold` the tree moves on by a step every `hold` rollouts, and starts
    over after the last place. A row that ends before the tree does, as texts may, stands for all the leaves that it
    would have parted into.

    Source: Dynamic-TreeRPO, arXiv 2509.23352, without its noise by layer and its supervised term, whose constants are
    not published.
    """

    steps: Size = 10
    begin: int = 0
    hold: Count = 0
    first: Count = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < self.depth:
            raise InputError(f"Tree.steps must be at least the {self.depth} in which rows part, got {self.steps}.")
        if not 0 <= self.begin <= self.steps - self.depth:
            raise InputError(
                f"Tree.begin must be from 0 to {self.steps - self.depth} for a tree of {self.depth} of {self.steps} "
                f"steps, got {self.begin}."
            )

    def plan(self, step: int, so_far: Trajectories | None, prompts: PromptStream) -> list[Request]:
        begin = self.begin
        if self.hold:
            begin += (step // self.hold) % (self.steps - self.depth - self.begin + 1)
        begin += self.first
        window = (begin, begin + self.depth)
        if so_far is None:
            return [Request(prompt, 1, window=window) for prompt in prompts.take(self.prompts)]
        level, rows = 0, self.prompts
        while rows < len(so_far):
            level, rows = level + 1, rows * self.branching
        if level == self.depth:
            return []
        place = begin + level
        return [
            Request(prompts.by_id[prompt], self.branching - 1, start=Branch(row, min(place, length)), window=window)
            for row, (prompt, length) in enumerate(zip(so_far.prompt.tolist(), so_far.length.tolist(), strict=True))
        ]


@dataclass
class Candidates(Groups):
    """At every step of a row `size` candidates are drawn from the same state and judged; one of them goes on.

    `go_on`: the candidate that goes on, a `random` one, so that steps stay independent, or the `best`. `steps`: the
    steps of a row that can be random; `begin`: the first of them that has candidates. Each candidate is a row that ends
    after its step, judged by the sample that the process makes of its state there. Once a row ended by itself, as texts
    may, there are no further candidates for it.

    Source: SPO, arXiv 2406.04314.
    """

    rewarded = True

    size: Size = 4
    steps: Size = 10
    begin: int = 0
    go_on: Literal["random", "best"] = "random"
    first: Count = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.begin < self.steps:
            raise InputError(f"Candidates.begin must be from 0 to {self.steps - 1}, got {self.begin}.")

    def plan(self, step: int, so_far: Trajectories | None, prompts: PromptStream) -> list[Request]:
        place = self.first + self.begin
        if so_far is None:
            taken = prompts.take(self.prompts)
            return [Request(p, 1, horizon=place + 1, window=(place, place + 1)) for p in taken]
        if len(so_far) < self.prompts * self.size:  # the others of the first state
            return [self._from(prompts, so_far, row, place, self.size - 1) for row in range(self.prompts)]
        layer = len(so_far) // (self.prompts * self.size)
        if layer >= self.steps - self.begin:
            return []
        rng = prompts.rng.split("candidate", step, layer)
        requests = []
        for number in range(self.prompts):
            rows = self._candidates(number, layer - 1)
            assert so_far.reward is not None
            chosen = int(rng.split(number).permutation(self.size)[0])
            if self.go_on == "best":
                chosen = int(so_far.reward[rows].argmax())
            requests.append(self._from(prompts, so_far, rows[chosen], place + layer, self.size))
        return requests

    def keep(self, so_far: Trajectories) -> Tensor:
        return so_far.mask.any(1).nonzero()[:, 0]

    def _candidates(self, number: int, layer: int) -> list[int]:
        """The rows of the candidates of a prompt, the `number`-th of this rollout, in one layer."""
        if layer:
            first = (layer * self.prompts + number) * self.size
            return list(range(first, first + self.size))
        others = self.prompts + number * (self.size - 1)
        return [number, *range(others, others + self.size - 1)]

    def _from(self, prompts: PromptStream, so_far: Trajectories, row: int, place: int, count: int) -> Request:
        """Candidates for the step at `place` of a row."""
        prompt, begin = prompts.by_id[int(so_far.prompt[row])], min(place, int(so_far.length[row]))
        return Request(prompt, count, start=Branch(row, begin), horizon=place + 1, window=(place, place + 1))
