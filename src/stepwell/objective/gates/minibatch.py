"""Gates that compare the steps of a whole minibatch under the present policy, planned anew before every update."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

from stepwell.batch import Batch
from stepwell.objective.gates.step import Gate
from stepwell.ranges import Portion, Range, Width
from stepwell.rng import Rng
from stepwell.tensors import Tensor, functional, torch


def covariance(batch: Batch, advantage: Tensor) -> Tensor:
    """c (N, T) = (A - mean A) (log pi - mean log pi), means over all trained steps; minus infinity elsewhere.

    To first order a step of the policy gradient changes the entropy by minus its mean (arXiv 2505.22617).
    """
    number = batch.mask.sum().clamp(min=1)
    centred = [x - (x * batch.mask).sum() / number for x in (advantage, batch.log_prob.detach())]
    return (centred[0] * centred[1]).masked_fill(~batch.rows.mask, -torch.inf)


def _share(fraction: float, batch: Batch) -> int:
    """The number of trained steps that a fraction is, at least one."""
    return max(1, int(fraction * int(batch.rows.mask.sum())))


@dataclass(frozen=True)
class TopCovariance(Gate):
    """1 for the `fraction` of steps with the highest covariance of advantage and log-probability, else 0 (KL-Cov).

    At least one step; of steps that tie the first drawn are taken, wherever they stand in the batch.
    """

    fraction: Portion = 2e-4
    when = "minibatch"

    def __call__(self, batch: Batch, log_ratio: Tensor | None, advantage: Tensor) -> Tensor:
        trained = batch.rows.mask
        order = batch.rows.node[trained].argsort(stable=True)
        values = covariance(batch, advantage)[trained][order]
        top = order[values.argsort(descending=True, stable=True)[: _share(self.fraction, batch)]]
        chosen, weight = torch.zeros_like(values), torch.zeros_like(batch.mask)
        chosen[top] = 1.0
        weight[trained] = chosen
        return weight


@dataclass(frozen=True)
class DropCovariance(Gate):
    """0 for a random choice of steps whose covariance lies between `low` and `high`, else 1 (Clip-Cov).

    Of the steps in the window that the clip at `clip_low`, `clip_high` leaves alone, the `fraction` of all trained
    steps, at least one, is dropped. The window is absolute: it depends on the scale of A. The choice is drawn from
    `seed` and the version of the rows; it is of nodes, so that neither order nor padding matters.
    """

    fraction: Portion = 2e-4
    low: float = 1.0
    high: float = 5.0
    clip_low: Width = 0.2
    clip_high: Width = 0.2
    seed: int = 0
    when = "minibatch"

    def __call__(self, batch: Batch, log_ratio: Tensor | None, advantage: Tensor) -> Tensor:
        assert log_ratio is not None
        values, ratio = covariance(batch, advantage), log_ratio.exp()
        clipped = ((ratio > 1 + self.clip_high) & (advantage > 0)) | ((ratio < 1 - self.clip_low) & (advantage < 0))
        candidates = (values > self.low) & (values < self.high) & ~clipped
        nodes, place = batch.rows.node[batch.rows.mask].unique(return_inverse=True)
        rng = Rng(self.seed).split("covariance", int(batch.rows.version.max()))
        lot = torch.full_like(values, 2.0, dtype=torch.float64)
        lot[batch.rows.mask] = rng.uniform(len(nodes), dtype=torch.float64).to(place.device)[place]
        drawn = lot[candidates].sort().values[: _share(self.fraction, batch)]
        return (~candidates | (lot > drawn[-1])).to(batch.mask.dtype) if len(drawn) else torch.ones_like(batch.mask)


@dataclass(frozen=True)
class SecondMoment(Gate):
    """Drop the steps with the largest (log r)^2 until the mean of those that are left is at most `threshold` (M2PO).

    Only steps that moved on in the direction of their advantage are looked at, those with A log r > 0; all others
    train. Of steps that tie at the border all are dropped. Source: arXiv 2510.01161.
    """

    threshold: Width = 0.04
    when = "minibatch"

    def __call__(self, batch: Batch, log_ratio: Tensor | None, advantage: Tensor) -> Tensor:
        assert log_ratio is not None
        moved = (advantage * log_ratio > 0) & batch.rows.mask
        square = log_ratio.detach() ** 2
        ordered = square[moved].sort().values
        mean = ordered.cumsum(0) / torch.arange(1, len(ordered) + 1, device=ordered.device)
        dropped = ordered[mean > self.threshold]  # the means rise, so that these are the last
        border = float(dropped[0]) if len(dropped) else math.inf
        return (~(moved & (square >= border))).to(batch.mask.dtype)


@dataclass(frozen=True)
class EntropyChange(Gate):
    """w = exp(-k |O|): the more a step would change the entropy of its distribution, the less it counts (STEER).

    O = r A (1 - pi) (log pi + H), the paper's estimate, and k such that the largest |O| of the minibatch, or 0.02
    where that is larger, has weight `least`. With `exact`, O = r A (pi (log pi + H) - sum_v pi_v^2 (log pi_v + H)),
    which is minus the first-order change itself per unit of a step in the logits along r A (e_a - pi); it reads all
    logits. Source: arXiv 2510.10150.
    """

    least: Portion = 0.8
    exact: bool = False
    when = "minibatch"

    @property
    def present(self) -> frozenset[str]:
        return frozenset({"entropy", "logits"} if self.exact else {"entropy"})

    def change(self, batch: Batch, advantage: Tensor) -> Tensor:
        """O (N, T), 0 where nothing is trained."""
        present, entropy = batch.log_prob.detach(), batch.present("entropy").detach()
        surprise = present + entropy
        if self.exact:
            logits = batch.present("logits").detach()
            terms = (2 * logits).exp() * (logits + entropy[..., None])
            slope = present.exp() * surprise - torch.where(logits > -torch.inf, terms, 0.0).sum(-1)
        else:
            slope = -torch.expm1(present) * surprise
        ratio = ((present - batch.old) * batch.mask).exp()
        return ratio * advantage * slope * batch.mask

    def __call__(self, batch: Batch, log_ratio: Tensor | None, advantage: Tensor) -> Tensor:
        change = self.change(batch, advantage).abs()
        return (math.log(self.least) * change / change.max().clamp(min=0.02)).exp()


@dataclass(frozen=True)
class HiddenReward(Gate):
    """1 + p sign(THR): steps that raise the likelihood of the good answers to their prompt count more, others less.

    THR_k = A_k sum_t <h_k, h_t> <e_k - pi_k, e_t - pi_t>, t over the steps of the prompt's rows with A > 0, h the last
    hidden state, e the step's token and pi its distribution: the change, to first order, of the log-likelihood of those
    rows by the step's policy gradient in the output layer. p > 0 exploits, p < 0 explores. It reads all logits and
    hidden states, and compares every two steps of a prompt. Source: arXiv 2510.03669, without its threshold on |THR|.
    """

    p: Annotated[float, Range("a number from -1 to 1", -1, 1)] = 0.1
    when = "minibatch"
    present = frozenset({"hidden", "logits"})

    def influence(self, batch: Batch, advantage: Tensor) -> Tensor:
        """THR (N, T), 0 where nothing is trained."""
        influence = torch.zeros_like(batch.mask)
        for prompt in batch.rows.prompt.unique():
            steps = batch.rows.mask & (batch.rows.prompt == prompt)[:, None]
            hidden, chance = batch.present("hidden")[steps], batch.present("logits")[steps].exp()
            error = functional.one_hot(batch.rows.action[steps], chance.shape[-1]).to(chance.dtype) - chance
            own = advantage[steps]
            good = own > 0
            likeness = (hidden @ hidden[good].T) * (error @ error[good].T)
            influence[steps] = own * likeness.sum(1).to(influence.dtype)
        return influence

    def __call__(self, batch: Batch, log_ratio: Tensor | None, advantage: Tensor) -> Tensor:
        return 1 + self.p * self.influence(batch, advantage).sign()
