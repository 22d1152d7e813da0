"""What a process may also do, one protocol an ability; `ability` asks for one and says so where it is absent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar, runtime_checkable

from torch import Tensor

from stepwell.distributions import Distribution
from stepwell.errors import MissingAbility
from stepwell.process.base import Process, State
from stepwell.rng import Rng
from stepwell.solver.path import Path
from stepwell.trajectories import Trajectories


@runtime_checkable
class Likeliest(Protocol):
    """Takes a step without randomness: the likeliest token, the step of the ODE. Windows need it outside."""

    def deterministic(self, state: Any) -> Distribution:
        """A distribution of points, one a row; what no parameter has a part in (a flow's noise) may stay random."""
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

    def encode_completion(self, completion: Any) -> Tensor:
        """(T, ...) the actions whose sample `completion` is; raises `InputError` for what it cannot have drawn."""
        ...


@runtime_checkable
class Denoising(Protocol):
    """Draws data from noise along a path: flows, diffusions and pipelines."""

    path: Path
    sampler: Any  # stepwell.process.flow.sampler.SamplerSettings

    def data_prediction(self, state: Any, x: Tensor) -> Tensor:
        """The data (N, *D) expected at states x (N, *D) put in the state's place, differentiable in x."""
        ...

    def decoded(self, x: Tensor) -> Tensor:
        """(N, ...) what the user sees of final states x (N, *D), differentiable."""
        ...


@runtime_checkable
class LookAhead(Protocol):
    """Says what a partial sample will probably become, without drawing it to its end."""

    def look_ahead(self, state: Any) -> Any:
        """Samples of the states' expected ends, one a row, at the cost of one evaluation of the model a row."""
        ...


@runtime_checkable
class StartsAt(Protocol):
    """Starts from given data part of the way: editing, inpainting, SDEdit."""

    def start_at(self, prompts: Sequence[Any], data: Tensor, step: int, rng: Rng) -> State:
        """States after `step` steps of which `data` (N, *D) is the sample, drawn from the forward process."""
        ...


@runtime_checkable
class Renoising(Protocol):
    """Goes back to an earlier step by the forward process: restarts, resampling, local search."""

    def renoise(self, state: Any, step: int, rng: Rng) -> State:
        """The states after `step` steps, an earlier one, noised from where they are."""
        ...


@runtime_checkable
class Jumping(Protocol):
    """Goes from any step to any later one at once: consistency models and other two-time students."""

    def jump(self, state: Any, step: int) -> State:
        """The states after `step` steps, by one evaluation of the model a row."""
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
        names = sorted({*vars(protocol), *protocol.__annotations__} - {*vars(object), *vars(Protocol)})
        raise MissingAbility(f"{asked_by} needs a process with {', '.join(names)}; {type(process).__name__} has none.")
    return process
