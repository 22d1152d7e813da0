"""The outcome, and penalties for divergence and for length that are added to it before credit is given."""

from __future__ import annotations

from dataclasses import dataclass, field

from stepwell.batch import Batch, Read
from stepwell.credit.overlong import overlong_penalty
from stepwell.parts import Part
from stepwell.ranges import Portion, Positive, Size
from stepwell.tensors import Tensor


@dataclass(frozen=True)
class Outcome(Part):
    """R (N,), the reward as it was given."""

    rewarded = True

    def __call__(self, batch: Batch) -> Tensor:
        return batch.reward


@dataclass(frozen=True)
class DivergencePenalty(Part):
    """-beta sum_t (log pi_old - log pi_ref), (N,): the KL penalty in the reward.

    With reward-to-go or whole-sequence credit its expected gradient is exactly that of -beta KL(pi || ref) of
    sequences. No per-step penalty in the loss has this gradient: it leaves out how steps change the states visited.
    """

    beta: float

    @property
    def reads(self) -> frozenset[Read]:
        return frozenset({Read("reference", "log_prob")} if self.beta else ())

    def __call__(self, batch: Batch) -> Tensor:
        if not self.beta:
            return batch.rows.log_prob.new_zeros(len(batch))
        return -self.beta * batch.row_sum(batch.old - batch.reference)[:, 0]


@dataclass(frozen=True)
class Overlong(Part):
    """DAPO's soft overlong punishment (N,): 0 up to `maximum - buffer` steps, then linearly down to -1.

    `maximum` defaults to the run's horizon, and the buffer is a share of it: the paper's 4096 of 20480 is 0.2.
    Source: DAPO, arXiv 2503.14476, equation 13. A length is the number of steps that the policy drew, as the horizon
    is: what an environment says in a conversation is not the policy's to shorten.
    """

    maximum: Size | None = None
    buffer: Portion = 0.2

    def __call__(self, batch: Batch) -> Tensor:
        maximum = self.maximum or batch.counts.length
        return overlong_penalty(batch.rows.mask.sum(1), maximum, self.buffer * maximum).to(batch.rows.log_prob.dtype)


@dataclass(frozen=True)
class Bounded(Part):
    """A part's values clipped to +-bound, so that one lucky sample does not rule a batch (common for flows)."""

    part: Part = field(default_factory=Outcome)
    bound: Positive = 5.0

    def __call__(self, batch: Batch) -> Tensor:
        return self.part(batch).clamp(-self.bound, self.bound)
