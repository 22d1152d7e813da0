"""The contract between a generative model and everything that samples, steers or trains it."""

from __future__ import annotations

import copy
import os
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self, runtime_checkable

from stepwell.columns import Columns
from stepwell.distributions import Distribution
from stepwell.errors import InputError, MissingAbility
from stepwell.meter import Meter
from stepwell.origin import origin
from stepwell.process import kinds
from stepwell.rng import Rng
from stepwell.tensors import Tensor, torch
from stepwell.trajectories import Trajectories


@runtime_checkable
class State(Protocol):
    """A batch of partial samples. A state never changes: `advance` returns a new one.

    `state[index]` forks: rows may be repeated, dropped and reordered, and each copy goes on by itself with the
    original's distribution. A process that cannot do so raises `CannotFork`.
    """

    @property
    def done(self) -> Tensor: ...  # (N,) bool: nothing more will be drawn for the row
    def __len__(self) -> int: ...
    def __getitem__(self, index: Tensor) -> Self: ...


@dataclass(frozen=True)
class Steps:
    """Numbers of each step of finished rows; each field lists one tensor (T_i, ...) a row, or is None.

    reward: the step's own reward. segment: the number of its sentence or turn, rising along the row. observation
    (T_i, *O): the policy's observation before the step; it comes back to `score` as `trajectories.observed`. last (*O):
    the observation after the row's last step, which `final_value` is of; `trajectories.last_observed`.
    """

    reward: list[Tensor] | None = None
    segment: list[Tensor] | None = None
    observation: list[Tensor] | None = None
    last: list[Tensor] | None = None

    def __getitem__(self, index: Sequence[int]) -> Steps:
        lists = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return Steps(**{name: [rows[i] for i in index] for name, rows in lists.items() if rows is not None})

    def __add__(self, other: Steps) -> Steps:
        lists = {entry.name: (getattr(self, entry.name), getattr(other, entry.name)) for entry in fields(self)}
        return Steps(**{name: a + b for name, (a, b) in lists.items() if a is not None and b is not None})


@dataclass(frozen=True)
class Samples:
    """Finished rows as the user sees them: one value a row (a text, an image, an episode), and columns for rewards.

    truncated: True for rows that the process cut short although they were not at their end; None for none. steps:
    numbers of each step (`Steps`).
    """

    values: list[Any]
    columns: dict[str, list[Any]] = field(default_factory=dict)
    truncated: list[bool] | None = None
    steps: Steps = field(default_factory=Steps)

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: Sequence[int]) -> Samples:
        pick = lambda column: [column[i] for i in index]  # noqa: E731
        cut = None if self.truncated is None else pick(self.truncated)
        columns = {name: pick(column) for name, column in self.columns.items()}
        return Samples(pick(self.values), columns, cut, self.steps[index])

    def __add__(self, other: Samples) -> Samples:
        """Both, with the rows of `other` after these; both have the same columns."""
        columns = {name: column + other.columns[name] for name, column in self.columns.items()}
        cut = None
        if self.truncated is not None or other.truncated is not None:
            cut = [flag for part in (self, other) for flag in part.truncated or [False] * len(part)]
        return Samples(self.values + other.values, columns, cut, self.steps + other.steps)


