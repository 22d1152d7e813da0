"""From samples to numbers: one or several reward functions, called with the columns they ask for and added up."""

from __future__ import annotations

import asyncio
import functools
import inspect
import math
import os
import threading
import traceback
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stepwell.data.columns import Given
from stepwell.errors import InputError, RewardError, StepwellError
from stepwell.guarded import Guarded, OutOfTime, said_of
from stepwell.meter import Meter
from stepwell.ranges import Demand, Range
from stepwell.reward.verifiers import text_of
from stepwell.sampling.record import Drawn
from stepwell.terminal import one_line

RewardFunction = Callable[..., Any]
FINITE = Range("a finite number")


@dataclass(frozen=True)
class Scored:
    """The rewards of N rows.

    `total` (N,) float64: the weighted sum over the functions that apply to the row. `each` (N, K) float64: one
    column a function, unweighted, NaN where it does not apply. `names`: the K functions, no name twice.
    """

    total: Tensor
    each: Tensor
    names: tuple[str, ...]


class Rewards:
    """One or several reward functions with their weights (all 1 unless given).

    A reward function has TRL's signature: it is called with the keywords `prompts`, `completions`,
    `completion_ids` (token lists; only where the actions are tokens), `truncated` (bools) and one list for every
    other column of the data, each with one entry a row, and returns one number a row in a list, a tuple, a tensor
    or an array; None says that it does not apply to that row. A function without `**kwargs` is given only the
    keywords it names. Coroutine functions run side by side, on an event loop of Stepwell's own that lives as long as
    the interpreter, so clients they hold open stay usable, and a notebook's running loop is no hindrance.

    A function's arguments are its own: it may change them. What it changes of torch and the interpreter is put back
    (`guarded.Guarded`). `timeout` is the most seconds that one call of a function may take, or the coroutines together;
    it reaches code that runs in Python, sleeps, waits or matches, not a library's own computation.

    Raises `InputError` for functions and weights that do not match, for columns whose name is taken, and for a
    function that asks for a column there is not; `RewardError` for a function that fails or returns anything but
    one finite number or None a row, or takes longer than `timeout`, and for a row to which no function applies.

    Example:
        >>> from stepwell.meter import Meter
        >>> from stepwell.process.base import Samples
        >>> from stepwell.sampling.record import Drawn
        >>> from stepwell.sampling.request import Prompt
        >>> from stepwell.trajectories import make
        >>> def right(completions, answer):
        ...     return [float(text == wanted) for text, wanted in zip(completions, answer, strict=True)]
        >>> def brief(completions):
        ...     return [-len(text) for text in completions]
        >>> rows = make(torch.zeros(2, 1).long(), torch.zeros(2, 1), torch.ones(2, 1))
        >>> question = Prompt(0, "1 + 1 =", {"answer": "2"})
        >>> scored = Rewards([right, brief], weights=[1.0, 0.1])(
        ...     Drawn(rows, Samples(["2", "11"]), [question, question]), Meter()
        ... )
        >>> scored.total.tolist(), scored.names
        ([0.9, -0.2], ('right', 'brief'))
    """

    def __init__(
        self,
        functions: RewardFunction | Sequence[RewardFunction],
        weights: Sequence[float] | None = None,
        timeout: float | None = None,
    ):
        if isinstance(functions, str) or not (callable(functions) or isinstance(functions, Iterable)):
            raise InputError(f"A reward must be a function, or several in a list, got {functions!r:.60}.")
        self.functions = (functions,) if callable(functions) else tuple(functions)
        if not self.functions:
            raise InputError("Rewards needs at least one reward function; none was given.")
        for function in self.functions:
            if not callable(function) or inspect.isclass(function):
                raise InputError(f"A reward must be a function or a callable object, got {function!r:.60}.")
        self.names = _names(self.functions)
        self.weights = (1.0,) * len(self.functions) if weights is None else _weights(weights)
        if len(self.weights) != len(self.functions):
            raise InputError(
                f"Reward weights must be as many as the functions ({', '.join(self.names)}), got {len(self.weights)} "
                f"for {len(self.functions)}."
            )
        Demand(range=Range("a finite number of seconds above 0", 0, above=True), kinds=(type(None),)).refuse(
            "Rewards.timeout", timeout
        )
        self.timeout = timeout

    def __call__(self, drawn: Drawn, meter: Meter) -> Scored:
        """The rewards of all rows by all functions; the meter counts rows times functions as reward calls."""
        if len(drawn) == 0:
            nothing = torch.zeros(0, len(self.functions), dtype=torch.float64)
            return Scored(nothing.sum(1), nothing, self.names)
        columns = _columns(drawn)
        # All keywords are put together before the first call: a missing column costs no reward call.
        keywords = self.keywords(columns)
        returned = self._call(keywords, drawn, meter)
        numbers = [_numbers(*pair, drawn) for pair in zip(self.names, returned, strict=True)]
        each = torch.tensor(numbers, dtype=torch.float64).T.contiguous()
        silent = each.isnan().all(1).nonzero()[:, 0].tolist()
        if silent:
            raise RewardError(
                f"No reward function applies to row {silent[0]}, {_prompt(drawn, silent[0])}; "
                f"at least one of {', '.join(self.names)} has to return a number there."
            )
        total = (each.nan_to_num(nan=0.0) * torch.tensor(self.weights, dtype=torch.float64)).sum(1)
        large = (total.abs() > LARGEST).nonzero()[:, 0].tolist()
        if large:
            raise RewardError(
                f"The weighted sum of rewards must be at most {LARGEST:.0e}, so that sums over rows are finite, got "
                f"{total[large[0]]:.3g} for row {large[0]}, {_prompt(drawn, large[0])}."
            )
        return Scored(total, each, self.names)

    def keywords(self, columns: dict[str, list[Any]]) -> list[dict[str, list[Any]]]:
        """The keywords that each function is called with, out of all columns."""
        return [_keywords(*pair, columns) for pair in zip(self.functions, self.names, strict=True)]

    def _call(self, keywords: Sequence[dict[str, list[Any]]], drawn: Drawn, meter: Meter) -> list[Any]:
        """The values that the functions return; awaitables are awaited together, after the plain functions have run."""
        returned: list[Any] = []
        try:
            for function, name, arguments in zip(self.functions, self.names, keywords, strict=True):
                meter.add(reward_calls=len(drawn))
                refusal = functools.partial(self._failure, function, name, drawn)
                with Guarded(refusal, self.timeout):
                    returned.append(function(**arguments))
        except BaseException:
            for value in returned:
                if inspect.iscoroutine(value):
                    value.close()  # else Python complains of it instead of the failure
            raise
        waiting = [place for place, value in enumerate(returned) if inspect.isawaitable(value)]
        if waiting:
            try:
                with Guarded():
                    results = _await_together([returned[place] for place in waiting], self.timeout)
            except TimeoutError as error:
                names = "' and '".join(self.names[place] for place in waiting)
                raise self._too_long(names, "", drawn) from error
            for place, result in zip(waiting, results, strict=True):
                if isinstance(result, StepwellError):
                    raise result
                if isinstance(result, BaseException):
                    raise self._failure(self.functions[place], self.names[place], drawn, result) from result
                returned[place] = result
        return returned

    def _failure(self, function: RewardFunction, name: str, drawn: Drawn, error: BaseException) -> RewardError:
        """The error that takes the place of a reward function's own exception."""
        where = _line_in(function, error)
        if isinstance(error, OutOfTime):
            return self._too_long(name, where, drawn)
        return RewardError(f"Reward '{name}' raised {said_of(error)}{where} {_batch(drawn)}.")

    def _too_long(self, name: str, where: str, drawn: Drawn) -> RewardError:
        return RewardError(
            f"Reward '{name}' took longer than {self.timeout:g} seconds, its timeout,{where} {_batch(drawn)}."
        )


