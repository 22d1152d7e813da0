"""Prompts that are asked again with a hint where no sample succeeded, so that the policy learns to do without it."""

from __future__ import annotations

from dataclasses import dataclass

from stepwell.data.stream import PromptStream
from stepwell.planning.groups import Groups
from stepwell.process.language.chat import like
from stepwell.ranges import Count
from stepwell.sampling.request import Request
from stepwell.tensors import torch
from stepwell.trajectories import Trajectories

HINTED = 1
"""The source of rows that were drawn under a hint."""


@dataclass
class Hinted(Groups):
    """Groups; a prompt all of whose rewards are at most `failure` is asked again under its hint, `hints` more times.

    The data's `column` holds the prompt with its hint, in the form that prompts have; prompts without one are not asked
    again. Both kinds of rows stay in the group and are scored under the plain prompt, while the stored log-probability
    is that under the hinted prompt, which they were drawn from: train with ratios against the `behaviour`. `hints` of 0
    is as many as the group has.

    Source: Guide (Nath et al. 2025, arXiv 2506.13923).
    """

    rewarded = True

    hints: Count = 0
    failure: float = 0.0
    column: str = "hinted"

    def plan(self, step: int, so_far: Trajectories | None, prompts: PromptStream) -> list[Request]:
        if so_far is None:
            return self.ask(prompts, self.prompts)
        if bool((so_far.source == HINTED).any()):
            return []
        assert so_far.reward is not None
        solved = so_far.prompt[so_far.reward > self.failure]
        failed = [prompts.by_id[i] for i in so_far.prompt[~torch.isin(so_far.prompt, solved)].unique().tolist()]
        hints = [(prompt, prompt.columns.get(self.column)) for prompt in failed]
        count = self.hints or self.size
        told = [(prompt, like(prompt.value, hint)) for prompt, hint in hints if hint is not None]
        return [Request(prompt, count, context=hint, source=HINTED) for prompt, hint in told]
