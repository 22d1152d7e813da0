"""Learning from a teacher: its log-probabilities of the student's own steps, or its distribution of every step.

The teacher is another process of the same vocabulary: `sw.train(..., teacher=...)`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from stepwell.batch import Batch, Read
from stepwell.credit.traces import reward_to_go
from stepwell.objective.gates.step import Gate
from stepwell.objective.regularise import Regulariser
from stepwell.objective.state import Coefficient
from stepwell.parts import Part, parts_of
from stepwell.process.models import Models
from stepwell.ranges import Count, NotNegative, Share
from stepwell.rng import Rng
from stepwell.tensors import Tensor, functional, torch
from stepwell.trajectories import Trajectories


@dataclass(frozen=True)
class TeacherAdvantage(Part):
    """log teacher - log pi_old of each step taken, (N, T); `to_go` sums it to the end of the row.

    On policy the score function with it gives the gradient of -KL(pi || teacher): of each state's, with visits
    frozen; with `to_go`, of whole sequences'. `front` > 0 weighs step t by
    1 + front (1 - sum_{s<t} |A_s| / sum_s |A_s|), which TRL calls IW-OPD.
    """

    to_go: bool = False
    front: NotNegative = 0.0
    reads = frozenset({Read("teacher", "log_prob")})

    def __call__(self, batch: Batch) -> Tensor:
        advantage = (batch.field("teacher_log_prob") - batch.old) * batch.mask
        if self.front:
            size = advantage.abs()
            before = size.cumsum(1) - size
            advantage = advantage * (1 + self.front * (1 - before / size.sum(1, keepdim=True).clamp(min=1e-8)))
        return reward_to_go(advantage, batch.mask) if self.to_go else advantage


@dataclass(frozen=True)
class TeacherEstimate(Part):
    """k2 = d^2 / 2 or k3 = exp(-d) - 1 + d of each step, (N, T), with d = log pi - log teacher.

    On policy the expected gradient is that of each state's KL(pi || teacher) for k2, of KL(teacher || pi) for k3.
    """

    estimate: Literal["k2", "k3"] = "k2"
    reads = frozenset({Read("teacher", "log_prob")})

    def __call__(self, batch: Batch) -> Tensor:
        d = (batch.log_prob - batch.field("teacher_log_prob")) * batch.mask
        return 0.5 * d**2 if self.estimate == "k2" else torch.exp(-d) - 1 + d


@dataclass(frozen=True)
class TeacherDivergence(Part):
    """The exact divergence of student S and teacher T at each step, (N, T), over the whole vocabulary.

    beta = 0: KL(T || S); beta = 1: KL(S || T); between: beta KL(T || M) + (1 - beta) KL(S || M), M = (1 - beta) S +
    beta T (Agarwal et al. 2023, arXiv 2306.13649, equation 1). The family jumps at its ends: it falls to 0 as beta
    goes to 0. Divided by beta (1 - beta), as with `scaled`, it goes to the two divergences instead. `top` > 0 keeps
    that many of the teacher's likeliest actions apart and counts all others as one, which is never more than the exact
    divergence, and needs little of the teacher's distribution to be kept (`Distillation` draws it).
    """

    beta: Share = 0.5
    scaled: bool = False
    top: Count = 0
    needs = frozenset({"logits"})

    @property
    def reads(self) -> frozenset[Read]:
        return frozenset(Read("teacher", need) for need in (("ids", "top") if self.top else ("logits",)))

    def __call__(self, batch: Batch) -> Tensor:
        student = batch.present("logits")
        if self.top:
            beyond = (0, 0, 0, student.shape[1] - batch.field("teacher_ids").shape[1])  # rows may have been padded
            student = coarse(student, functional.pad(batch.field("teacher_ids"), beyond))
            teacher = functional.pad(batch.field("teacher_top"), beyond)
        else:
            teacher = batch.field("teacher_logits")
        keep = batch.rows.mask[..., None]  # where no step was trained logits may be anything, minus infinity too
        student, teacher = student.masked_fill(~keep, 0.0), teacher.masked_fill(~keep, 0.0)
        return generalised_divergence(student, teacher, self.beta, self.scaled) * batch.mask


def coarse(logits: Tensor, ids: Tensor) -> Tensor:
    """(N, T, k+1) log-probabilities of the actions `ids` (N, T, k) and of all others; (N, T, k) where none is left."""
    named = logits.gather(-1, ids)
    if ids.shape[-1] == logits.shape[-1]:
        return named
    return torch.cat([named, logits.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)], -1)


@dataclass(frozen=True)
class Distillation(Regulariser):
    """A divergence from the teacher, whose likeliest actions are found once a rollout, a few rows at a time."""

    quantity: Part = field(default_factory=TeacherDivergence)
    coefficient: float | Coefficient = 1.0
    name: str = "teacher_divergence"

    def draw(self, rows: Trajectories, models: Models, rng: Rng) -> dict[str, Tensor]:
        top = max((part.top for part in parts_of(self.quantity) if isinstance(part, TeacherDivergence)), default=0)
        if not top:
            return {}
        teacher, ids, likeliest = models.of("teacher"), [], []
        with torch.no_grad():
            for piece in torch.arange(len(rows)).split(8):
                logits = teacher.score(rows[piece], {"logits"})["logits"]
                ids.append(logits.topk(min(top, logits.shape[-1])).indices)
                likeliest.append(coarse(logits, ids[-1]))
        return {"teacher_ids": torch.cat(ids), "teacher_top": torch.cat(likeliest)}


def generalised_divergence(student: Tensor, teacher: Tensor, beta: float, scaled: bool = False) -> Tensor:
    """(...) the divergence of `TeacherDivergence` from normalised log-probabilities (..., K)."""
    if beta == 0:
        return _divergence(teacher, student)
    if beta == 1:
        return _divergence(student, teacher)
    never = (student == -torch.inf) & (teacher == -torch.inf)  # where the mixture's slope would be no number
    parts = student.masked_fill(never, 0.0) + math.log1p(-beta), teacher.masked_fill(never, 0.0) + math.log(beta)
    mixture = torch.logaddexp(*parts)
    value = beta * _divergence(teacher, mixture) + (1 - beta) * _divergence(student, mixture)
    return value / (beta * (1 - beta)) if scaled else value


def _divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q); what p never does costs nothing, even where q never does it either."""
    impossible = p == -torch.inf
    gap = p.masked_fill(impossible, 0.0) - q.masked_fill(impossible, 0.0)
    return (p.exp() * gap).sum(-1)


@dataclass(frozen=True)
class Failing(Gate):
    """1 for rows with a reward of at most `threshold`, 0 for the others: a teacher only where the student fails."""

    threshold: float = 0.0
    rewarded = True

    def __call__(self, batch: Batch, log_ratio: Tensor | None, advantage: Tensor) -> Tensor:
        return (batch.reward <= self.threshold).to(batch.mask.dtype)[:, None]
