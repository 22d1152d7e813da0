"""Requests: how many samples of which prompt, from where on, and under what."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from stepwell.distributions import Distribution
from stepwell.errors import InputError
from stepwell.process.abilities import ReadsColumns, Tokenised, ability
from stepwell.process.base import Process, State
from stepwell.ranges import Range, check_kinds
from stepwell.rng import Rng
from stepwell.tensors import Tensor, torch
from stepwell.trajectories import PROVENANCES, Trajectories, concatenate, make


@dataclass(frozen=True)
class Prompt:
    """One row of the user's data: the value a process starts from, and the columns that go to the reward."""

    id: int
    value: Any
    columns: Mapping[str, Any] = field(default_factory=dict)


class SamplerChanges(Mapping[str, Any]):
    """Settings of a process's sampler that differ from its own, by name; hashable, so that equal ones are drawn
    together. Lists become tuples; raises `InputError` for a value that cannot be hashed.

    Example:
        >>> SamplerChanges({"steps": 4, "times": [1.0, 0.0]}) == SamplerChanges({"times": (1.0, 0.0), "steps": 4})
        True
    """

    def __init__(self, settings: Mapping[str, Any] = {}):
        self._settings = {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}
        try:
            self._key = frozenset(self._settings.items())
        except TypeError as error:
            raise InputError(f"Settings of a sampler must be hashable, got {dict(settings)!r:.80}.") from error

    def __getitem__(self, name: str) -> Any:
        return self._settings[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._settings)

    def __len__(self) -> int:
        return len(self._settings)

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mapping) and dict(self) == dict(other)

    def __repr__(self) -> str:
        return repr(self._settings)


@dataclass(frozen=True)
class Begun:
    """Rows where they start: their state (N), and the steps behind them, the first `steps` of `prefix` (N rows).

    `node` (N, P): the nodes of those steps that keep theirs, P being 0 where they become nodes of this rollout.
    `windowed`: only the steps inside a request's window go on being trained.
    """

    state: State
    prefix: Trajectories | None = None
    steps: int = 0
    node: Tensor | None = None
    windowed: bool = False


class Start(ABC):
    """The place where the rows of a request start. Requests whose starts have one `key` begin side by side."""

    @property
    def key(self) -> Hashable:
        """Equal for starts of one kind that are equally far along."""
        return type(self)

    def prepared(self, process: Process, request: Request) -> Request:
        """The request in the form in which it is drawn, which may have another start."""
        return request

    @abstractmethod
    def begin(
        self, process: Process, requests: Sequence[Request], owner: Tensor, rng: Rng, so_far: Trajectories | None
    ) -> Begun:
        """The rows of requests whose starts all have this one's key; `owner` (N,) is the request of each row."""


@dataclass(frozen=True)
class Root(Start):
    """The prompt itself."""

    def begin(
        self, process: Process, requests: Sequence[Request], owner: Tensor, rng: Rng, so_far: Trajectories | None
    ) -> Begun:
        return Begun(started(process, requests, rng)[owner])


@dataclass(frozen=True)
class Branch(Start):
    """After the first `step` steps of row `row` of what was drawn so far, whose nodes the rows go on sharing."""

    row: int
    step: int

    @property
    def key(self) -> Hashable:
        return Branch, self.step

    def begin(
        self, process: Process, requests: Sequence[Request], owner: Tensor, rng: Rng, so_far: Trajectories | None
    ) -> Begun:
        origin = [start.row for start in _starts(requests, Branch)]
        lengths = [] if so_far is None else so_far.length.tolist()
        for request, row in zip(requests, origin, strict=True):
            if not 0 <= row < len(lengths) or not 0 <= self.step <= lengths[row]:
                raise InputError(
                    f"Branch must start at a row and a step that were drawn, got row {row}, step {self.step} "
                    f"(prompt {request.prompt.id}, {len(lengths)} rows so far)."
                )
        assert so_far is not None
        prefix = so_far[torch.tensor(origin)]
        for request, row, prompt in zip(requests, origin, prefix.prompt.tolist(), strict=True):
            if request.prompt.id != prompt:
                raise InputError(
                    f"Branch.row must be a row of the request's own prompt, {request.prompt.id}; got row {row}, "
                    f"which answers prompt {prompt}."
                )
        state = _replayed(process, requests, prefix, self.step, rng)
        prefix = prefix[owner]
        return Begun(state[owner], prefix, self.step, prefix.node[:, : self.step], windowed=True)


