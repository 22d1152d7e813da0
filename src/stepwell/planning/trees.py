"""Trees of whole answers: rows part where a segment ends, and go on to their own ends."""

from __future__ import annotations

from dataclasses import dataclass

from stepwell.data.stream import PromptStream
from stepwell.errors import InputError
from stepwell.parts import Size
from stepwell.planning.groups import Groups
from stepwell.sampling.request import Branch, Request
from stepwell.trajectories import Trajectories


@dataclass
class SegmentTree(Groups):
    """`size` leaves a prompt from a balanced tree: `branching` rows at the root, each parted again after a segment.

    Every leaf is a whole answer, and has the law of a plain sample. A row that ended before a place of parting is
    copied there, at the price of a reward call and of no step, so that all its states have the same number of leaves:
    a tree that gives them fewer would weigh answers by their length. `size` is a power of `branching`; its exponent is
    the tree's depth.

    Source: TreePO, arXiv 2508.17445, without its choice of where to part by likelihood, its fallback of regrowing
    finished paths, and its random first width.
    """

    size: Size = 8
    branching: Size = 2
    segment: Size = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.branching < 2 or self.depth < 1 or self.branching**self.depth != self.size:
            raise InputError(
                f"A tree that parts into {self.branching} has a power of {self.branching} leaves, not {self.size}."
            )

    @property
    def depth(self) -> int:
        """How often rows part, the root included."""
        depth, leaves = 0, 1
        while leaves < self.size and self.branching > 1:
            depth, leaves = depth + 1, leaves * self.branching
        return depth

    def plan(self, step: int, so_far: Trajectories | None, prompts: PromptStream) -> list[Request]:
        if so_far is None:
            return [Request(prompt, self.branching) for prompt in prompts.take(self.prompts)]
        level, rows = 1, self.prompts * self.branching
        while rows < len(so_far):
            level, rows = level + 1, rows * self.branching
        if level == self.depth:
            return []
        by_id = {prompt.id: prompt for prompt in prompts.prompts}
        place = so_far.length.clamp(max=level * self.segment).tolist()
        return [
            Request(by_id[prompt], self.branching - 1, start=Branch(row, place[row]))
            for row, prompt in enumerate(so_far.prompt.tolist())
        ]
