"""Preference losses on pairs built from groups: the pairing of rows, the score of each, and the link."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal, assert_never

from stepwell.batch import Batch, Read, notes
from stepwell.credit.group import group_index, group_sum, top_of_groups
from stepwell.objective.state import Coefficient, value_of
from stepwell.objective.term import Coupling, Loss, Term
from stepwell.parts import Node, Part
from stepwell.ranges import Positive, Range
from stepwell.tensors import Tensor, functional, torch

Against = Literal["reference", "old", "teacher", "none"]


def log_ratio(batch: Batch, against: Against) -> Tensor:
    """(N, T) log pi less the log-probability that it is measured against; log pi itself for `none`."""
    if against == "none":
        return batch.log_prob
    return batch.log_prob - batch.under("teacher_log_prob" if against == "teacher" else against)


def read_for(against: Against) -> frozenset[Read]:
    """The field that `log_ratio` reads and that has to be filled."""
    if against == "reference" or against == "teacher":
        return frozenset({Read(against, "log_prob")})
    return frozenset()


@dataclass(frozen=True)
class SequenceScore(Part):
    """s (N,) = the sum, or the mean, over a row's steps of log pi - log reference; of log pi where `against` is none.

    `weight`: a constant factor for each step, (N, T), where steps are not to count alike.
    """

    mean: bool = False
    against: Against = "reference"
    weight: Part | None = None

    @property
    def reads(self) -> frozenset[Read]:
        return read_for(self.against)

    def __call__(self, batch: Batch) -> Tensor:
        values = log_ratio(batch, self.against)
        if self.weight is not None:
            values = values * self.weight(batch).detach()
        score = batch.row_sum(values)[:, 0]
        return score / batch.steps[:, 0] if self.mean else score


class PairScore(Node, ABC):
    """A score that judges a row by its counterpart in the pair too."""

    @abstractmethod
    def sides(self, batch: Batch, chosen: Tensor, rejected: Tensor) -> tuple[Tensor, Tensor]:
        """(P,), (P,) scores of the two sides of each pair, for the rows (P,) that stand on them."""


def sides_of(score: Part | PairScore, batch: Batch, chosen: Tensor, rejected: Tensor) -> tuple[Tensor, Tensor]:
    """(P,), (P,) scores of the two sides of each pair."""
    if isinstance(score, PairScore):
        return score.sides(batch, chosen, rejected)
    scores = score(batch)
    return scores[chosen], scores[rejected]


class Link(Node, ABC):
    """Maps the scores of chosen and rejected rows, each (P,), to a loss (P,).

    For a loss of several links, add terms: `0.5 * Pairs(Logistic()) + 0.5 * Pairs(Hinge())`.
    """

    def at(self, batch: Batch) -> Link:
        """The link with the present values of its coefficients."""
        return self

    @abstractmethod
    def __call__(self, chosen: Tensor, rejected: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Logistic(Link):
    """-(1-e) log sigmoid(beta x - margin) - e log sigmoid(-(beta x - margin)), x = s_chosen - s_rejected.

    DPO (Rafailov et al. 2023, equation 7); `smoothing` e > 0 is conservative DPO.
    """

    beta: Positive = 0.1
    smoothing: Annotated[float, Range("a number from 0 to 1/2", 0, 0.5)] = 0.0
    margin: float = 0.0

    def __call__(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        logit = self.beta * (chosen - rejected) - self.margin
        return -(1 - self.smoothing) * functional.logsigmoid(logit) - self.smoothing * functional.logsigmoid(-logit)


@dataclass(frozen=True)
class Square(Link):
    """IPO: (x - 1 / (2 beta))^2 (Azar et al. 2023, equation 17)."""

    beta: Positive = 0.1

    def __call__(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return (chosen - rejected - 1 / (2 * self.beta)) ** 2


@dataclass(frozen=True)
class Hinge(Link):
    """relu(1 - beta x) (SLiC, Zhao et al. 2023)."""

    beta: Positive = 0.1

    def __call__(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return functional.relu(1 - self.beta * (chosen - rejected))


@dataclass(frozen=True)
class Pairing(Part):
    """The sides on which the rows of a group stand, (N, 2) bool: chosen, rejected.

    `extremes`: the best against the worst; `mean`: every row above its group's mean against every row below it;
    `all`: every two rows. A pair needs a strictly larger reward on the chosen side, so a group of equals has none.
    Rows are compared within a group of equal `keys`: the prompt, and where they branch their `origin` too.
    """

    kind: Literal["extremes", "mean", "all"] = "extremes"
    keys: tuple[str, ...] = ("prompt",)
    compares = True
    rewarded = True

    @property
    def reads(self) -> frozenset[Read]:
        return notes(self.keys)

    def group(self, batch: Batch) -> tuple[Tensor, int]:
        """Dense numbers (N,) of the rows' groups, and the number of groups."""
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
        assert_never(self.kind)