@dataclass(frozen=True)
class Snapshot(Start):
    """A one-row state to continue from, with the trajectory that led there."""

    state: State
    trajectory: Trajectories

    @property
    def key(self) -> Hashable:
        return Snapshot, id(self)

    def begin(
        self, process: Process, requests: Sequence[Request], owner: Tensor, rng: Rng, so_far: Trajectories | None
    ) -> Begun:
        first, steps = torch.zeros(len(owner), dtype=torch.long), int(self.trajectory.length[0])
        prefix = self.trajectory[first]
        return Begun(self.state[first], prefix, steps, prefix.node[:, :steps], windowed=True)


@dataclass(frozen=True)
class Continuation(Start):
    """One row of an earlier rollout, gone through again: for processes that are determined by their actions."""

    row: Trajectories

    @property
    def key(self) -> Hashable:
        return Continuation, int(self.row.length[0]), frozenset(name for name, _ in self.row.present())

    def begin(
        self, process: Process, requests: Sequence[Request], owner: Tensor, rng: Rng, so_far: Trajectories | None
    ) -> Begun:
        rows = concatenate([start.row for start in _starts(requests, Continuation)])
        steps = int(self.row.length[0])
        return Begun(_replayed(process, requests, rows, steps, rng)[owner], rows[owner], steps)


@dataclass(frozen=True)
class Completion(Start):
    """A sample written elsewhere, such as a demonstration: a whole row that nothing is drawn for.

    Its stored log-probability is 0, as of one who wrote it with certainty. `mask` (T,): which of its steps are trained,
    all unless given. `segments` (T,): the sentence, step or turn that each step belongs to.
    """

    value: Any
    mask: Sequence[bool] | None = None
    segments: Sequence[int] | None = None

    def prepared(self, process: Process, request: Request) -> Request:
        """The request with a `Continuation` of all the completion's steps."""
        tokenised = ability(process, Tokenised, "A completion that is given")
        asked = request.prompt.value if request.context is None else request.context
        action = tokenised.encode_completion(self.value, asked)[None]
        steps = action.shape[1]
        for name, entries in (("mask", self.mask), ("segments", self.segments)):
            if entries is not None and len(entries) != steps:
                raise InputError(
                    f"Completion.{name} must have {steps} entries, one for each step of {self.value!r:.60}, got "
                    f"{len(entries)} (prompt {request.prompt.id})."
                )
        mask = torch.ones(1, steps, dtype=torch.bool) if self.mask is None else torch.tensor([list(self.mask)]).bool()
        row = make(action, torch.zeros(1, steps, device=action.device), mask, length=torch.tensor([steps]))
        row = row.replace(provenance=torch.full((1,), PROVENANCES.index("demonstrations"), device=action.device))
        if self.segments is not None:
            row = row.replace(segment=torch.tensor([list(self.segments)]))
        return replace(request, start=Continuation(row), horizon=steps)

    def begin(
        self, process: Process, requests: Sequence[Request], owner: Tensor, rng: Rng, so_far: Trajectories | None
    ) -> Begun:
        ready = [request.start.prepared(process, request) for request in requests]
        return ready[0].start.begin(process, ready, owner, rng, so_far)


