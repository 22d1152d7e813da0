"""Credit from single reward functions: one column of several, and the agreement of a prompt's answers."""

from __future__ import annotations

from dataclasses import dataclass, field

from stepwell.batch import Batch
from stepwell.credit.group import GroupCredit, group_index, group_sum
from stepwell.credit.shaping import Outcome
from stepwell.errors import InputError
from stepwell.parts import Part
from stepwell.ranges import Count, NotNegative, Share
from stepwell.tensors import Tensor, torch


@dataclass(frozen=True)
class RewardColumn(Part):
    """The value of reward function number `column` (from 0) for each row, unweighted (N,); 0 where it does not apply.

    A function of weight 0 changes no reward, and may measure anything: the answer that was given, the number of
    searches, the cost of a constraint.
    """

    column: Count = 0
    rewarded = True

    def __call__(self, batch: Batch) -> Tensor:
        rewards = batch.field("rewards")
        if not 0 <= self.column < rewards.shape[1]:
            raise InputError(
                f"RewardColumn.column must be below the number of reward functions, {rewards.shape[1]}, got "
                f"{self.column}; give more rewards, of weight 0 if they are to reward nothing."
            )
        return rewards[:, self.column].to(batch.mask.dtype).nan_to_num(nan=0.0)


@dataclass(frozen=True)
class LengthClass(Part):
    """floor(log2 of a row's length), (N,): strata for answers without other structure."""

    def __call__(self, batch: Batch) -> Tensor:
        return batch.rows.length.clamp(min=1).to(batch.mask.dtype).log2().floor()


@dataclass(frozen=True)
class Stratified(Part):
    """alpha z_stratum + (1 - alpha) z_group, z = (R - mean) / (std + epsilon), (N,).

    Rows of a prompt share a stratum where `strata` is equal. alpha = 1 gives no gradient at all to a
    choice that leads from one stratum to another, because each row is compared with those that chose alike.

    Source: Stratified GRPO, arXiv 2510.06214.
    """

    strata: Part = field(default_factory=RewardColumn)
    alpha: Share = 0.5
    epsilon: NotNegative = 1e-6
    compares = True
    reward: Part = field(default_factory=Outcome)

    def __call__(self, batch: Batch) -> Tensor:
        reward, strata = self.reward(batch), self.strata(batch)
        inner, _ = group_index(torch.stack([batch.rows.prompt.to(strata.dtype), strata], 1))
        standardised = GroupCredit("mean", "std", epsilon=self.epsilon, reward=self.reward)
        apart, whole = standardised(_as_groups(batch, inner)), standardised(batch)
        return (self.alpha * apart + (1 - self.alpha) * whole).to(reward.dtype)


def _as_groups(batch: Batch, group: Tensor) -> Batch:
    """The batch with other groups."""
    return Batch(batch.rows.replace(prompt=group), batch.counts, batch.scores, batch.states)


def answer_entropy(batch: Batch, answers: Tensor) -> Tensor:
    """(N,) entropy in bits of the answers to the row's prompt."""
    prompt, prompts = group_index(batch.rows.prompt)
    answer, kinds = group_index(torch.stack([prompt.to(answers.dtype), answers], 1))
    ones = torch.ones_like(answers)
    size = group_sum(ones, prompt, prompts)
    share = group_sum(ones, answer, kinds) / size
    return -group_sum(share.log2(), prompt, prompts) / size  # each kind of answer occurs share * size times


@dataclass(frozen=True)
class AcrossPrompts(Part):
    """(m - mean over prompts of m) / (std over prompts + epsilon), m the mean reward of a prompt, (N,).

    All rows of a prompt get the same: before the division its expected gradient is 1/G of the policy gradient, and it
    does not vanish where a prompt's rewards are all equal. Source: COPO, arXiv 2508.04138.
    """

    epsilon: NotNegative = 1e-6
    reward: Part = field(default_factory=Outcome)

    def __call__(self, batch: Batch) -> Tensor:
        reward = self.reward(batch)
        group, groups = group_index(batch.rows.prompt)
        mean = group_sum(reward, group, groups) / group_sum(torch.ones_like(reward), group, groups)
        each = reward.new_zeros(groups).index_put((group,), mean)
        deviation = ((each - each.mean()) ** 2).sum().div(max(groups - 1, 1)).sqrt()
        return (mean - each.mean()) / (deviation + self.epsilon)