def pairs_of(reward: Tensor, group: Tensor, sides: Tensor) -> tuple[Tensor, Tensor]:
    """(P,), (P,) rows of the chosen and the rejected: same group, right sides, strictly larger reward."""
    match = (group[:, None] == group) & sides[:, 0, None] & sides[:, 1] & (reward[:, None] > reward)
    chosen, rejected = match.nonzero(as_tuple=True)
    return chosen, rejected


@dataclass(frozen=True)
class Pairs(Term):
    """coefficient * the mean over pairs of link(s_chosen, s_rejected), pairs built within each prompt's group.

    `weight` gives every row a constant w (N,), and each pair counts w_chosen w_rejected.
    """

    link: Link = field(default_factory=Logistic)
    score: Part | PairScore = field(default_factory=SequenceScore)
    pairing: Pairing = field(default_factory=Pairing)
    coefficient: float | Coefficient = 1.0
    coupling: Coupling = "groups"
    weight: Part | None = None

    def credit(self, batch: Batch) -> dict[str, Tensor]:
        return {"sides": self.pairing(batch)}

    def plan(self, batch: Batch, targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
        chosen, _ = pairs_of(batch.reward, self.pairing.group(batch)[0], targets["sides"])
        return {"share": torch.full_like(batch.reward, 1.0 / max(len(chosen), 1))}

    def compare(self, batch: Batch, chosen: Tensor, rejected: Tensor) -> Tensor:
        """(3, P) of each pair the margin s_chosen - s_rejected, the loss, and the mean of the two scores."""
        sides = sides_of(self.score, batch, chosen, rejected)
        return torch.stack([sides[0] - sides[1], self.link.at(batch)(*sides), 0.5 * (sides[0] + sides[1])])

    def loss(self, batch: Batch, targets: Mapping[str, Tensor]) -> Loss:
        share = targets["share"]
        chosen, rejected = pairs_of(batch.reward, self.pairing.group(batch)[0], targets["sides"])
        margin, losses, middle = self.compare(batch, chosen, rejected)
        losses = losses * share[chosen]
        if self.weight is not None:
            weight = self.weight(batch).detach()
            losses = losses * weight[chosen] * weight[rejected]
        value = value_of(self.coefficient, batch) * losses.sum()
        metrics = {
            "pair_loss": value.detach(),
            "pair_accuracy": ((margin > 0).to(margin.dtype) * share[chosen]).sum().detach(),
            "pair_score": (middle * share[chosen]).sum().detach(),
        }
        return Loss(value, metrics)


@dataclass(frozen=True)
class SortedPairs(Pairs):
    """AOT: margins compared as two sorted samples and not pair by pair (Melnyk et al. 2024, arXiv 2406.05882).

    `paired`: the sorted log pi margins of all pairs against the sorted reference margins; else the sorted scores of
    the chosen rows against those of the rejected. The number of pairs in a minibatch is part of the method.
    """

    paired: bool = True
    coupling: Coupling = "batch"
    reads = frozenset({Read("reference", "log_prob")})

    def compare(self, batch: Batch, chosen: Tensor, rejected: Tensor) -> Tensor:
        scores = [batch.row_sum(values)[:, 0] for values in (batch.log_prob, batch.reference)]
        if self.paired:
            first, second = (score[chosen] - score[rejected] for score in scores)
        else:
            ratio = scores[0] - scores[1]
            first, second = ratio[chosen], ratio[rejected]
        sides = first.sort().values, second.sort().values
        return torch.stack([sides[0] - sides[1], self.link.at(batch)(*sides), 0.5 * (sides[0] + sides[1])])


@dataclass(frozen=True)
class ChosenLikelihood(Term):
    """-coefficient * the mean over the steps of chosen rows of log pi, a row counted once for each pair it wins.

    With `rows` it is the mean over pairs of each chosen row's mean.
    """

    pairing: Pairing = field(default_factory=Pairing)
    coefficient: float | Coefficient = 1.0
    rows: bool = False

    def credit(self, batch: Batch) -> dict[str, Tensor]:
        chosen, _ = pairs_of(batch.reward, self.pairing.group(batch)[0], self.pairing(batch))
        return {"wins": torch.zeros_like(batch.reward).index_add_(0, chosen, torch.ones_like(batch.reward)[chosen])}

    def plan(self, batch: Batch, targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
        wins = targets["wins"]
        weight = wins[:, None] * (batch.mask / batch.steps if self.rows else batch.mask)
        number = wins.sum() if self.rows else weight.sum()
        return {"weight": weight / number.clamp(min=1)}

    def loss(self, batch: Batch, targets: Mapping[str, Tensor]) -> Loss:
        value = -value_of(self.coefficient, batch) * (targets["weight"] * batch.log_prob).sum()
        return Loss(value, {"chosen_loss": value.detach()})
