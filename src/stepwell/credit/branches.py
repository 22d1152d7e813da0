"""Credit where rows share their first steps: to the steps of each branch, by the rewards of a state's branches."""

from __future__ import annotations

from dataclasses import dataclass, field

from stepwell.batch import Batch
from stepwell.credit.group import GroupCredit, group_index, group_sum
from stepwell.credit.shaping import Outcome
from stepwell.parts import Part
from stepwell.ranges import NotNegative, Positive
from stepwell.tensors import Tensor, torch


@dataclass(frozen=True)
class TreeCredit(Part):
    """A (N, T) of each step: the mean reward of the leaves below it, less that of the leaves below its siblings too.

    A step's siblings are the steps drawn from the same state: rows of a prompt with the same node before it. With
    `scale` the difference is divided by the deviation of the prompt's leaves (Dynamic-TreeRPO, arXiv 2509.23352).
    """

    scale: bool = True
    epsilon: NotNegative = 1e-4
    reward: Part = field(default_factory=Outcome)

    def __call__(self, batch: Batch) -> Tensor:
        reward, node = self.reward(batch), batch.rows.node
        credit = torch.zeros_like(batch.mask)
        ones = torch.ones_like(reward)
        before = torch.cat([torch.full_like(node[:, :1], -1), node[:, :-1]], 1)
        for step in range(node.shape[1]):
            own, number = group_index(node[:, step])
            family, families = group_index(torch.stack([batch.rows.prompt, before[:, step]], 1))
            mean = group_sum(reward, own, number) / group_sum(ones, own, number)
            credit[:, step] = mean - group_sum(reward, family, families) / group_sum(ones, family, families)
        if self.scale:
            tree, trees = group_index(batch.rows.prompt)
            size = group_sum(ones, tree, trees)
            squares = group_sum((reward - group_sum(reward, tree, trees) / size) ** 2, tree, trees)
            credit = credit / ((squares / (size - 1).clamp(min=1)).sqrt() + self.epsilon)[:, None]
        return credit * batch.mask


@dataclass(frozen=True)
class Pooled(Part):
    """The credit of all rows that share a row's trained steps, summed (N,): several judgements of one step.

    G2RPO adds the standardised rewards of one random step under several ways to finish it (arXiv 2510.01982). To
    train the step once, reduce by `edge`.
    """

    credit: Part = field(default_factory=GroupCredit)

    def __call__(self, batch: Batch) -> Tensor:
        advantage = self.credit(batch)
        last = batch.mask.shape[1] - 1 - batch.rows.mask.flip(1).int().argmax(1)  # the last trained step
        step, steps = group_index(batch.rows.node.gather(1, last[:, None])[:, 0])
        return group_sum(advantage, step, steps)


@dataclass(frozen=True)
class BranchExtremes(Part):
    """z = (R - mean) / std over a prompt's rows, kept for the best and the worst branch of each state; else 0 (N,).

    The best counts where z >= `positive`, the worst where z < `negative`; both are clipped to +-`bound`. Source:
    B2-DiffuRL (arXiv 2503.11240), whose statistics run over the last stages too; here over the rollout.
    """

    positive: float = 0.7
    negative: float = -0.7
    bound: Positive = 5.0
    reward: Part = field(default_factory=Outcome)

    def __call__(self, batch: Batch) -> Tensor:
        z = GroupCredit("mean", "std", reward=self.reward)(batch)
        branch, branches = group_index(torch.stack([batch.rows.prompt, batch.origin], 1))
        highest = z.new_full((branches,), -torch.inf).scatter_reduce(0, branch, z, "amax")[branch]
        lowest = z.new_full((branches,), torch.inf).scatter_reduce(0, branch, z, "amin")[branch]
        kept = ((z == highest) & (z >= self.positive)) | ((z == lowest) & (z < self.negative))
        return z.clamp(-self.bound, self.bound) * kept
