"""Credit among the samples of one prompt: each is compared with the others."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, assert_never

from stepwell.batch import Batch, Read, notes
from stepwell.credit.shaping import Outcome
from stepwell.parts import Part
from stepwell.ranges import Count, NotNegative
from stepwell.tensors import Tensor, torch

Center = Literal["none", "mean", "leave-one-out", "batch"]
Scale = Literal["none", "std", "batch-std", "mean"]


def group_index(keys: Tensor) -> tuple[Tensor, int]:
    """Dense numbers 0..G-1 (N,) for the groups of equal keys, (N,) or (N, K) where several keys make a group."""
    values = keys.unique(dim=0, return_inverse=True)[1]
    return values, int(values.max()) + 1 if len(values) else 0


def group_sum(values: Tensor, group: Tensor, groups: int) -> Tensor:
    """(N,) each row's sum over its group."""
    return torch.zeros(groups, dtype=values.dtype, device=values.device).index_add_(0, group, values)[group]


@dataclass(frozen=True)
class GroupCredit(Part):
    """A_i = (R_i - center) / scale, with statistics over the rows that share all `keys`.

    center: `mean` of the group; `leave-one-out`, the mean of the others, G/(G-1) (R - mean); the `batch`'s mean; or
    `none`. scale: the group's `std`, `batch-std`, the group's `mean` (MaxRL), or `none`; `epsilon` is added to it and
    `ddof` is 1 for the sample and 0 for the population deviation. A group of one gets 0 (`singleton="zero"`, as TRL)
    or its centred-by-nothing reward (`"reward"`, as verl). Keys are fields of the rows: `prompt`, or any (N,) entry
    of their `info`.

    Summed over steps and averaged over rows, on policy, the expected gradient is the policy gradient for `none` and
    `leave-one-out`, and 1 - 1/G of it for `mean`, with groups of G. With `mean`, `std` and rewards of 0 and 1 it is
    c(p, G) times the gradient of the success rate p, c = E[sqrt(K (G - K) (G - 1) / G)] / (G p (1 - p)) for
    K ~ Bin(G, p) and epsilon 0: 0.707 at any p for G = 2, and near 1 / sqrt(p (1 - p)) for large G.
    """

    center: Center = "mean"
    scale: Scale = "none"
    keys: tuple[str, ...] = ("prompt",)
    epsilon: NotNegative = 1e-4
    ddof: Count = 1
    singleton: Literal["zero", "reward"] = "zero"
    reward: Part = field(default_factory=Outcome)

    @property
    def reads(self) -> frozenset[Read]:
        return notes(self.keys)

    @property
    def compares(self) -> bool:
        others = self.center in ("mean", "leave-one-out") or self.scale == "std"
        return others and self.singleton == "zero" and "prompt" in self.keys

    def __call__(self, batch: Batch) -> Tensor:
        reward = self.reward(batch)
        group, groups = group_index(torch.stack([batch.field(key) for key in self.keys], 1))
        size = group_sum(torch.ones_like(reward), group, groups)
        lowest = reward.new_full((groups,), torch.inf).scatter_reduce(0, group, reward, "amin")[group]
        above = reward - lowest  # exactly 0 in a group of equals, whose mean may be a rounding error away from them
        mean = group_sum(above, group, groups) / size
        others = (group_sum(above, group, groups) - above) / (size - 1).clamp(min=1)
        if self.center == "none":
            centred = reward
        elif self.center == "mean":
            centred = above - mean
        elif self.center == "leave-one-out":
            centred = above - others
        elif self.center == "batch":
            centred = reward - reward.mean()
        else:
            assert_never(self.center)
        judged = self.center in ("mean", "leave-one-out") or self.scale == "std"  # against the others of its group
        alone = (size == 1) if judged else torch.zeros_like(size, dtype=torch.bool)
        centred = torch.where(alone, reward if self.singleton == "reward" else 0.0, centred)
        if self.scale == "none":
            return centred
        if self.scale == "std":
            squares = group_sum((above - mean) ** 2, group, groups)
            deviation = (squares / (size - self.ddof).clamp(min=1)).sqrt()
            scaled = centred / (deviation + self.epsilon)
            return torch.where(alone, centred, scaled)
        if self.scale == "batch-std":
            deviation = ((reward - reward.mean()) ** 2).sum() / max(len(reward) - self.ddof, 1)
            return centred / (deviation.sqrt() + self.epsilon)
        if self.scale == "mean":
            return centred / (lowest + mean + self.epsilon)
        assert_never(self.scale)


@dataclass(frozen=True)
class Best(Part):
    """A constant weight for the rows to imitate and 0 for the rest; the weights' mean over the batch is 1.

    keep: `top`, one row a group, the best (the first of equals: RAFT, arXiv 2304.06767); `above-mean`, every row
    that is at least its group's mean; `positive`, every row with a reward above `threshold`. A group whose rewards
    are all equal teaches nothing about which row is better; `skip_equal` leaves it out.
    """

    keep: Literal["top", "above-mean", "positive"] = "top"
    threshold: float = 0.0
    skip_equal: bool = False
    reward: Part = field(default_factory=Outcome)

    def __call__(self, batch: Batch) -> Tensor:
        reward = self.reward(batch)
        group, groups = group_index(batch.rows.prompt)
        if self.keep == "positive":
            kept = reward > self.threshold
        elif self.keep == "above-mean":
            mean = group_sum(reward, group, groups) / group_sum(torch.ones_like(reward), group, groups)
            kept = reward >= mean
        else:
            kept = torch.zeros_like(reward, dtype=torch.bool)
            kept[top_of_groups(reward, group, groups)] = True
        if self.skip_equal:
            kept &= ~equal_groups(reward, group, groups)
        weight = kept.to(reward.dtype)
        return weight * (len(reward) / weight.sum().clamp(min=1))


def top_of_groups(values: Tensor, group: Tensor, groups: int) -> Tensor:
    """(G,) the row with the largest value of each group; the first of equals."""
    best = values.new_full((groups,), -torch.inf).scatter_reduce(0, group, values, "amax")
    rows = torch.arange(len(values), device=values.device)
    candidates = torch.where(values == best[group], rows, len(values))
    return group.new_full((groups,), len(values)).scatter_reduce(0, group, candidates, "amin")


def equal_groups(reward: Tensor, group: Tensor, groups: int) -> Tensor:
    """(N,) bool: all rewards of the row's group are the same, so that nothing is learned from comparing them."""
    high = reward.new_full((groups,), -torch.inf).scatter_reduce(0, group, reward, "amax")
    low = reward.new_full((groups,), torch.inf).scatter_reduce(0, group, reward, "amin")
    return (high == low)[group]