def started(process: Process, requests: Sequence[Request], rng: Rng) -> State:
    """One row a request, at its prompt or at the context that takes the prompt's place."""
    values = [request.prompt.value if request.context is None else request.context for request in requests]
    if isinstance(process, ReadsColumns):
        return process.start_on(values, [request.prompt.columns for request in requests], rng)
    return process.start(values, rng)


def _replayed(process: Process, requests: Sequence[Request], rows: Trajectories, steps: int, rng: Rng) -> State:
    """The states of the requests after the first `steps` actions of `rows`, one row a request.

    Raises `InputError` for weighted rows: no part of a row's weight is known to belong to its first steps.
    """
    state = started(process, requests, rng)
    if bool((rows.weight != 0).any()):
        raise InputError("Rows with importance weights cannot be gone through again; continue a Snapshot instead.")
    for step in range(steps):
        state = process.advance(state, rows.action[:, step], rng)
    return state


S = TypeVar("S", bound=Start)


def _starts(requests: Sequence[Request], kind: type[S]) -> list[S]:
    """The starts of requests that all start in this way."""
    return [request.start for request in requests if isinstance(request.start, kind)]


WHOLE = Range("a whole number", whole=True)


@dataclass(frozen=True)
class Request:
    """`count` samples for one prompt.

    context: takes the prompt's place while drawing (a hint, a prefix); the rows' condition stays the prompt. start:
    where the rows begin, a `Start`; None is `Root()`, a pair (row, step) is `Branch(row, step)`, and one row of
    trajectories is a `Continuation`. horizon: the most steps of a row, those before its start included. proposal: maps
    the process's distribution, the state and each row's prompt to the distribution drawn from; the row's log weight
    keeps the account. source: a number that the rows carry, for methods that tell behaviours apart. judged: False for
    rows to branch from, which have no outcome. reward: the rows' judgement where the data have it; no reward function
    is asked then.

    window (begin, end): only steps begin..end-1 are drawn at random and trained. Before its start a row keeps the
    steps it was drawn with, and elsewhere it takes the process's `deterministic` step: the likeliest token, the ODE's
    step. sampler: settings of the process for these rows alone (`with_sampler`), which hold for the steps outside the
    window, since trained steps are scored under the sampler that all rows share.
    """

    prompt: Prompt
    count: int = 8
    context: Any = None
    start: Start = field(default_factory=Root)
    horizon: int | None = None
    proposal: Callable[[Distribution, State, list[Prompt]], Distribution] | None = None
    source: int = 0
    window: tuple[int, int] | None = None
    sampler: Mapping[str, Any] | None = None
    judged: bool = True
    reward: float | None = None

    def __post_init__(self) -> None:
        named = ("prompt", "count", "horizon", "source", "sampler", "judged", "reward")
        check_kinds(type(self), {name: getattr(self, name) for name in named}, "Request.")
        object.__setattr__(self, "start", _start(self.start, self.prompt.id))
        if self.sampler is not None:
            object.__setattr__(self, "sampler", SamplerChanges(self.sampler))
        for name in ("count", "horizon"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"Request.{name} must be at least 1, got {value} (prompt {self.prompt.id}).")
        pair = self.window if isinstance(self.window, tuple) and len(self.window) == 2 else ("", "")
        whole = all(WHOLE.holds(place) for place in pair)
        if self.window is not None and not (whole and 0 <= self.window[0] <= self.window[1]):
            raise InputError(
                f"Request.window must be (begin, end) with 0 <= begin <= end, got {self.window} (prompt "
                f"{self.prompt.id})."
            )


def _start(given: Any, prompt: int) -> Start:
    """The start that a request was given, in any of its forms."""
    if given is None:
        return Root()
    if isinstance(given, Trajectories):
        return Continuation(given)
    if isinstance(given, tuple) and len(given) == 2:
        return Branch(*given)
    if not isinstance(given, Start):
        raise InputError(
            f"Request.start must be a Start, such as Branch(row, step), got {given!r:.60} (prompt {prompt})."
        )
    return given
