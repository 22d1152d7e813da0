"""What generates: the contract between a model and everything that samples, steers or trains it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, Self, runtime_checkable

from torch import Tensor, nn

from stepwell.columns import Columns
from stepwell.distributions import Distribution
from stepwell.errors import MissingAbility
from stepwell.meter import Meter
from stepwell.rng import Rng
from stepwell.trajectories import Trajectories


@runtime_checkable
class State(Protocol):
    """A batch of partial samples. A state never changes: `advance` returns a new one.

    `state[index]` forks: rows may be repeated, dropped and reordered, and each copy goes on by itself with the
    law of the original. A process that cannot do so raises `CannotFork`.
    """

    @property
    def done(self) -> Tensor: ...  # (N,) bool: nothing more will be drawn for the row
    def __len__(self) -> int: ...
    def __getitem__(self, index: Tensor) -> Self: ...


@dataclass(frozen=True)
class Samples:
    """What the user sees: one value a row (a text, an image, an episode) and further columns for rewards."""

    values: list[Any]
    columns: dict[str, list[Any]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: Sequence[int]) -> Samples:
        pick = lambda column: [column[i] for i in index]  # noqa: E731
        return Samples(pick(self.values), {name: pick(column) for name, column in self.columns.items()})


@dataclass(frozen=True)
class Scores:
    """What a process says about given trajectories under its present parameters, differentiable.

    `log_prob` (N, T) is always there and 0 where the mask is False. Anything else is computed only where a
    method declared that it needs it, and asked for by name: `scores["entropy"]`.
    """

    log_prob: Tensor
    extra: Mapping[str, Tensor] = field(default_factory=dict)

    def __getitem__(self, need: str) -> Tensor:
        if need == "log_prob":
            return self.log_prob
        if need not in self.extra:
            raise MissingAbility(
                f"'{need}' was not computed; a part that reads it has to declare needs=frozenset({{'{need}'}})."
            )
        return self.extra[need]

    def rows(self, index: Tensor) -> Scores:
        return Scores(self.log_prob[index], {name: value[index] for name, value in self.extra.items()})

    def detach(self) -> Scores:
        return Scores(self.log_prob.detach(), {name: value.detach() for name, value in self.extra.items()})


NEEDS = {
    "entropy": "(N, T) entropy of the law of each step",
    "value": "(N, T) the value head's estimate before each step",
    "sum_of_squares": "(N, T) sum of the squared probabilities of each step's law",
    "kl": "(N, T) exact KL divergence of each step's law from the reference's",
    "logits": "(N, T, K) normalised log-probabilities of every action",
    "hidden": "(N, T, D) the last hidden state before each step",
    "mean": "(N, T, *D) the mean of each step's Gaussian law",
    "deviation": "(N, T) the standard deviation of each step's Gaussian law, without a gradient",
    "step_size": "(N, T) the time that each step of a flow takes",
    "forward": "(N, K, *D) the velocity predicted at points drawn around each row's final state (rows.points)",
    "denoised": "(N, K, ...) the decoded data predicted at those points",
    "sample": "(N, ...) the decoded final sample, differentiable through the last rows.points['depth'] steps",
    "pinned": "sample, with the states on the way at the values they were drawn with",
}


AT_POINTS = frozenset({"forward", "denoised", "sample", "pinned"})
"""Needs that are not one number or vector a step; they belong to points that a term draws for each row."""


@runtime_checkable
class Process(Protocol):
    """What generates. `module` holds the parameters; `meter` counts what is spent.

    Laws that hold for every process, checked by `stepwell.check.process`: the log-probability stored while
    drawing equals `log_prob` afterwards; a fork has the original's law, and neither the order nor the number of
    rows nor padding changes anything; the same seed gives the same trajectories; the meter counts what was spent.
    A state that is given is one that this process made: it may be of the process's own type.

    Optional, asked for by name: `deterministic(state)`, the step that windows take outside; `with_sampler(**settings)`,
    the same model drawn from otherwise; `free_steps`, how many steps of a row's beginning ask no model.
    """

    module: nn.Module
    meter: Meter

    def start(self, prompts: Sequence[Any], rng: Rng) -> State:
        """One row a prompt; repeat rows with `state[index]` for groups."""
        ...

    def propose(self, state: Any) -> Distribution:
        """The law of each row's next action."""
        ...

    def advance(self, state: Any, action: Tensor, rng: Rng) -> State:
        """Every row one step on. Models use no randomness here; an environment may."""
        ...

    def finish(self, state: Any) -> Samples:
        """What the user sees of each row."""
        ...

    def condition(self, prompts: Sequence[Any]) -> Columns | None:
        """What `score` needs to know of each prompt, (N,) rows, two-dimensional entries padded on the left."""
        ...

    def score(self, trajectories: Trajectories, needs: Collection[str] = (), context: Columns | None = None) -> Scores:
        """Log-probabilities (N, T) under the present parameters, and whatever else is needed (`NEEDS`).

        `context` takes the place of `trajectories.condition`: what was drawn under one may be scored under another.
        """
        ...

    def frozen(self) -> Process:
        """This process as it is now, unable to learn: the reference. It spends on the same meter."""
        ...


def log_prob(process: Process, trajectories: Trajectories, context: Columns | None = None) -> Tensor:
    """(N, T) log-probabilities of the trajectories' actions under the present parameters, differentiable."""
    return process.score(trajectories, (), context).log_prob


def ability(process: object, name: str, asked_by: str) -> Any:
    """An optional ability of a process, by name, or a clear error where it is absent."""
    found = getattr(process, name, None)
    if found is None:
        raise MissingAbility(f"{asked_by} needs a process that can '{name}'; {type(process).__name__} cannot.")
    return found


def check_needs(process: object, needs: Collection[str], offered: Collection[str]) -> None:
    """Raise `MissingAbility` for the first need that the process does not offer."""
    for need in needs:
        if need not in offered:
            raise MissingAbility(
                f"A method needs '{need}' of each step; {type(process).__name__} offers {', '.join(sorted(offered))}."
            )
