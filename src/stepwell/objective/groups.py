"""Losses that couple the rows of a prompt and are no sum over pairs: consistency, posterior matching."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from stepwell.objective.pairs import SequenceScore
from stepwell.objective.state import State, value_of
from stepwell.objective.term import Coupling, Loss, Term
from stepwell.parts import Batch, Part


class GroupFunction(Part):
    """Maps one group's scores (n,), rewards (n,) and log-proposals (n,) to a scalar loss."""

    def __call__(self, score: Tensor, reward: Tensor, proposal: Tensor) -> Tensor:  # type: ignore[override]
        raise NotImplementedError(f"{type(self).__name__} gives no loss.")


@dataclass(frozen=True)
class Consistency(GroupFunction):
    """CoPG: the mean over pairs of (x_i - x_j)^2 / 2, x = R - beta s; zero at ref exp(R / beta) / Z for any samples.

    On policy its expected gradient is -2 beta that of E R - beta KL(pi || ref); cards_objectives.md section 5.2.
    """

    beta: float = 0.1

    def __call__(self, score: Tensor, reward: Tensor, proposal: Tensor) -> Tensor:  # type: ignore[override]
        x = reward - self.beta * score
        pairs = max(len(x) * (len(x) - 1), 1)  # ordered; a row is no pair with itself
        return 0.5 * ((x[:, None] - x) ** 2).sum() / pairs


@dataclass(frozen=True)
class PosteriorMatching(GroupFunction):
    """BRAIn: -sum_i (a_i - b_i) s_i with a = softmax(log target - log proposal), b = softmax(log pi - log proposal).

    The target is ref exp(R / beta); the gradient is zero at it for any samples; cards_objectives.md section 5.2.
    The score must be against the reference, so that log pi = s + log ref and log ref cancels.
    """

    beta: float = 0.1

    def __call__(self, score: Tensor, reward: Tensor, proposal: Tensor) -> Tensor:  # type: ignore[override]
        target = (reward / self.beta - proposal).softmax(0)
        present = (score - proposal).softmax(0)
        return -((target - present).detach() * score).sum()


@dataclass(frozen=True)
class GroupLoss(Term):
    """coefficient * the mean over prompts of a function of the group's scores.

    A group that does not fit a micro-batch is still exact: the loop takes the loss's gradient in log_prob on the
    whole group first and sends it back piece by piece.
    """

    function: GroupFunction = field(default_factory=Consistency)
    score: Part = field(default_factory=SequenceScore)
    coefficient: float | State = 1.0
    coupling: Coupling = "groups"

    def loss(self, batch: Batch, targets: Mapping[str, Tensor]) -> Loss:
        score, reward, prompt = self.score(batch), batch.reward, batch.rows.prompt
        # the proposal relative to the reference, because the score is relative to it as well
        proposal = score.detach() - batch.row_sum(batch.log_prob - batch.behaviour)[:, 0].detach()
        losses = [
            self.function(score[rows], reward[rows], proposal[rows])
            for rows in (prompt == key for key in prompt.unique())
        ]
        value = value_of(self.coefficient, batch) * torch.stack(losses).sum() / batch.counts.groups
        return Loss(value, {"group_loss": value.detach()})
