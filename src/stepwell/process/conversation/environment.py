"""Environments of the user: their interface, and calls that answer a broken one with a clear sentence."""

from __future__ import annotations

import inspect
import math
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from numbers import Real
from typing import Any, Protocol

from stepwell.errors import InputError
from stepwell.guarded import Guarded, said_of
from stepwell.process.language.chat import is_chat, message_fault

Observation = str | Mapping[str, Any] | Sequence[Mapping[str, Any]]
"""An environment's words: a text, or for a chat also a message, or several, with a 'role' and a 'content'."""


class Environment(Protocol):
    """The other side of one conversation, from `reset` on. Any `gymnasium.Env` whose observations are texts is one.

    `reset` gets the prompt and those columns of its row of data that it names (all, with `**columns`), and returns
    the observation that the model reads after the prompt, or None; alone, or with a dict as gymnasium has it. An
    environment of gymnasium, or one with its `reset(*, seed, options)`, gets prompt and columns as `options`, and as
    its seed the column `seed` or a number made of the prompt.

    `step` gets the model's message and returns an observation, the reward of that turn, `terminated` (the conversation
    is over), `truncated` (it was cut short), and a dict. The model does not read the observation after the end. An
    environment must be a function of the prompt and of the messages so far: the same words get the same answer.

    Before each message an environment is copied by `copy.deepcopy`, since the same partial conversation may be
    continued twice. One that cannot be copied is stepped in place, which is enough for rows that are drawn from their
    beginning, each with an environment of its own; any other fork raises `CannotFork`.
    """

    def reset(self, prompt: Any, **columns: Any) -> Any: ...
    def step(self, message: str) -> tuple[Any, float, bool, bool, dict[str, Any]]: ...


def environment_return(environment_return: list[float]) -> list[float]:
    """The reward function for conversations: the sum of what the environment paid for each turn."""
    return environment_return


class EnvironmentFailed(InputError):
    """An environment raised an exception of its own while it was reset or told a message."""


@dataclass(frozen=True)
class Answer:
    """An environment's answer to one message."""

    observation: Observation
    reward: float
    terminated: bool
    truncated: bool


def opened(make: Callable[[], Any], prompt: Any, columns: Mapping[str, Any]) -> tuple[Any, Observation | None]:
    """An environment of the factory's, reset for a prompt, and its first observation."""
    maker = getattr(make, "__name__", type(make).__name__)
    with Guarded(lambda error: InputError(_failure(maker, "the environment's factory", make, error, prompt))):
        environment = make()
    for ability in ("reset", "step"):
        if not callable(getattr(environment, ability, None)) or inspect.isclass(environment):
            raise InputError(
                "The environment's factory must return an object with reset(prompt, **columns) and step(message), got "
                f"{_shown(environment)}, which has no method '{ability}'."
            )
    name = type(environment).__name__
    arguments, keywords = _reset_arguments(environment, prompt, columns)
    _refuse_other_arguments(name, environment.step, "step", ("",), {}, "step(message)")
    with _calling(environment, "reset", prompt):
        first = environment.reset(*arguments, **keywords)
    _refuse_async(name, "reset", first)
    if isinstance(first, tuple):
        if len(first) != 2 or not isinstance(first[1], Mapping):
            raise InputError(
                f"The reset of the environment {name} must return an observation, None, or (observation, info) with a "
                f"dict, got {_shown(first)}."
            )
        first = first[0]
    if first is None:
        return environment, None
    return environment, _observation(name, "reset", first)


def answered(environment: Any, message: str, prompt: Any) -> Answer:
    """The environment's answer to a message; raises `InputError` unless `step` returns its five values."""
    name = type(environment).__name__
    with _calling(environment, "step", prompt):
        returned = environment.step(message)
    _refuse_async(name, "step", returned)
    if not isinstance(returned, tuple) or len(returned) != 5:
        raise InputError(
            f"The step of the environment {name} must return (observation, reward, terminated, truncated, info), got "
            f"{_shown(returned)}."
        )
    observation, reward, terminated, truncated, info = returned
    if getattr(reward, "ndim", None) == 0:
        reward = reward.item()
    if not isinstance(reward, Real) or not _finite(reward):
        raise InputError(f"The reward of the environment {name} must be a finite number, got {_shown(reward)}.")
    for flag, value in (("terminated", terminated), ("truncated", truncated)):
        if not isinstance(value, _flags()):
            raise InputError(f"'{flag}' of the environment {name} must be True or False, got {_shown(value)}.")
    if not isinstance(info, Mapping):
        raise InputError(f"'info' of the environment {name} must be a dict, got {_shown(info)}.")
    said = _observation(name, "step", observation)
    return Answer(said, float(reward), bool(terminated), bool(truncated and not terminated))


def _flags() -> tuple[type, ...]:
    """The types of a truth value, numpy's among them where it is in use."""
    numpy = sys.modules.get("numpy")
    return (bool,) if numpy is None else (bool, numpy.bool_)