LARGEST = 1e15
"""The largest reward: the squares of many still add up to a number of single precision."""


def _weights(weights: Any) -> tuple[float, ...]:
    """The weights as numbers."""
    if isinstance(weights, str) or not isinstance(weights, Iterable):
        raise InputError(f"Reward weights must be a list of finite numbers, got {weights!r:.60}.")
    values = list(weights.tolist() if hasattr(weights, "tolist") else weights)
    if not all(FINITE.holds(weight) for weight in values):
        raise InputError(f"Reward weights must be finite numbers, got {values!r:.60}.")
    return tuple(float(weight) for weight in values)


def _names(functions: Iterable[RewardFunction]) -> tuple[str, ...]:
    """Each function's `__name__`, or its class's; a name that is taken gets the next free number."""
    names: list[str] = []
    for function in functions:
        inner = function.func if isinstance(function, functools.partial) else function
        plain = name = getattr(inner, "__name__", type(inner).__name__)
        number = 1
        while name in names:
            number += 1
            name = f"{plain}_{number}"
        names.append(name)
    return tuple(names)


def _columns(drawn: Drawn) -> dict[str, list[Any]]:
    """All columns that a reward function may ask for, one entry a row."""
    rows, ids = drawn.trajectories, None
    if rows.action.dim() == 2 and not rows.action.is_floating_point():
        pairs = zip(rows.action.tolist(), rows.length.tolist(), strict=True)
        ids = [tokens[:length] for tokens, length in pairs]
    prompts = [prompt.value for prompt in drawn.prompts]
    given = Given(prompts, list(drawn.samples.values), rows.truncated.tolist(), ids)
    return given.with_data(drawn.prompts, drawn.samples.columns)  # a process knows its own completion_ids best


