"""Credit in conversations: each turn by its own reward and those of the turns after it."""

from __future__ import annotations

from dataclasses import dataclass, field

from stepwell.batch import Batch
from stepwell.credit.shaping import Outcome
from stepwell.credit.traces import step_rewards
from stepwell.parts import Part
from stepwell.ranges import Share
from stepwell.tensors import Tensor, torch


@dataclass(frozen=True)
class Unpaid(Part):
    """R - sum_t r_t (N,): the part of the outcome that the step rewards do not contain.

    Use it as the `reward` of parts that add the outcome to the step rewards at the row's end (`RewardToGo`,
    `GeneralisedAdvantage`), where the outcome is the sum of the step rewards already, as in conversations: it would
    count twice. Without step rewards it is R.
    """

    reward: Part = field(default_factory=Outcome)

    def __call__(self, batch: Batch) -> Tensor:
        outcome, paid = self.reward(batch), batch.rows.step_reward
        return outcome if paid is None else outcome - batch.row_sum(paid)[:, 0]


@dataclass(frozen=True)
class TurnReturns(Part):
    """G_k = r_k + gamma G_{k+1} (N, T), on every trained step of turn k: the turns' rewards still to come.

    r_k is the sum of the turn's step rewards; the last turn also earns the part of the outcome that they do not
    contain, so that with gamma = 1 the first turn has G_0 = R. Turns are those of `segment`; one without a trained
    step takes no time.
    """

    gamma: Share = 1.0
    reward: Part = field(default_factory=Outcome)

    def __call__(self, batch: Batch) -> Tensor:
        rewards, turn, mask = step_rewards(batch, Unpaid(self.reward)(batch)), batch.field("segment"), batch.mask
        if not turn.numel():
            return rewards
        earned = mask.new_zeros(len(mask), int(turn.max()) + 1)
        taken = torch.zeros_like(earned).scatter_add(1, turn, mask) > 0
        earned = earned.scatter_add(1, turn, rewards)
        carried = mask.new_zeros(len(mask))
        returns = torch.zeros_like(earned)
        for place in reversed(range(earned.shape[1])):
            carried = torch.where(taken[:, place], earned[:, place] + self.gamma * carried, carried)
            returns[:, place] = carried
        return returns.gather(1, turn) * mask
