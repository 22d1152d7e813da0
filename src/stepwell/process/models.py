"""The models of a run: the one that learns, the one it is measured from, and the one it learns from."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from stepwell.columns import Columns
from stepwell.errors import MissingAbility
from stepwell.process.base import Process, Scores
from stepwell.trajectories import Trajectories

Role = Literal["policy", "reference", "teacher"]

_MISSING = {
    "reference": "a reference to measure the policy from; give Models a `reference`, such as policy.frozen()",
    "teacher": "another model to learn from; give `teacher=`, a process of the same vocabulary",
}


@dataclass(frozen=True)
class Models:
    """The processes of a run by their role. None of them is written on; a run makes the twins that it needs.

    policy: the model that learns. reference: the one that a KL is measured from. teacher: the one that distillation
    learns from.
    """

    policy: Process
    reference: Process | None = None
    teacher: Process | None = None

    def of(self, role: Role) -> Process:
        """The process in a role; raises `MissingAbility` where the run has none."""
        model: Process | None = getattr(self, role)
        if model is None:
            raise MissingAbility(f"The method needs {_MISSING[role]}.")
        return model

    def score(self, rows: Trajectories, needs: Collection[str] = (), context: Columns | None = None) -> Scores:
        """`policy.score` (N, T), with the reference where a KL is asked for."""
        if "kl" in needs:
            return self.policy.score(rows, needs, context, reference=self.of("reference"))
        return self.policy.score(rows, needs, context)