def _keywords(function: RewardFunction, name: str, columns: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """The columns that the function accepts, as copies: it may change them without harm to the next, or to the data."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some functions written in C have no signature
        return {column: _copied(values) for column, values in columns.items()}
    for parameter in parameters:
        required = parameter.default is parameter.empty and parameter.kind not in (
            parameter.VAR_POSITIONAL,
            parameter.VAR_KEYWORD,
        )
        if required and parameter.kind is parameter.POSITIONAL_ONLY:
            raise InputError(
                f"Reward '{name}' takes '{parameter.name}' by position only; reward functions are called with keywords."
            )
        if required and parameter.name not in columns:
            raise InputError(
                f"Reward '{name}' requires '{parameter.name}', but there is no such column; "
                f"there are {', '.join(sorted(columns))}."
            )
    everything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    accepted = {parameter.name for parameter in parameters if parameter.kind is not parameter.POSITIONAL_ONLY}
    return {column: _copied(values) for column, values in columns.items() if everything or column in accepted}


def _copied(value: Any) -> Any:
    """The value with lists, dictionaries, tensors and arrays of its own; samples that carry a gradient keep it."""
    if isinstance(value, list | tuple) and type(value) in (list, tuple):
        return type(value)(_copied(entry) for entry in value)
    if type(value) is dict:
        return {key: _copied(entry) for key, entry in value.items()}
    if isinstance(value, Tensor):
        return value.clone()
    return value.copy() if isinstance(value, np.ndarray) else value


def _numbers(name: str, returned: Any, drawn: Drawn) -> list[float]:
    """One float a row, NaN for None, or a `RewardError` that says where it is not so."""
    values = returned.tolist() if hasattr(returned, "tolist") else returned
    batch = f"the batch of {len(drawn)} rows that begins with {_prompt(drawn, 0)}"
    if not isinstance(values, list | tuple):
        raise RewardError(
            f"Reward '{name}' must return a list with one number or None a row, got a value of type "
            f"{type(returned).__name__} for {batch}."
        )
    if len(values) != len(drawn):
        raise RewardError(f"Reward '{name}' must return one value a row, got {len(values)} for {batch}.")
    numbers: list[float] = []
    for row, value in enumerate(values):
        if value is None:
            numbers.append(math.nan)
            continue
        if getattr(value, "ndim", None) == 0:
            value = value.item()
        if not isinstance(value, Real | Decimal):
            raise RewardError(
                f"Reward '{name}' must return a number, or None where it does not apply, got a value of type "
                f"{type(value).__name__} for row {row}, {_prompt(drawn, row)}."
            )
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not abs(number) <= LARGEST:
            right = "finite number" if not math.isfinite(number) else f"number of at most {LARGEST:.0e}"
            raise RewardError(
                f"Reward '{name}' must return a {right}, or None where it does not apply, got {number} for row "
                f"{row}, {_prompt(drawn, row)}."
            )
        numbers.append(number)
    return numbers


def _line_in(function: RewardFunction, error: BaseException) -> str:
    """The line of the function's own file that an exception came from, as a message says it."""
    inner = function.func if isinstance(function, functools.partial) else function
    code = getattr(inspect.unwrap(inner), "__code__", None) or getattr(type(inner).__call__, "__code__", None)
    frames = [
        frame for frame in traceback.extract_tb(error.__traceback__) if code and frame.filename == code.co_filename
    ]
    return f" at {os.path.basename(frames[-1].filename)}, line {frames[-1].lineno}," if frames else ""


def _batch(drawn: Drawn) -> str:
    return f"in the batch of {len(drawn)} rows that begins with {_prompt(drawn, 0)}"


def _prompt(drawn: Drawn, row: int) -> str:
    """The words that name the prompt of a row in a message."""
    value = drawn.prompts[row].value
    try:
        text = text_of(value)
    except InputError:
        text = repr(value)
    return f"prompt {drawn.prompts[row].id} ('{one_line(text, 60)}')"


def _await_together(awaitables: Sequence[Awaitable[Any]], seconds: float | None = None) -> list[Any]:
    """The result or the exception of each awaitable, in order, run concurrently; `TimeoutError` after the seconds."""

    async def gather() -> list[Any]:
        return await asyncio.gather(*awaitables, return_exceptions=True)

    return _run(gather(), seconds)


def _run(coroutine: Coroutine[Any, Any, list[Any]], seconds: float | None) -> list[Any]:
    future = asyncio.run_coroutine_threadsafe(coroutine, _event_loop(os.getpid()))
    try:
        return future.result(seconds)
    except BaseException as error:  # Ctrl-C in this thread must also end the coroutines in the other
        future.cancel()
        if isinstance(error, TimeoutError):
            _event_loop.cache_clear()  # a coroutine that never gives way keeps its loop
        raise


@functools.cache
def _event_loop(pid: int) -> asyncio.AbstractEventLoop:
    """The loop that coroutine rewards run on, in a thread of its own, one for each operating system process.

    Threads do not survive a fork, hence `pid`. It is one loop for good, because clients with open
    connections (httpx, openai) cannot move from loop to loop.
    """
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="stepwell-rewards", daemon=True).start()
    return loop