@dataclass(frozen=True)
class Scores:
    """Numbers of given trajectories under the present parameters, differentiable.

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
    "entropy": "(N, T) entropy of each step's distribution",
    "value": "(N, T) the value head's estimate before each step",
    "final_value": "(N,) the value head's estimate after each row's last step",
    "sum_of_squares": "(N, T) sum of the squared probabilities of each step's distribution",
    "kl": "(N, T) exact KL divergence of each step's distribution from the reference's",
    "logits": "(N, T, K) normalised log-probabilities of every action",
    "hidden": "(N, T, D) the last hidden state before each step",
    "mean": "(N, T, *D) the mean of each step's Gaussian",
    "deviation": "(N, T) the standard deviation of each step's Gaussian, without a gradient",
    "step_size": "(N, T) the time that each step of a flow takes",
    "forward": "(N, K, *D) the velocity predicted at points drawn around each row's final state (rows.points)",
    "denoised": "(N, K, ...) the decoded data predicted at those points",
    "sample": "(N, ...) the decoded final sample, differentiable through the last rows.points['depth'] steps",
    "pinned": "sample, with the states on the way at the values they were drawn with",
}
"""Scores that a process may offer beside log_prob, with their shapes."""


AT_POINTS = frozenset({"forward", "denoised", "sample", "pinned"})
"""Needs that are not one number or vector a step; they belong to points that a term draws for each row."""


class Process(ABC):
    """A generative model that samples one step at a time.

    `module` holds the parameters; `meter` counts costs. `start`, `propose`, `advance` and `finish` draw, `score`
    computes log-probabilities of given trajectories; everything else has a default. Optional abilities (windows,
    critics, demonstrations, ...) are methods by the names in `stepwell.process.abilities`.

    Invariants of every process, checked by `stepwell.check.process`: the log-probability stored while drawing equals
    `score` afterwards; a fork has the original's distribution, and neither the order nor the number of rows nor
    padding changes anything; rows that are done are absorbing; the same seed gives the same trajectories; the meter
    counts every evaluation. States that a process is given are its own: they may be of any type that it likes.

    kind: whose methods train it (`language`, `flow`, or one of your own), None for any. offers: the scores besides
    `log_prob` that `score` computes, out of `NEEDS`. horizon: the largest number of steps that are drawn in a row, None
    where there is none. free_steps: the number of steps at a row's beginning that ask no model. any_prompt: prompts may
    be any values (class numbers, None), and not only texts or chats. work: the units that the meter's `forward` and
    `backward` count, as reports name them.
    """

    kind: ClassVar[str | None] = None
    free_steps: int = 0
    any_prompt: bool = True
    work: ClassVar[str] = "tokens"
    module: torch.nn.Module
    meter: Meter
    if TYPE_CHECKING:  # a subclass may have a class attribute, an attribute or a property of these names

        @property
        def offers(self) -> Collection[str]: ...
        @property
        def horizon(self) -> int | None: ...

    else:
        offers = frozenset()
        horizon = None

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if cls.kind is not None:
            kinds.register(cls.kind, f"processes of kind '{cls.kind}'")

    @abstractmethod
    def start(self, prompts: Sequence[Any], rng: Rng) -> State:
        """One row a prompt; `state[index]` repeats rows for groups."""

    @abstractmethod
    def propose(self, state: Any) -> Distribution:
        """The distribution of each row's next action.

        Of rows that are done it may be anything that can be drawn, as long as advancing does not change it.
        """

    @abstractmethod
    def advance(self, state: Any, action: Tensor, rng: Rng) -> State:
        """Every row one step on; rows that are done stay as they are.

        Models use no randomness here; an environment may.
        """

    @abstractmethod
    def finish(self, state: Any) -> Samples:
        """The rows as the user sees them, whether they are done or were cut short."""

    @abstractmethod
    def score(
        self,
        trajectories: Trajectories,
        needs: Collection[str] = (),
        context: Columns | None = None,
        reference: Process | None = None,
    ) -> Scores:
        """Log-probabilities (N, T) under the present parameters, and the other scores needed (`NEEDS`).

        `context` takes the place of `trajectories.condition`: what was drawn under one may be scored under another.
        `reference` is the process that `kl` is measured from; it is given where `kl` is among the needs.
        """

    def condition(self, prompts: Sequence[Any]) -> Columns | None:
        """Tensors of each prompt that `score` needs, (N,) rows, two-dimensional entries padded on the left."""
        return None

    def check_prompt(self, value: Any) -> None:  # noqa: B027
        """Raise `InputError` for a prompt that cannot be read; called for every prompt before anything is drawn."""

    def check_teacher(self, teacher: Process) -> None:
        """Raise `InputError` for a process whose actions mean something else, so that this one cannot learn from it."""
        if teacher.kind != self.kind:
            raise InputError(f"teacher must be of kind '{self.kind}', as the model is, got '{teacher.kind}'.")

    def row_sizes(self, rows: Trajectories) -> Tensor:
        """(N,) the size of each row as the network sees it, in tokens or states: micro-batches are cut by it."""
        return rows.length.clone()

    def frozen(self) -> Self:
        """A twin as it is now, unable to learn, on the same meter: the reference."""
        twin = copy.copy(self)
        twin.module = copy.deepcopy(self.module).requires_grad_(False)
        return twin

    def metered(self, meter: Meter) -> Self:
        """A twin on the same parameters that spends on another meter."""
        twin = copy.copy(self)
        twin.meter = meter
        return twin

    def describe(self) -> dict[str, Any]:
        """The settings that the process draws with, besides its parameters, as values for JSON: they are written to
        run.json and must be the same for a run to resume.

        By default the class, a digest of the file it is written in (`stepwell.origin`), and the attributes that are
        plain values.
        """
        plain = {name: value for name, value in sorted(vars(self).items()) if _is_plain(value)}
        return {"class": type(self).__qualname__, "source": origin(type(self))[1], **plain}

    def save(self, folder: str | os.PathLike[str], merged: bool | None = None) -> None:
        """Write the trained parameters into a folder, as safetensors.

        Of a model with an adapter `merged=False` writes the adapter alone and `merged=True` the whole model; left out,
        what a run writes. Raises `InputError` for `merged=False` where there is no adapter.
        """
        refuse_no_adapter(merged, False)
        from safetensors.torch import save

        from stepwell.writing import write_whole

        state = {name: value.detach().contiguous() for name, value in self.module.state_dict().items()}
        write_whole(os.path.join(folder, "model.safetensors"), save(state))


def refuse_no_adapter(merged: bool | None, adapted: bool) -> None:
    """Raise `InputError` where an adapter alone is to be saved and there is none."""
    if merged is False and not adapted:
        raise InputError("merged=False saves an adapter alone, and the model has none; leave it out.")


def _is_plain(value: Any) -> bool:
    """True for numbers, texts and lists of them, which JSON holds as they are."""
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(isinstance(name, str) and _is_plain(entry) for name, entry in value.items())
    return value is None or isinstance(value, bool | int | float | str)


def check_process(process: object, asked_by: str) -> Process:
    """The process itself; raises `InputError` for anything that does not derive from `Process`."""
    if not isinstance(process, Process):
        raise InputError(
            f"{asked_by} must be a process, such as language(FOLDER) or flow(f, shape=(2,)), got {process!r:.60}."
        )
    return process


def log_prob(process: Process, trajectories: Trajectories, context: Columns | None = None) -> Tensor:
    """(N, T) log-probabilities of the trajectories' actions under the present parameters, differentiable."""
    return process.score(trajectories, (), context).log_prob


def check_needs(process: Process, needs: Collection[str], reference: Process | None = None) -> None:
    """Raise `MissingAbility` for the first need that the process does not offer, and for a KL without a reference."""
    for need in needs:
        if need not in process.offers:
            raise MissingAbility(
                f"A method needs '{need}' of each step, but {type(process).__name__} offers "
                f"{', '.join(sorted(process.offers)) or 'nothing but log_prob'}."
            )
    if "kl" in needs and reference is None:
        raise MissingAbility("A method needs 'kl' of each step; give `reference=`, such as process.frozen().")
