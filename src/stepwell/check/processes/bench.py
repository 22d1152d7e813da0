"""The bench of a process's laws: its rollouts, its scores, and the deviation that numbers may show."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from stepwell.columns import Columns
from stepwell.distributions import Distribution
from stepwell.errors import CannotFork, LawBroken
from stepwell.process.base import Process
from stepwell.rng import Rng
from stepwell.sampling.record import Drawn
from stepwell.sampling.request import Branch, Prompt, Request
from stepwell.sampling.rollout import rollout
from stepwell.trajectories import Trajectories


@dataclass(frozen=True)
class Bench:
    """A process with its prompts (`values`), `group` rows for each, and the deviation allowed, for all laws alike."""

    process: Process
    values: list[Any]
    rng: Rng
    tolerance: float
    group: int
    horizon: int | None

    def requests(self) -> list[Request]:
        return [Request(Prompt(i, value), self.group, horizon=self.horizon) for i, value in enumerate(self.values)]

    def draw(self, process: Process | None = None) -> Drawn:
        return rollout(process or self.process, self.requests(), self.rng.split("draw"))

    def with_branch(self, drawn: Drawn) -> Trajectories:
        """The rows drawn, and two that branch off in the middle of the longest."""
        row = int(drawn.trajectories.length.argmax())
        step = int(drawn.trajectories.length[row]) // 2
        branch = Request(drawn.prompts[row], 2, start=Branch(row, step), horizon=self.horizon)
        more = rollout(self.process, [branch], self.rng.split("branch"), so_far=drawn.trajectories)
        return (drawn + more).trajectories

    def can_fork(self) -> bool:
        state = self.process.start(self.values, self.rng.split("start"))
        try:
            state[torch.zeros(2, dtype=torch.long)]
        except CannotFork:
            return False
        return True

    def score(self, rows: Trajectories, context: Columns | None = None) -> Tensor:
        with torch.no_grad():
            return self.process.score(rows, (), context).log_prob

    def hold(self, law: str, found: Tensor, wanted: Tensor, sentence: str) -> float:
        """The largest deviation of two tensors of one shape; raises `LawBroken` where it is above the tolerance."""
        if found.shape != wanted.shape:
            broken(law, f"{sentence}: it has shape {tuple(found.shape)} instead of {tuple(wanted.shape)}.")
        found, wanted = found.detach().double(), wanted.detach().double()
        difference = torch.where(found == wanted, 0.0, (found - wanted).abs() / (1 + wanted.abs()))
        difference = difference.nan_to_num(nan=math.inf)
        if not difference.numel():
            return 0.0
        worst = float(difference.max())
        if worst > self.tolerance:
            where = tuple((difference == worst).nonzero()[0].tolist())
            pair = f"{float(found[where]):.6g} instead of {float(wanted[where]):.6g}"
            broken(law, f"{sentence}: {pair} at {where}, off by {worst:.2g} ({self.tolerance:.0e} is allowed).")
        return worst

    def hold_distribution(self, law: str, found: Distribution, wanted: Distribution, sentence: str) -> float:
        """The largest deviation of two distributions: of densities at a few draws, entropies, deterministic steps."""
        if not torch.equal(found.random, wanted.random):
            broken(law, f"{sentence}: other rows are deterministic.")
        random = wanted.random
        one, two = (side.sample(Rng(0, self.rng.device))[~random] for side in (found, wanted))
        worst = self.hold(law, one, two, sentence)
        for probe in range(8):
            action = wanted.sample(self.rng.split("probe", probe))
            worst = max(
                worst, self.hold(law, found.log_prob(action)[random], wanted.log_prob(action)[random], sentence)
            )
        return max(worst, self.hold(law, found.entropy()[random], wanted.entropy()[random], sentence))


def broken(law: str, sentence: str) -> NoReturn:
    raise LawBroken(f"The law '{law}' is broken: {sentence}")


def trainable(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]