def _reset_arguments(
    environment: Any, prompt: Any, columns: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of `reset`: those that it names, or gymnasium's."""
    signature = _signature(environment.reset)
    parameters = [] if signature is None else list(signature.parameters.values())
    if _as_in_gymnasium(environment, parameters):
        number = int.from_bytes(blake2b(repr(prompt).encode(), digest_size=4).digest(), "little") >> 1
        return (), {"seed": columns.get("seed", number), "options": {**columns, "prompt": prompt}}
    if signature is None:
        return (prompt,), dict(columns)
    name, right = type(environment).__name__, "reset(prompt, **columns)"
    first = parameters[0] if parameters else None
    if first is not None and first.kind is first.POSITIONAL_OR_KEYWORD and first.name in columns.keys() - {"prompt"}:
        raise InputError(
            f"The reset of the environment {name} must take the prompt first, as {right}, got the column "
            f"'{first.name}' there."
        )
    everything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    others = [p for p in parameters[1:] if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    for parameter in others:
        if parameter.default is parameter.empty and parameter.name not in columns and parameter.name != "prompt":
            given = ", ".join(f"'{column}'" for column in columns)
            raise InputError(
                f"The reset of the environment {name} requires '{parameter.name}', but the data has no such column; "
                + (f"it has {given} besides the prompt." if given else "it has none besides the prompt.")
            )
    named = {parameter.name for parameter in others}
    keywords = {column: value for column, value in columns.items() if everything or column in named}
    _refuse_other_arguments(name, environment.reset, "reset", (prompt,), keywords, right)
    return (prompt,), keywords


def _signature(function: Any) -> inspect.Signature | None:
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):  # some functions written in C have none
        return None


def _as_in_gymnasium(environment: Any, parameters: Sequence[inspect.Parameter]) -> bool:
    """True for an environment of gymnasium, and for a `reset` that is written like theirs: (*, seed, options)."""
    gymnasium = sys.modules.get("gymnasium")  # an environment of gymnasium cannot be there without it
    if gymnasium is not None and isinstance(environment, gymnasium.Env):
        return True
    return {p.name for p in parameters if p.kind is p.KEYWORD_ONLY} == {"seed", "options"} and len(parameters) == 2


def _refuse_other_arguments(
    name: str, function: Any, method: str, arguments: tuple[Any, ...], keywords: Mapping[str, Any], right: str
) -> None:
    """Raise `InputError` for a method that cannot be called with these arguments."""
    signature = _signature(function)
    if signature is None:
        return
    try:
        signature.bind(*arguments, **keywords)
    except TypeError as error:
        raise InputError(
            f"The {method} of the environment {name} must be callable as {right}, got the signature {signature} "
            f"({error})."
        ) from error


def _refuse_async(name: str, method: str, returned: Any) -> None:
    """Raise `InputError` for a coroutine: the next token has to wait for the answer in any case."""
    if inspect.isawaitable(returned):
        if inspect.iscoroutine(returned):
            returned.close()  # else Python complains of it as well
        raise InputError(
            f"The {method} of the environment {name} must be a plain function, got an async one; environments are not "
            "awaited."
        )


def _finite(number: Any) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:  # a whole number beyond what a float holds
        return False


def _observation(name: str, method: str, value: Any) -> Observation:
    """The observation; raises `InputError` unless it is a text, a message or messages."""
    messages = [value] if isinstance(value, Mapping) else value
    if isinstance(value, str):
        return value
    fault: str | None = ""
    if is_chat(messages):
        fault = next(filter(None, map(message_fault, messages)), None)
    if fault is not None:
        raise InputError(
            f"The observation that the environment {name} returns from {method} must be a text, or for a chat messages "
            f"with a 'role' and a 'content', got {f'a message {fault}' if fault else _shown(value)}."
        )
    return value  # type: ignore[no-any-return]


def _calling(environment: Any, method: str, prompt: Any) -> Guarded:
    """Around a call of an environment's method: its own exception becomes an `EnvironmentFailed`."""
    function, name = getattr(environment, method), type(environment).__name__
    return Guarded(lambda error: EnvironmentFailed(_failure(name, method, function, error, prompt)))


def _failure(name: str, method: str, function: Any, error: BaseException, prompt: Any) -> str:
    """An environment's own exception in a sentence, with the line that failed and the prompt."""
    maker = function.__init__ if inspect.isclass(function) else function
    code = getattr(inspect.unwrap(maker), "__code__", None)
    frames = [f for f in traceback.extract_tb(error.__traceback__) if code and f.filename == code.co_filename]
    where = f" at {os.path.basename(frames[-1].filename)}, line {frames[-1].lineno}," if frames else ""
    return f"The environment {name} raised {said_of(error)} in {method}{where} for the prompt {prompt!r:.60}."


def _shown(value: Any) -> str:
    """A value in a sentence: itself if it is a plain one, else its type."""
    if value is None or isinstance(value, bool | int | float | str):
        return f"{value!r:.60}"
    if isinstance(value, tuple):
        return f"a tuple of {len(value)}"
    return f"a value of type {value.__name__ if inspect.isclass(value) else type(value).__name__}"
