"""Trees of whole answers: rows part where a segment ends, and go on to ends of their own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from stepwell.data.stream import PromptStream
from stepwell.errors import InputError
from stepwell.planning.groups import Groups
from stepwell.ranges import Range, Size
from stepwell.sampling.request import Branch, Request
from stepwell.trajectories import Trajectories


@dataclass
class Parted(Groups):
    """Groups whose rows part into `branching`, as often as it takes for `size` of them."""

    branching: Annotated[int, Range("a whole number, at least 2", 2, whole=True)] = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.depth < 1 or self.branching**self.depth != self.size:
            raise InputError(
                f"{type(self).__name__}.size must be a power of branching={self.branching}, at least "
                f"{self.branching}, got {self.size}."
            )

    @property
    def depth(self) -> int:
        """The number of times that rows part."""
        depth, leaves = 0, 1
        while leaves < self.size:
            depth, leaves = depth + 1, leaves * self.branching
        return depth


@dataclass
class SegmentTree(Parted):
    """`size` leaves a prompt from a balanced tree: `branching` rows at the root, each parted again after a segment.

    Every leaf is a whole answer with the distribution of a plain sample. A row that ended before a place of parting is
    copied there, at the price of a reward call and of no step, so that all states of a level have the same number of
    leaves: a tree that gave them fewer would weight answers by their length. `size` is a power of `branching`; its
    exponent is the tree's depth.

    Source: TreePO, arXiv 2508.17445, without its choice of where to part by likelihood, its fallback of regrowing
    finished paths, and its random first width.
    """

    segment: Size = 16

    def plan(self, step: int, so_far: Trajectories | None, prompts: PromptStream) -> list[Request]:
        if so_far is None:
            return [Request(prompt, self.branching) for prompt in prompts.take(self.prompts)]
        level, rows = 1, self.prompts * self.branching
        while rows < len(so_far):
            level, rows = level + 1, rows * self.branching
        if level == self.depth:
            return []
        place = so_far.length.clamp(max=level * self.segment).tolist()
        return [
            Request(prompts.by_id[prompt], self.branching - 1, start=Branch(row, place[row]))
            for row, prompt in enumerate(so_far.prompt.tolist())
        ]
