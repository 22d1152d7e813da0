"""Preference losses on pairs built from groups: which rows are compared, how each is scored, and the link."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from stepwell.credit.group import group_index, group_sum, top_of_groups
from stepwell.errors import InputError
from stepwell.objective.state import State, value_of
from stepwell.objective.term import Coupling, Loss, Term
from stepwell.parts import Batch, Part


@dataclass(frozen=True)
class SequenceScore(Part):
    """s (N,) = the sum, or the mean, over a row's steps of log pi - log reference; `against` none leaves the latter."""

    mean: bool = False
    against: Literal["reference", "old", "none"] = "reference"

    @property
    def reads(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({"reference_log_prob"} if self.against == "reference" else ())

    def __call__(self, batch: Batch) -> Tensor:
        values = batch.log_prob if self.against == "none" else batch.log_prob - getattr(batch, self.against)
        score = batch.row_sum(values)[:, 0]
        return score / batch.steps[:, 0] if self.mean else score


class Link(Part):
    """Maps the scores of chosen and rejected rows, each (P,), to a loss (P,); cards_objectives.md section 5.1."""

    def __call__(self, chosen: Tensor, rejected: Tensor) -> Tensor:  # type: ignore[override]
        raise NotImplementedError(f"{type(self).__name__} gives no loss.")


@dataclass(frozen=True)
class Logistic(Link):
    """-(1-e) log sigmoid(beta x - margin) - e log sigmoid(-(beta x - margin)), x = s_chosen - s_rejected.

    DPO (Rafailov et al. 2023, equation 7); `smoothing` e > 0 is conservative DPO.
    """

    beta: float = 0.1
    smoothing: float = 0.0
    margin: float = 0.0

    def __call__(self, chosen: Tensor, rejected: Tensor) -> Tensor:  # type: ignore[override]
        logit = self.beta * (chosen - rejected) - self.margin
        return -(1 - self.smoothing) * logsigmoid(logit) - self.smoothing * logsigmoid(-logit)


@dataclass(frozen=True)
class Square(Link):
    """IPO: (x - 1 / (2 beta))^2 (Azar et al. 2023, equation 17)."""

    beta: float = 0.1

    def __call__(self, chosen: Tensor, rejected: Tensor) -> Tensor:  # type: ignore[override]
        return (chosen - rejected - 1 / (2 * self.beta)) ** 2


@dataclass(frozen=True)
class Hinge(Link):
    """relu(1 - beta x) (SLiC, Zhao et al. 2023)."""

    beta: float = 0.1

    def __call__(self, chosen: Tensor, rejected: Tensor) -> Tensor:  # type: ignore[override]
        return relu(1 - self.beta * (chosen - rejected))


@dataclass(frozen=True)
class Pairing(Part):
    """Which rows of a group stand on which side, (N, 2) bool: chosen, rejected.

    `extremes`: the best against the worst; `mean`: every row above its group's mean against every row below it;
    `all`: every two rows. A pair needs a strictly larger reward on the chosen side, so a group of equals has none.
    Rows are compared within a group of equal `keys`: the prompt, and where they branch their `origin` too.
    """

    kind: Literal["extremes", "mean", "all"] = "extremes"
    keys: tuple[str, ...] = ("prompt",)
    compares = True

    def group(self, batch: Batch) -> tuple[Tensor, int]:
        """Dense numbers (N,) of the rows' groups, and how many there are."""
        return group_index(torch.stack([batch.field(key) for key in self.keys], 1))

    def __call__(self, batch: Batch) -> Tensor:
        reward = batch.reward
        group, groups = self.group(batch)
        if self.kind == "all":
            return torch.ones_like(reward, dtype=torch.bool)[:, None].expand(-1, 2).contiguous()
        if self.kind == "mean":
            mean = group_sum(reward, group, groups) / group_sum(torch.ones_like(reward), group, groups)
            return torch.stack([reward > mean, reward < mean], 1)
        if self.kind == "extremes":
            sides = torch.zeros(len(reward), 2, dtype=torch.bool, device=reward.device)
            sides[top_of_groups(reward, group, groups), 0] = True
            sides[top_of_groups(-reward, group, groups), 1] = True
            return sides
        raise InputError(f"Pairing has no kind '{self.kind}'; extremes, mean or all is right.")


def pairs_of(reward: Tensor, group: Tensor, sides: Tensor) -> tuple[Tensor, Tensor]:
    """(P,), (P,) rows of the chosen and the rejected: same group, right sides, strictly larger reward."""
    match = (group[:, None] == group) & sides[:, 0, None] & sides[:, 1] & (reward[:, None] > reward)
    chosen, rejected = match.nonzero(as_tuple=True)
    return chosen, rejected


@dataclass(frozen=True)
class Pairs(Term):
    """coefficient * the mean over pairs of link(s_chosen, s_rejected), pairs built within each prompt's group."""

    link: Link = field(default_factory=Logistic)
    score: Part = field(default_factory=SequenceScore)
    pairing: Pairing = field(default_factory=Pairing)
    coefficient: float | State = 1.0
    coupling: Coupling = "groups"

    def credit(self, batch: Batch) -> dict[str, Tensor]:
        return {"sides": self.pairing(batch)}

    def plan(self, batch: Batch, targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
        chosen, _ = pairs_of(batch.reward, self.pairing.group(batch)[0], targets["sides"])
        return {"share": torch.full_like(batch.reward, 1.0 / max(len(chosen), 1))}

    def loss(self, batch: Batch, targets: Mapping[str, Tensor]) -> Loss:
        score, share = self.score(batch), targets["share"]
        chosen, rejected = pairs_of(batch.reward, self.pairing.group(batch)[0], targets["sides"])
        losses = self.link(score[chosen], score[rejected]) * share[chosen]
        value = value_of(self.coefficient, batch) * losses.sum()
        right = (score[chosen] > score[rejected]).to(score.dtype) * share[chosen]
        return Loss(value, {"pair_loss": value.detach(), "pair_accuracy": right.sum()})
