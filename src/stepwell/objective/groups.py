"""Losses that couple the rows of a prompt, other than sums over pairs: consistency, posteriors, discrimination."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

from stepwell.batch import Batch
from stepwell.objective.preference.pairs import SequenceScore
from stepwell.objective.state import Coefficient, value_of
from stepwell.objective.term import Coupling, Loss, Term
from stepwell.parts import Node, Part
from stepwell.ranges import Positive
from stepwell.tensors import Tensor, functional, torch


class GroupFunction(Node, ABC):
    """Maps one group's scores (n,), rewards (n,) and log-proposals (n,) to a scalar loss."""

    @abstractmethod
    def __call__(self, score: Tensor, reward: Tensor, proposal: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Consistency(GroupFunction):
    """CoPG: the mean over pairs of (x_i - x_j)^2 / 2, x = R - beta s; zero at ref exp(R / beta) / Z for any samples.

    On policy its expected gradient is -2 beta times that of E R - beta KL(pi || ref).
    """

    beta: Positive = 0.1

    def __call__(self, score: Tensor, reward: Tensor, proposal: Tensor) -> Tensor:
        x = reward - self.beta * score
        pairs = max(len(x) * (len(x) - 1), 1)  # ordered; a row is no pair with itself
        return 0.5 * ((x[:, None] - x) ** 2).sum() / pairs


@dataclass(frozen=True)
class PosteriorMatching(GroupFunction):
    """BRAIn: -sum_i (a_i - b_i) s_i with a = softmax(log target - log proposal), b = softmax(log pi - log proposal).

    The target is ref exp(R / beta), at which the gradient is zero for any samples. The score must be against the
    reference, so that log pi = s + log ref and log ref cancels.
    """

    beta: Positive = 0.1

    def __call__(self, score: Tensor, reward: Tensor, proposal: Tensor) -> Tensor:
        target = (reward / self.beta - proposal).softmax(0)
        present = (score - proposal).softmax(0)
        return -((target - present).detach() * score).sum()


def win_rates(reward: Tensor) -> Tensor:
    """(n,) each row's mean probability, by Bradley and Terry's model of rewards, to beat another row of its group."""
    others = max(len(reward) - 1, 1)
    return (torch.sigmoid(reward[:, None] - reward).sum(1) - 0.5) / others


@dataclass(frozen=True)
class NashRegression(GroupFunction):
    """DNO: the mean over pairs of -p log sigmoid(x) - (1-p) log sigmoid(-x), x = beta (s_i - s_j).

    p = sigmoid(r_i - r_j) for the rows' win rates r. Flat at ref exp(r / beta) / Z for any samples (Rosset et al.
    2024, arXiv 2404.03715, equation 10).
    """

    beta: Positive = 0.1

    def __call__(self, score: Tensor, reward: Tensor, proposal: Tensor) -> Tensor:
        rate = win_rates(reward)
        label = torch.sigmoid(rate[:, None] - rate)
        logit = self.beta * (score[:, None] - score)
        losses = -label * functional.logsigmoid(logit)  # ordered pairs: (j, i) is the other half of (i, j)
        losses = losses.masked_fill(torch.eye(len(score), dtype=torch.bool, device=score.device), 0.0)
        return 2 * losses.sum() / max(len(score) * (len(score) - 1), 1)


@dataclass(frozen=True)
class SelfPlay(GroupFunction):
    """SPPO: the mean over rows of (s - (P - 1/2) / beta)^2, P the row's win rate (arXiv 2405.00675, equation 4.7)."""

    beta: Positive = 0.1

    def __call__(self, score: Tensor, reward: Tensor, proposal: Tensor) -> Tensor:
        return ((score - (win_rates(reward) - 0.5) / self.beta) ** 2).mean()


@dataclass(frozen=True)
class Discriminative(GroupFunction):
    """DisCO: -mean_pos [s - tau log mean_neg exp(s_neg / tau)], rows with a reward above `threshold` being positive.

    `temperature` tau, None for the difference of the two means. A prompt without both kinds gives 0 and still counts.
    Source: Li et al. 2025, arXiv 2505.12366.
    """

    temperature: Positive | None = 10.0
    threshold: float = 0.5

    def __call__(self, score: Tensor, reward: Tensor, proposal: Tensor) -> Tensor:
        good = reward > self.threshold
        if not bool(good.any()) or bool(good.all()):
            return 0.0 * score.sum()
        if self.temperature is None:
            return score[~good].mean() - score[good].mean()
        bad = (score[~good] / self.temperature).logsumexp(0) - math.log(int((~good).sum()))
        return self.temperature * bad - score[good].mean()


@dataclass(frozen=True)
class OrderPreserving(GroupFunction):
    """OP-GFN: -mean_best log softmax(beta s), the cross-entropy of the group's best rows, all alike, and of exp(s).

    exp(s) is the reward that the policy itself implies, up to a constant: only the order of rewards is read. A group
    of equals gives 0. Source: Order-Preserving GFlowNets, arXiv 2310.00386, with a certain backward policy.
    """

    beta: Positive = 1.0

    def __call__(self, score: Tensor, reward: Tensor, proposal: Tensor) -> Tensor:
        best = reward == reward.max()
        return 0.0 * score.sum() if bool(best.all()) else -(self.beta * score).log_softmax(0)[best].mean()


@dataclass(frozen=True)
class TrustRegion(Term):
    """coefficient / 2 * max(KL - limit, 0)^2 of the minibatch, KL = the mean over steps of log pi_old - log pi.

    The divergence is that of the whole minibatch, so it is planned; the loss is its tangent there, whose value and
    gradient are the penalty's.
    """

    limit: float = 1e-4
    coefficient: float | Coefficient = 1e3
    present = frozenset({"log_prob"})

    def plan(self, batch: Batch, targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
        divergence = ((batch.old - batch.log_prob) * batch.mask).sum() / batch.counts.steps
        gap = (divergence - self.limit).clamp(min=0)
        share = torch.ones_like(batch.rows.log_prob[:, 0]) / batch.counts.rows
        return {"gap": gap.expand(len(batch)).clone(), "offset": (0.5 * gap**2 - gap * divergence) * share}

    def loss(self, batch: Batch, targets: Mapping[str, Tensor]) -> Loss:
        divergence = batch.row_sum(batch.old - batch.log_prob)[:, 0] / batch.counts.steps
        value = (targets["gap"] * divergence + targets["offset"]).sum() * value_of(self.coefficient, batch)
        return Loss(value, {"trust_region": value.detach(), "old_divergence": divergence.detach().sum()})


@dataclass(frozen=True)
class GroupLoss(Term):
    """coefficient * the mean over prompts of a function of the group's scores.

    A group that does not fit a micro-batch is still exact: the loop takes the loss's gradient in log_prob on the
    whole group first and sends it back piece by piece.
    """

    function: GroupFunction = field(default_factory=Consistency)
    score: Part = field(default_factory=SequenceScore)
    coefficient: float | Coefficient = 1.0
    coupling: Coupling = "groups"
    rewarded = True

    def loss(self, batch: Batch, targets: Mapping[str, Tensor]) -> Loss:
        score, reward, prompt = self.score(batch), batch.reward, batch.rows.prompt
        # the proposal relative to the reference, because the score is relative to it as well
        proposal = score.detach() - batch.row_sum(batch.log_prob - batch.behaviour)[:, 0].detach()
        groups = (prompt == key for key in prompt.unique())
        losses = [self.function(score[rows], reward[rows], proposal[rows]) for rows in groups]
        value = value_of(self.coefficient, batch) * torch.stack(losses).sum() / batch.counts.groups
        return Loss(value, {"group_loss": value.detach()})
