"""The rows of a batch with everything that a part of a method may read of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from stepwell.errors import InputError
from stepwell.process.base import Scores
from stepwell.ranges import Checked
from stepwell.tensors import Tensor, torch
from stepwell.trajectories import FIELDS, Counts, Trajectories


@dataclass(frozen=True, order=True)
class Read(Checked):
    """A field of the rows that has to be filled before credit is given.

    Of the `policy`, the `reference` or the `teacher` it is a score (`process.base.NEEDS`) under the parameters before
    the update. Of the `rows` it is a field, or an entry of their `info` or `points`, that comes with them: a column of
    the data, a planner's note, the rows' segments.

    Example:
        >>> [Read("reference", "log_prob").name, Read("policy", "log_prob").name, Read("policy", "value").name]
        ['reference_log_prob', 'old_log_prob', 'value']
    """

    of: Literal["policy", "reference", "teacher", "rows"]
    need: str

    @property
    def name(self) -> str:
        """The name that the rows have it by."""
        if self.of == "rows" or (self.of == "policy" and self.need in ("value", "entropy", "final_value")):
            return self.need
        return f"old_{self.need}" if self.of == "policy" else f"{self.of}_{self.need}"


def notes(names: Iterable[str]) -> frozenset[Read]:
    """The declarations of those names that are entries of the rows' `info`, which `Batch.field` and `under` find.

    Example:
        >>> notes(["prompt", "origin", "behaviour", "stratum"])
        frozenset({Read(of='rows', need='stratum')})
    """
    others = {*FIELDS, "origin", "old", "behaviour", "reference"}
    return frozenset(Read("rows", name) for name in names if name not in others)


@dataclass(frozen=True)
class Batch:
    """Rows, their scores under the present parameters, the global counts, and the values of the coefficients.

    A batch may be a whole rollout, an optimiser's minibatch or a micro-batch of it; `counts` are always those of
    the minibatch, so that no number depends on how it was cut. `scores` is None while nothing is scored yet. `states`
    has the present value of each `Coefficient` by name. `judge` maps samples (M, ...) and their prompts' ids (M,) to
    rewards (M,), differentiably where they are.
    """

    rows: Trajectories
    counts: Counts
    scores: Scores | None = None
    states: Mapping[str, float] = field(default_factory=dict)
    judge: Callable[[Tensor, Tensor], Tensor] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def mask(self) -> Tensor:
        """(N, T) 1 for trained steps, in the type of the log-probabilities."""
        return self.rows.mask.to(self.rows.log_prob.dtype)

    @property
    def log_prob(self) -> Tensor:
        """(N, T) under the present parameters; the only tensor with a gradient."""
        return self.present("log_prob")

    def present(self, need: str) -> Tensor:
        """A score under the present parameters, by name."""
        if self.scores is None:
            raise InputError(
                f"Batch.scores must have '{need}' before a part reads it, got None; nothing was scored under the "
                "present parameters."
            )
        return self.scores[need]

    @property
    def old(self) -> Tensor:
        """(N, T) log-probability at the start of the inner epochs; the sampler's where it was not recomputed."""
        return self.behaviour if self.rows.old_log_prob is None else self.rows.old_log_prob

    @property
    def behaviour(self) -> Tensor:
        """(N, T) log-probability under the distribution that the steps were really drawn from."""
        return self.rows.log_prob

    @property
    def reference(self) -> Tensor:
        """(N, T) log-probability under the reference."""
        return self.field("reference_log_prob")

    def under(self, whose: str) -> Tensor:
        """(N, T) log-probability under `old`, `behaviour` or `reference`, or the field of that name."""
        if whose == "old":
            return self.old
        if whose == "behaviour":
            return self.behaviour
        return self.reference if whose == "reference" else self.field(whose)

    @property
    def reward(self) -> Tensor:
        """(N,) outcome reward."""
        return self.field("reward").to(self.rows.log_prob.dtype)

    def read(self, read: Read) -> Tensor:
        """The field that a part declared in its `reads`."""
        return self.field(read.name)

    def field(self, name: str) -> Tensor:
        """A field of the rows, their `origin`, or an entry of their `info` or `points`, that a part relies on."""
        value = self.origin if name == "origin" else getattr(self.rows, name) if name in FIELDS else None
        for table in (self.rows.info, self.rows.points):
            if value is None and table is not None:
                value = table.get(name, None)
        if value is None:
            raise InputError(f"A part reads '{name}' of the rows, which was not filled in; declare it in `reads`.")
        return value

    @property
    def origin(self) -> Tensor:
        """(N,) the node before each row's first trained step, -1 at the root: rows that branched there share it."""
        first = self.rows.mask.int().argmax(1)
        before = self.rows.node.gather(1, (first - 1).clamp(min=0)[:, None])[:, 0]
        return torch.where(first > 0, before, -1)

    @property
    def dimensions(self) -> int:
        """D, the numbers that an action is made of: 1 for a token, pixels times channels for an image."""
        return math.prod(self.rows.action.shape[2:])

    @property
    def steps(self) -> Tensor:
        """(N, 1) trained steps of each row, at least 1."""
        return self.mask.sum(1, keepdim=True).clamp(min=1)

    def row_sum(self, values: Tensor) -> Tensor:
        """(N, 1) sum of (N, T) values over each row's trained steps."""
        return (values * self.mask).sum(1, keepdim=True)
