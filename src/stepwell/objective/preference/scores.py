"""Scores of the rows of a preference pair, beyond a sum of log-ratios: divergences, lengths, tokens, steps."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from stepwell.batch import Batch, Read
from stepwell.errors import InputError
from stepwell.objective.preference.pairs import Against, PairScore, SequenceScore, log_ratio, read_for, sides_of
from stepwell.parts import Part
from stepwell.ranges import Positive, Share
from stepwell.tensors import Tensor, functional, torch


@dataclass(frozen=True)
class ImplicitReward(Part, PairScore):
    """f'(e^s) (N,) of a row's score s, for the divergence that keeps the policy near what s is measured against.

    `reverse-kl`: s itself (DPO). `forward-kl`: 1 - e^-s. `js`: log 2 + log sigmoid(s). `alpha`: (e^((alpha-1) s) - 1)
    / (alpha - 1), whose limit at 1 is s; on mean log-probabilities it is AlphaPO's reward with 1 - alpha for its
    alpha. `mean` divides by the row's steps afterwards. Source: f-DPO (Wang et al. 2023, arXiv 2309.16240).
    """

    score: Part | PairScore = field(default_factory=SequenceScore)
    divergence: Literal["reverse-kl", "forward-kl", "js", "alpha"] = "reverse-kl"
    alpha: float = 0.5
    mean: bool = False

    def _transformed(self, s: Tensor) -> Tensor:
        if self.divergence == "forward-kl":
            return 1 - torch.exp(-s)
        if self.divergence == "js":
            return math.log(2.0) + functional.logsigmoid(s)
        if self.divergence == "alpha" and abs(self.alpha - 1.0) > 1e-6:
            return torch.expm1((self.alpha - 1.0) * s) / (self.alpha - 1.0)
        return s

    def __call__(self, batch: Batch) -> Tensor:
        if isinstance(self.score, PairScore) and not isinstance(self.score, Part):
            raise InputError(
                "ImplicitReward.score must be a Part where rows are scored one by one, got "
                f"{type(self.score).__name__}, which scores the two sides of pairs."
            )
        value = self._transformed(self.score(batch))
        return value / batch.steps[:, 0] if self.mean else value

    def sides(self, batch: Batch, chosen: Tensor, rejected: Tensor) -> tuple[Tensor, Tensor]:
        won, lost = (self._transformed(s) for s in sides_of(self.score, batch, chosen, rejected))
        if self.mean:
            won, lost = won / batch.steps[chosen, 0], lost / batch.steps[rejected, 0]
        return won, lost


@dataclass(frozen=True)
class LengthDesensitised(PairScore):
    """LD-DPO: log-ratios beyond the shorter row of a pair count `tail` times (Liu et al. 2024, arXiv 2409.06411).

    `tail` 1 is DPO, 0 leaves the excess out.
    """

    tail: Share = 0.5
    against: Against = "reference"

    @property
    def reads(self) -> frozenset[Read]:
        return read_for(self.against)

    def sides(self, batch: Batch, chosen: Tensor, rejected: Tensor) -> tuple[Tensor, Tensor]:
        values, place = log_ratio(batch, self.against) * batch.mask, batch.mask.cumsum(1)
        shared = torch.minimum(batch.mask[chosen].sum(1), batch.mask[rejected].sum(1))[:, None]

        def side(rows: Tensor) -> Tensor:
            inside = torch.where(place[rows] <= shared, values[rows], self.tail * values[rows])
            return inside.sum(1)

        return side(chosen), side(rejected)


@dataclass(frozen=True)
class TokenGuided(PairScore):
    """TGDPO: each step's log-ratio times 1 +- alpha beta (log guide - log reference), + for the chosen side.

    The guide is the run's `teacher`, an earlier DPO model. alpha = 0 is DPO; factors may be negative, as they are
    in the authors' code. Source: TGDPO, arXiv 2506.14574.
    """

    alpha: float = 0.5
    beta: Positive = 0.1
    reads = frozenset({Read("reference", "log_prob"), Read("teacher", "log_prob")})

    def sides(self, batch: Batch, chosen: Tensor, rejected: Tensor) -> tuple[Tensor, Tensor]:
        guide = self.alpha * self.beta * (batch.field("teacher_log_prob") - batch.reference)
        values = log_ratio(batch, "reference")
        won, lost = batch.row_sum(values * (1 + guide))[:, 0], batch.row_sum(values * (1 - guide))[:, 0]
        return won[chosen], lost[rejected]


@dataclass(frozen=True)
class Parting(PairScore):
    """Step-DPO: the log-ratio of the step in which the two rows of a pair part, and of no other (arXiv 2406.18629).

    The steps before it, which they share, cancel; those after it are left out. Steps are the rows' `segment`s.
    """

    against: Against = "reference"

    @property
    def reads(self) -> frozenset[Read]:
        return read_for(self.against) | {Read("rows", "segment")}

    def sides(self, batch: Batch, chosen: Tensor, rejected: Tensor) -> tuple[Tensor, Tensor]:
        rows, values = batch.rows, log_ratio(batch, self.against) * batch.mask
        places, segment = torch.arange(values.shape[1], device=values.device), batch.field("segment")
        happened = places < rows.length[:, None]
        same = (rows.action[chosen] == rows.action[rejected]) & happened[chosen] & happened[rejected]
        first = (~same).int().argmax(1)  # where one row has ended, the other's next step is where they part

        def side(mine: Tensor) -> Tensor:
            last = (rows.length[mine] - 1).clamp(min=0)
            parting = segment[mine].gather(1, torch.minimum(first, last)[:, None])
            inside = (segment[mine] == parting) & (places >= first[:, None])
            return (values[mine] * inside).sum(1)

        return side(chosen), side(rejected)


@dataclass(frozen=True)
class MeanRatio(Part):
    """The mean over a row's steps of pi / pi_old, (N,)."""

    def __call__(self, batch: Batch) -> Tensor:
        ratio = ((batch.log_prob - batch.old) * batch.mask).exp()
        return (batch.row_sum(ratio) / batch.steps)[:, 0]


@dataclass(frozen=True)
class OnPolicyWeight(Part):
    """WPO: exp of the mean over steps of log pi(a) - log sum_v pi(v)^2, (N,): large for rows of the policy's own kind.

    Source: Zhou et al. 2024, arXiv 2406.11827, equation 2.
    """

    needs = frozenset({"sum_of_squares"})

    def __call__(self, batch: Batch) -> Tensor:
        squares = torch.where(batch.rows.mask, batch.present("sum_of_squares"), 1.0)
        return (batch.row_sum(batch.log_prob - squares.log()) / batch.steps)[:, 0].exp()
