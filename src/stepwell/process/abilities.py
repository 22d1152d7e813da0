"""Optional abilities of a process, one protocol each; `ability` asks for one and raises where it is absent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar, runtime_checkable

from stepwell.distributions import Distribution
from stepwell.errors import MissingAbility
from stepwell.process.base import Process, Samples, State
from stepwell.rng import Rng
from stepwell.solver.path import Path
from stepwell.tensors import Tensor
from stepwell.trajectories import Trajectories


@runtime_checkable
class Likeliest(Protocol):
    """Takes a step without randomness: the likeliest token, the step of the ODE. Windows need it outside."""

    def deterministic(self, state: Any) -> Distribution:
        """A distribution of points, one a row; draws without a parameter (a flow's noise) may stay random."""
        ...


@runtime_checkable
class Redrawn(Protocol):
    """Draws from the same parameters under other settings: another solver, another temperature."""

    def with_sampler(self, **settings: Any) -> Process:
        """A twin on the same parameters and meter; raises `InputError` for settings it does not have."""
        ...


@runtime_checkable
class ReadsColumns(Protocol):
    """Starts from the whole row of the data, not from its prompt alone: an environment that reads the answer."""

    def start_on(self, prompts: Sequence[Any], columns: Sequence[Mapping[str, Any]], rng: Rng) -> State:
        """`start`, with the columns of each prompt's row of the data."""
        ...


@runtime_checkable
class Segmented(Protocol):
    """Knows which sentence, step or turn each step of a row belongs to."""

    def segments(self, trajectories: Trajectories) -> Tensor:
        """(N, T) whole numbers, rising along each row."""
        ...


@runtime_checkable
class Valued(Protocol):
    """Can carry a critic on its own features."""

    def with_value_head(self) -> Process:
        """A twin on the same parameters and meter that offers 'value' and learns it; the original stays as it is."""
        ...


@runtime_checkable
class Tokenised(Protocol):
    """Reads samples that were written elsewhere: demonstrations, stored answers."""

    def encode_completion(self, completion: Any, prompt: Any = None) -> Tensor:
        """(T, ...) the actions whose sample is `completion`, written for `prompt` where they depend on it.

        Raises `InputError` for one that cannot be drawn.
        """
        ...


@runtime_checkable
class Denoising(Protocol):
    """Draws data from noise along a path: flows, diffusions and pipelines."""

    @property
    def path(self) -> Path: ...
    @property
    def sampler(self) -> Any: ...  # stepwell.process.flow.sampler.SamplerSettings
    @property
    def encode(self) -> Any: ...  # from prompts to the conditioning; None for an unconditional model

    def data_prediction(self, state: Any, x: Tensor) -> Tensor:
        """The data (N, *D) expected at states x (N, *D) put in the state's place, differentiable in x."""
        ...

    def decoded(self, x: Tensor) -> Tensor:
        """(N, ...) final states x (N, *D) as users and rewards see them, differentiable."""
        ...


@runtime_checkable
class LookAhead(Protocol):
    """Predicts the end of a partial sample without drawing it: an estimate that a reward can judge on the way."""

    def look_ahead(self, state: Any) -> Samples:
        """The expected ends, one a row, as `finish` gives them, at one evaluation of the model a row."""
        ...


@runtime_checkable
class StartsAt(Protocol):
    """Starts on the way, from given data: editing, inpainting, SDEdit."""

    def start_at(self, prompts: Sequence[Any], data: Tensor, step: int, rng: Rng) -> State:
        """One row a prompt after `step` steps: data (N, *D), final states of rows, noised by the forward process."""
        ...


@runtime_checkable
class Renoising(Protocol):
    """Goes back to an earlier step by the forward process: restarts, resampling, local search."""

    def renoise(self, state: Any, step: int, rng: Rng) -> State:
        """The states after `step` steps, fewer than were taken, by the forward process from where they are."""
        ...


@runtime_checkable
class Jumping(Protocol):
    """Goes from any step to any later one at once: consistency models and other two-time students."""

    def jump(self, state: Any, step: int) -> State:
        """The states after `step` steps, by one evaluation of the model a row."""
        ...


@runtime_checkable
class Enumerable(Protocol):
    """Lists everything that it can draw, with exact probabilities: the yardstick of checks."""

    def strings(self) -> list[tuple[int, ...]]:
        """Every complete sample."""
        ...

    def string_probabilities(self, prompt: Any = 0) -> Tensor:
        """(strings,) the probability of each under one prompt, in the order of `strings`."""
        ...


@dataclass(frozen=True)
class Generated:
    """A whole row that an engine drew: action (T, ...), and the log-probability (T,) of each under what it drew from.

    `value` is what the user sees, `columns` what rewards read besides; `truncated` where the row was cut short.
    """

    action: Tensor
    log_prob: Tensor
    value: Any
    columns: Mapping[str, Any] = field(default_factory=dict)
    truncated: bool = False


@runtime_checkable
class Bulk(Protocol):
    """Draws whole rows by itself, faster than one step at a time: an engine behind the process."""

    def generate(self, requests: Sequence[Any], rng: Rng) -> list[list[Generated]]:
        """`count` rows for each `Request` that starts at its prompt; the meter counts what was spent."""
        ...


A = TypeVar("A")


def ability(process: object, protocol: type[A], asked_by: str) -> A:
    """The process as one that has an ability; raises `MissingAbility`, naming who asked and the methods it lacks."""
    if not isinstance(process, protocol):
        names = sorted(name for name in vars(protocol) if not name.startswith("_") and not hasattr(process, name))
        raise MissingAbility(f"{asked_by} needs a process with {', '.join(names)}; {type(process).__name__} has none.")
    return process
