"""Baselines without a critic: from lengths, from paths, and from the greedy answer."""

from __future__ import annotations

from dataclasses import dataclass, field

from stepwell.batch import Batch, Read
from stepwell.credit.group import equal_groups, group_index, group_sum
from stepwell.credit.shaping import Outcome
from stepwell.credit.traces import reward_to_go, step_rewards
from stepwell.parts import Part
from stepwell.ranges import NotNegative
from stepwell.tensors import Tensor, torch


def _weighted_mean(values: Tensor, weight: Tensor, group: Tensor, groups: int, others: bool, epsilon: float) -> Tensor:
    """(N,) mean of each row's group by weight, or of the others in it; 0 where there is no weight."""
    mass, total = group_sum(weight, group, groups), group_sum(weight * values, group, groups)
    if others:
        mass, total = mass - weight, total - weight * values
    return torch.where(mass > 0, total / (mass + epsilon).clamp(min=torch.finfo(values.dtype).tiny), 0.0)


@dataclass(frozen=True)
class LengthBaseline(Part):
    """A_i = R_i - sum_j n_j R_j / sum_j n_j over the group, n the trained steps, (N,).

    The baseline of least variance where a row's squared score grows with its length. `others`: over the rest of the
    group, so that it is independent of the sample and biases nothing; the published mean holds the sample itself. A
    group of one gets 0.

    Source: OPO, arXiv 2505.23585.
    """

    others: bool = True
    compares = True
    reward: Part = field(default_factory=Outcome)

    def __call__(self, batch: Batch) -> Tensor:
        reward, steps = self.reward(batch), batch.mask.sum(1)
        group, groups = group_index(batch.rows.prompt)
        baseline = _weighted_mean(reward, steps, group, groups, self.others, 0.0)
        size = group_sum(torch.ones_like(reward), group, groups)
        return torch.where(size == 1, 0.0, reward - baseline)


@dataclass(frozen=True)
class TokenBaseline(Part):
    """A_it = G_it - sum_j w_jt G_jt / (sum_j w_jt + epsilon) over the rows of the group that have a step t, (N, T).

    G is the reward to go and w_it = sum_{s<=t} (1 - 2 pi_is + sum_v pi_sv^2): the squared norm of the score of all
    steps so far in the logits, which makes this the baseline of least variance. `others` leaves the row itself out,
    and with it the bias. Steps of which the group has no other keep G.

    Source: "The Optimal Token Baseline" (Li et al. 2026), as verl computes it.
    """

    others: bool = True
    epsilon: NotNegative = 1e-8
    compares = True
    reads = frozenset({Read("policy", "log_prob"), Read("policy", "sum_of_squares")})
    reward: Part = field(default_factory=Outcome)

    def __call__(self, batch: Batch) -> Tensor:
        mask = batch.mask
        gain = reward_to_go(step_rewards(batch, self.reward(batch)), mask)
        norms = (1 - 2 * batch.old.exp() + batch.field("old_sum_of_squares")) * mask
        weight = norms.cumsum(1) * mask
        group, groups = group_index(batch.rows.prompt)
        baseline = torch.zeros_like(gain)
        for step in range(mask.shape[1]):
            columns = gain[:, step], weight[:, step]
            baseline[:, step] = _weighted_mean(*columns, group, groups, self.others, self.epsilon)
        return (gain - baseline) * mask


@dataclass(frozen=True)
class GreedyBaseline(Part):
    """A_i = R_i - R(greedy answer to the prompt), (N,); `WithGreedy` draws it and notes its reward as `greedy`.

    The baseline is no function of the sample, so that it biases nothing. Source: ReMax, arXiv 2310.10505.
    """

    reward: Part = field(default_factory=Outcome)
    reads = frozenset({Read("rows", "greedy")})

    def __call__(self, batch: Batch) -> Tensor:
        return self.reward(batch) - batch.field("greedy").to(batch.mask.dtype)


@dataclass(frozen=True)
class Informative(Part):
    """B / M for every row (N,): M of the batch's B rows are in groups whose rewards differ, and teach something.

    `nonzero` counts the rows whose reward is not 0 instead, as verl does: the number is another wherever a whole group
    succeeds, or a row fails next to one that does not. Source: GPG, arXiv 2504.02546.
    """

    nonzero: bool = False
    rewarded = True

    def __call__(self, batch: Batch) -> Tensor:
        reward = batch.reward
        group, groups = group_index(batch.rows.prompt)
        kept = reward != 0 if self.nonzero else ~equal_groups(reward, group, groups)
        return torch.full_like(reward, len(reward) / max(int(kept.sum()), 1))
