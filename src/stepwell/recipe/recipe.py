"""A method as data: the parts it is made of, which the training loop runs and cards describe."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from stepwell.errors import InputError, UnknownName
from stepwell.objective.gradient import GradientTransform
from stepwell.objective.term import Objective, Term
from stepwell.parts import Node, parts_of
from stepwell.planning.base import Planner
from stepwell.planning.groups import Groups
from stepwell.ranges import Checked, Size
from stepwell.sampling.request import SamplerChanges
from stepwell.steering.guide import RewardGuide
from stepwell.writing import describe

DIFFERENTIATED = {"sample", "denoised", "pinned"}
"""Scores through which the gradient of a reward reaches the parameters (`objective.flow.forward.DirectReward`)."""


@dataclass(frozen=True)
class Recipe(Checked):
    """All the parts in which methods differ.

    objective: a term or a sum of terms. planner: the plan of a step's rollouts. epochs: passes over a rollout;
    minibatches: updates a pass. old: log pi_old is the sampler's (`rollout`), or scored anew before the first update
    (`recomputed`). reference: `start`, the policy as training began; `synced`, replaced by the policy every
    `sync_every` steps. transforms: changes of the gradients before the optimiser. sampler: settings of the process
    while it trains (a stochastic solver, fewer steps); it is evaluated as it was given. guide: moves the random steps
    of training rollouts towards reward; stored log-probabilities are then those of the guided distribution.
    """

    objective: Term | Objective
    planner: Planner = field(default_factory=Groups)
    epochs: Size = 1
    minibatches: Size = 1
    old: Literal["rollout", "recomputed"] = "rollout"
    reference: Literal["start", "synced"] = "start"
    sync_every: Size = 1
    transforms: tuple[GradientTransform, ...] = ()
    sampler: Mapping[str, Any] = field(default_factory=SamplerChanges)
    guide: RewardGuide | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "sampler", SamplerChanges(self.sampler))
        if not isinstance(self.planner, Planner):
            raise InputError(f"Recipe.planner must be a Planner, such as Groups(), got {self.planner!r:.60}.")
        for term in self.objective.terms if isinstance(self.objective, Objective) else (self.objective,):
            if not isinstance(term, Term):
                raise InputError(f"Recipe.objective must be made of terms, such as Policy(), got {term!r:.60}.")

    @property
    def whole(self) -> Objective:
        """The objective as a sum, which may have one term."""
        return self.objective if isinstance(self.objective, Objective) else Objective((self.objective,))

    @property
    def rewarded(self) -> bool:
        """True where a run needs a reward: a part, the planner or the guide reads one, and no request brings it."""
        nodes = (part for part in parts_of(self.whole.terms) if isinstance(part, Node))
        read = any(node.rewarded for node in nodes) or self.planner.rewarded or bool(self.whole.needs & DIFFERENTIATED)
        return self.guide is not None or (read and not self.planner.judged)

    def replace(self, **changes: Any) -> Recipe:
        """A copy with other parts: fields of the recipe, or of its (first) term, by name.

        Raises UnknownName for a name that is neither.
        """
        own = {entry.name for entry in dataclasses.fields(self)}
        terms = self.whole.terms
        inner = {entry.name for entry in dataclasses.fields(terms[0])}  # type: ignore[arg-type]
        for name in changes:
            if name not in own | inner:
                raise UnknownName("part", name, own | inner)
        first = {name: changes.pop(name) for name in list(changes) if name not in own}
        if first:
            term = dataclasses.replace(terms[0], **first)  # type: ignore[type-var]
            changes["objective"] = term if len(terms) == 1 else Objective((term, *terms[1:]))
        return dataclasses.replace(self, **changes)

    def parts(self) -> list[str]:
        """The parts in words, as cards print them: settings that differ from the defaults."""
        words = [describe(term) for term in self.whole.terms] + [describe(self.planner)]
        words += [describe(transform) for transform in self.transforms]
        for entry in dataclasses.fields(self):
            value = getattr(self, entry.name)
            if entry.name == "sampler":
                words += [f"{name}={describe(setting)}" for name, setting in value.items()]
            elif isinstance(value, RewardGuide):
                words.append(describe(value))
            elif entry.name not in ("objective", "planner", "transforms") and value != entry.default:
                words.append(f"{entry.name}={value}")
        return words
