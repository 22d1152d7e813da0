"""Credit along a trajectory: reward-to-go, generalised advantage estimation, and whitening over steps."""

from __future__ import annotations

from dataclasses import dataclass, field

from stepwell.batch import Batch, Read
from stepwell.credit.shaping import Outcome
from stepwell.parts import Part
from stepwell.ranges import NotNegative, Share
from stepwell.tensors import Tensor, torch


def step_rewards(batch: Batch, outcome: Tensor) -> Tensor:
    """(N, T) rewards of the steps, with the outcome (N,) on each row's last trained step."""
    given = batch.rows.step_reward
    rewards = torch.zeros_like(batch.mask) if given is None else given.to(batch.mask.dtype).clone()
    device = batch.mask.device
    if batch.mask.shape[1] == 0:  # every row was over at its start
        return rewards
    last = (batch.mask * torch.arange(1, batch.mask.shape[1] + 1, device=device)).argmax(1)
    rewards[torch.arange(len(batch), device=device), last] += outcome * (batch.mask.sum(1) > 0)
    return rewards * batch.mask


def reward_to_go(rewards: Tensor, mask: Tensor, gamma: float = 1.0) -> Tensor:
    """(N, T) discounted sum of the rewards from each trained step on; steps with mask 0 take no time."""
    return generalised_advantages(rewards, torch.zeros_like(rewards), mask, gamma, 1.0)


def generalised_advantages(
    rewards: Tensor, value: Tensor, mask: Tensor, gamma: float, lam: float, final: Tensor | None = None
) -> Tensor:
    """GAE (Schulman et al. 2016, equation 16), (N, T).

    delta_t = r_t + gamma V_{t+1} - V_t and A_t = delta_t + gamma lam A_{t+1}, where t+1 is the next *trained* step:
    steps with mask 0 (tool output, padding) are skipped over. After the last step V is `final` (N,), 0 unless given:
    the value of the state at which a row was cut although more would have come.
    """
    advantage = torch.zeros_like(rewards)
    carried = rewards.new_zeros(len(rewards))
    next_value = carried if final is None else final.to(rewards.dtype)
    for step in reversed(range(rewards.shape[1])):
        trained = mask[:, step] > 0
        delta = rewards[:, step] + gamma * next_value - value[:, step]
        carried = torch.where(trained, delta + gamma * lam * carried, carried)
        next_value = torch.where(trained, value[:, step], next_value)
        advantage[:, step] = carried
    return advantage * mask


def whiten(values: Tensor, mask: Tensor, epsilon: float = 1e-8) -> Tensor:
    """(N, T) values with mean 0 and variance 1 over the trained steps of the whole batch (unbiased variance)."""
    number = mask.sum().clamp(min=1)
    mean = (values * mask).sum() / number
    variance = (((values - mean) ** 2) * mask).sum() / (number - 1).clamp(min=1)
    return (values - mean) * torch.rsqrt(variance + epsilon) * mask


@dataclass(frozen=True)
class RewardToGo(Part):
    """Sum of the step rewards still to come, with the outcome on the last step, (N, T).

    `kl` is the coefficient of a k1 penalty in the step rewards: with a row-sum its expected gradient is that of
    -kl KL(pi || ref) of whole sequences. `gain` (N, T) is added to the step rewards of the rows. It reads no values,
    so that nothing stands for the rewards that a truncated row did not come to.
    """

    gamma: Share = 1.0
    reward: Part = field(default_factory=Outcome)
    kl: NotNegative = 0.0
    gain: Part | None = None

    @property
    def reads(self) -> frozenset[Read]:
        return frozenset({Read("reference", "log_prob")} if self.kl else ())

    def __call__(self, batch: Batch) -> Tensor:
        rewards = step_rewards(batch, self.reward(batch))
        if self.kl:
            rewards = rewards - self.kl * (batch.old - batch.reference) * batch.mask
        if self.gain is not None:
            rewards = rewards + self.gain(batch) * batch.mask
        return reward_to_go(rewards, batch.mask, self.gamma)


@dataclass(frozen=True)
class Coverage(Part):
    """`weight` for every trained step whose action the row has not taken before, 0 for the others, (N, T).

    The marginal gains of F = weight * the number of different actions, which is monotone and submodular: they add up
    to F. Source of credit by marginal gains: submodular RL, arXiv 2307.13372.
    """

    weight: float = 1.0

    def __call__(self, batch: Batch) -> Tensor:
        action, mask = batch.rows.action, batch.rows.mask
        same = (action[:, :, None] == action[:, None]) & mask[:, None]  # (N, T, T) step t did what step s did
        before = same.tril(-1).any(2)
        return self.weight * (~before & mask).to(batch.mask.dtype)


@dataclass(frozen=True)
class GeneralisedAdvantage(Part):
    """GAE on the value head's estimates, (N, T); `kl` is the coefficient of a k1 penalty in the step rewards.

    Truncated rows go on from `final_value`, the value of the state at which they were cut.
    """

    gamma: Share = 1.0
    lam: Share = 0.95
    kl: NotNegative = 0.0
    reward: Part = field(default_factory=Outcome)

    @property
    def reads(self) -> frozenset[Read]:
        value = {Read("policy", "value")}
        return frozenset(value | {Read("reference", "log_prob")} if self.kl else value)

    def __call__(self, batch: Batch) -> Tensor:
        rewards = step_rewards(batch, self.reward(batch))
        if self.kl:
            rewards = rewards - self.kl * (batch.old - batch.reference) * batch.mask
        value, final = batch.field("value"), batch.rows.final_value
        return generalised_advantages(rewards, value, batch.mask, self.gamma, self.lam, final)


@dataclass(frozen=True)
class Whitened(Part):
    """Another credit, whitened over all trained steps of the batch, (N, T)."""

    credit: Part

    def __call__(self, batch: Batch) -> Tensor:
        values = self.credit(batch)
        values = (values[:, None] if values.dim() == 1 else values).expand_as(batch.mask)
        return whiten(values, batch.mask)
