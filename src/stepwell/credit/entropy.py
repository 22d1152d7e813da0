"""Credit scaled by the policy's certainty: each turn's by its entropy and by that of the turn after it."""

from __future__ import annotations

from dataclasses import dataclass

from stepwell.batch import Batch, Read
from stepwell.parts import Part, column
from stepwell.ranges import NotNegative
from stepwell.tensors import Tensor, torch


@dataclass(frozen=True)
class EntropyModulated(Part):
    """A_k g(H_k) + zeta f(H_{k+1}), less its mean over all turns, on every trained step of turn k, (N, T).

    A_k is another credit's mean over the turn, and H_k that of the old policy's entropy; h = (H - min) / (max - min +
    1e-8). The gain g(H) = exp(-k h) / mean of exp(-k h) is the larger the surer the turn; the bonus f(H) =
    exp(-k_future h) is for what leads to a sure turn, and a row's last turn has none. Minima, maxima and means are over
    all turns of the batch, each counted once. Turns are those of `segment`; one without a trained step does not count.

    The reason for the gain: for a softmax distribution pi with logits z, E |d log pi / dz|^2 = 1 - sum_v pi_v^2, so
    that without it the unsure turns move a policy most. Source: EMPG, arXiv 2509.09265, equations 8 to 12.
    """

    credit: Part
    k: float = 1.0
    k_future: float = 1.0
    zeta: NotNegative = 0.1
    reads = frozenset({Read("policy", "entropy"), Read("rows", "segment")})

    def __call__(self, batch: Batch) -> Tensor:
        mask, trained = batch.mask, batch.rows.mask
        numbers, turn = batch.field("segment").unique(return_inverse=True)
        steps = mask.new_zeros(len(mask), len(numbers)).scatter_add(1, turn, mask)  # (N, K) of each turn
        taken = steps > 0
        if not bool(taken.any()):
            return torch.zeros_like(mask)

        def mean(values: Tensor) -> Tensor:
            inside = torch.where(trained, values.to(mask.dtype), 0.0)
            return torch.zeros_like(steps).scatter_add(1, turn, inside) / steps.clamp(min=1)

        entropy, credit = mean(batch.field("entropy")), mean(column(self.credit(batch)))
        low, high = entropy[taken].min(), entropy[taken].max()
        share = (entropy - low) / (high - low + 1e-8)
        gain = torch.exp(-self.k * share)
        modulated = credit * gain / gain[taken].mean()
        modulated = modulated + self.zeta * _next(torch.exp(-self.k_future * share), taken)
        return (modulated - modulated[taken].mean()).gather(1, turn) * mask


def _next(values: Tensor, taken: Tensor) -> Tensor:
    """(N, K) the value of the row's next turn that was taken, 0 after the last."""
    following, carried = torch.zeros_like(values), values.new_zeros(len(values))
    for place in reversed(range(values.shape[1])):
        following[:, place] = carried
        carried = torch.where(taken[:, place], values[:, place], carried)
    return following
