"""Fixed groups, groups until enough of them teach something, and groups for the prompts that teach most."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from stepwell.data.stream import PromptStream
from stepwell.planning.base import Planner
from stepwell.ranges import Checked, NotNegative, Range, Share, Size
from stepwell.sampling.request import Request
from stepwell.tensors import Tensor, torch
from stepwell.trajectories import Trajectories


@dataclass
class Groups(Checked, Planner):
    """`prompts` prompts a step, `size` samples each: the plain planner."""

    prompts: Size = 8
    size: Size = 8

    def plan(self, step: int, so_far: Trajectories | None, prompts: PromptStream) -> list[Request]:
        return [] if so_far is not None else self.ask(prompts, self.prompts)

    def ask(self, prompts: PromptStream, count: int, weights: Tensor | None = None) -> list[Request]:
        """Requests for the next `count` prompts of the stream; none for a count of 0."""
        if count <= 0:
            return []
        return [Request(prompt, self.size) for prompt in prompts.take(count, weights)]


@dataclass
class DynamicSampling(Groups):
    """DAPO's dynamic sampling: groups whose rewards are all equal are replaced by those of further prompts.

    It asks again until the rewards of `prompts` groups differ within the group, or `limit` times that many prompts were
    tried; then it keeps the groups that there are. With rewards of 0 and 1, refilling multiplies a prompt's expected
    gradient by 1 / (1 - p^G - (1-p)^G): p is its success rate, G the group's size, and the denominator the chance that
    its group is kept. Source: DAPO, arXiv 2503.14476, section 3.2.
    """

    rewarded = True

    limit: Annotated[float, Range("a number from 1 on", 1)] = 4.0

    def plan(self, step: int, so_far: Trajectories | None, prompts: PromptStream) -> list[Request]:
        if so_far is None:
            return self.ask(prompts, self.prompts)
        tried = len(so_far) // self.size
        missing = self.prompts - len(_useful_prompts(so_far))
        return self.ask(prompts, min(missing, math.floor(self.limit * self.prompts) - tried))

    def keep(self, so_far: Trajectories) -> Tensor:
        chosen = _useful_prompts(so_far)[: self.prompts]
        if not chosen:
            return torch.arange(min(len(so_far), self.prompts * self.size))
        return torch.isin(so_far.prompt, so_far.prompt.new_tensor(chosen)).nonzero()[:, 0]


def _useful_prompts(rows: Trajectories) -> list[int]:
    """The prompts whose rows differ in reward, in the order in which they were first drawn."""
    assert rows.reward is not None
    rewards: dict[int, set[float]] = {}
    for prompt, reward in zip(rows.prompt.tolist(), rows.reward.tolist(), strict=True):
        rewards.setdefault(prompt, set()).add(reward)
    return [prompt for prompt, seen in rewards.items() if len(seen) > 1]


@dataclass
class WeightedPrompts(Groups):
    """Prompts drawn by how much they can still teach: weight floor + 4 p (1 - p), p the running success rate.

    p is the mean reward of a prompt's rows, mapped to [0, 1] by `low` and `high`; the earlier p keeps the share `decay`
    of each new one, and an unseen prompt has p = 1/2. Prompts are drawn from another distribution than the data's on
    purpose: the objective is reweighted.
    """

    rewarded = True

    floor: NotNegative = 0.1
    decay: Share = 0.5
    low: float = 0.0
    high: float = 1.0
    rates: dict[int, float] = field(default_factory=dict)

    def plan(self, step: int, so_far: Trajectories | None, prompts: PromptStream) -> list[Request]:
        if so_far is not None:
            return []
        rates = torch.tensor([self.rates.get(prompt.id, 0.5) for prompt in prompts.prompts], dtype=torch.float64)
        return self.ask(prompts, self.prompts, self.floor + 4 * rates * (1 - rates))

    def learn(self, trajectories: Trajectories, signals: Mapping[str, float]) -> None:
        assert trajectories.reward is not None
        prompts, size = trajectories.prompt.unique(return_counts=True)
        groups = trajectories.reward[trajectories.prompt.argsort(stable=True)].double().split(size.tolist())
        for prompt, rewards in zip(prompts.tolist(), groups, strict=True):
            mean = float(rewards.mean())
            rate = min(max((mean - self.low) / (self.high - self.low), 0.0), 1.0)
            earlier = self.rates.get(prompt)
            self.rates[prompt] = rate if earlier is None else self.decay * earlier + (1 - self.decay) * rate

    def state_dict(self) -> dict[str, Any]:
        return {"rates": {str(prompt): rate for prompt, rate in self.rates.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rates = {int(prompt): rate for prompt, rate in state["rates"].items()}
