"""A user's environment, called with care: what it gets, what it has to return, and one sentence where it does not."""

from __future__ import annotations

import functools
import inspect
import math
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b, sha256
from numbers import Real
from pathlib import Path
from typing import Any, NoReturn, Protocol

import numpy as np

from stepwell.errors import InputError, StepwellError
from stepwell.process.language.prompts import is_chat

Observation = str | Mapping[str, Any] | Sequence[Mapping[str, Any]]
"""What an environment says: a text, or for a chat also a message, or several, with a 'role' and a 'content'."""


class Environment(Protocol):
    """What a model talks to: one conversation, from `reset` on. Also any `gymnasium.Env` whose observations are text.

    `reset` gets the prompt and those columns of its row of data that it names (all, with `**columns`), and returns
    what is said to the model after the prompt: an observation or None, alone or with a dict, as gymnasium has it. An
    environment of gymnasium, or one with its `reset(*, seed, options)`, gets them as `options`, and as its seed the
    column `seed` or a number made of the prompt.

    `step` gets what the model said and returns an observation, the reward of that turn, whether the conversation is
    over (`terminated`), whether it was cut short (`truncated`), and a dict. Nothing is said to the model after the
    end. It may draw nothing from outside itself: the same words have to get the same answer.

    Before it is told anything, an environment is copied by `copy.deepcopy`, since the same partial conversation may be
    gone on with twice. One that cannot be copied is used as it is, which does for rows from the beginning on, each
    with an environment of its own; any other fork is refused by `CannotFork`.
    """

    def reset(self, prompt: Any, **columns: Any) -> Any: ...
    def step(self, message: str) -> tuple[Any, float, bool, bool, dict[str, Any]]: ...


def environment_return(environment_return: list[float]) -> list[float]:
    """The reward function for conversations: the sum of what the environment paid for each turn."""
    return environment_return


@dataclass(frozen=True)
class Answer:
    """What an environment returned for one message."""

    observation: Observation
    reward: float
    terminated: bool
    truncated: bool


def opened(make: Callable[[], Any], prompt: Any, columns: Mapping[str, Any]) -> tuple[Any, Observation | None]:
    """An environment of the factory's, reset for a prompt, and what it says first."""
    try:
        environment = make()
    except StepwellError:
        raise
    except (Exception, SystemExit) as error:
        _failed(getattr(make, "__name__", type(make).__name__), "the environment's factory", make, error, prompt)
    for ability in ("reset", "step"):
        if not callable(getattr(environment, ability, None)) or inspect.isclass(environment):
            raise InputError(
                f"The environment's factory returned {_shown(environment)}, which has no method '{ability}'; an object "
                "with reset(prompt, **columns) and step(message) is right."
            )
    name = type(environment).__name__
    arguments, keywords = _reset_arguments(environment, prompt, columns)
    _refuse_other_arguments(name, environment.step, "step", ("",), {}, "step(message)")
    try:
        first = environment.reset(*arguments, **keywords)
    except StepwellError:
        raise
    except (Exception, SystemExit) as error:
        _failed(name, "reset", environment.reset, error, prompt)
    _refuse_async(name, "reset", first)
    if isinstance(first, tuple):
        if len(first) != 2 or not isinstance(first[1], Mapping):
            raise InputError(
                f"The environment {name} returned {_shown(first)} from reset; an observation, None, or "
                "(observation, info) with a dict is right."
            )
        first = first[0]
    if first is None:
        return environment, None
    return environment, _observation(name, "reset", first)


def answered(environment: Any, message: str, prompt: Any) -> Answer:
    """What the environment says to a message; raises `InputError` for anything but the five values there have to be."""
    name = type(environment).__name__
    try:
        returned = environment.step(message)
    except StepwellError:
        raise
    except (Exception, SystemExit) as error:
        _failed(name, "step", environment.step, error, prompt)
    right = "(observation, reward, terminated, truncated, info) is right."
    _refuse_async(name, "step", returned)
    if not isinstance(returned, tuple):
        raise InputError(f"The environment {name} returned {_shown(returned)} from step; {right}")
    if len(returned) != 5:
        raise InputError(f"The environment {name} returned {len(returned)} values from step; {right}")
    observation, reward, terminated, truncated, info = returned
    if getattr(reward, "ndim", None) == 0:
        reward = reward.item()
    if not isinstance(reward, Real) or not _finite(reward):
        raise InputError(f"The environment {name} returned the reward {_shown(reward)}; a finite number is right.")
    for what, value in (("terminated", terminated), ("truncated", truncated)):
        if not isinstance(value, bool | np.bool_):
            raise InputError(f"The environment {name} returned {what}={_shown(value)}; True or False is right.")
    if not isinstance(info, Mapping):
        raise InputError(f"The environment {name} returned {_shown(info)} as info; a dict is right.")
    said = _observation(name, "step", observation)
    return Answer(said, float(reward), bool(terminated), bool(truncated and not terminated))


def origin(make: Callable[[], Any]) -> tuple[str, str]:
    """A factory's qualified name and a digest of the text it comes from: the same in whatever process it is asked for.

    The text is that of the source file; of a file that is run as a program, whose other lines may be about the run, it
    is the factory's own. Where it cannot be had it is empty, and the name begins with the module's.

    Example:
        >>> name, digest = origin(functools.partial(Answer, "yes", reward=1.0))
        >>> name, len(digest)
        ("Answer('yes', reward=1.0)", 64)
        >>> origin(dict)
        ('builtins.dict', '')
    """
    if isinstance(make, functools.partial):
        name, digest = origin(make.func)
        given = [*map(_word, make.args), *(f"{key}={_word(value)}" for key, value in sorted(make.keywords.items()))]
        return f"{name}({', '.join(given)})", digest
    named: Any = make if hasattr(make, "__qualname__") else type(make)
    module = getattr(named, "__module__", None)
    try:
        target = inspect.unwrap(named)
        file = inspect.getsourcefile(target)
        text = inspect.getsource(target).encode() if module == "__main__" else Path(file or "").read_bytes()
    except (OSError, TypeError, ValueError):  # of a module written in C, of a notebook, or taken away since
        return f"{module}.{named.__qualname__}", ""
    return str(named.__qualname__), sha256(text).hexdigest()


def _word(value: Any) -> str:
    """An argument in words that hold no address in memory."""
    if value is None or isinstance(value, bool | int | float | str | bytes):
        return repr(value)
    if isinstance(value, list | tuple):
        return f"({', '.join(map(_word, value))})"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{_word(key)}: {_word(each)}' for key, each in value.items())}}}"
    return origin(value)[0] if callable(value) else type(value).__qualname__


def _reset_arguments(
    environment: Any, prompt: Any, columns: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """How `reset` is called: with what it names, or as gymnasium calls it."""
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
            f"The reset of the environment {name} takes the column '{first.name}' first, where it is given the prompt; "
            f"{right} is right."
        )
    everything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    others = [p for p in parameters[1:] if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    for parameter in others:
        if parameter.default is parameter.empty and parameter.name not in columns and parameter.name != "prompt":
            there = ", ".join(f"'{column}'" for column in columns)
            raise InputError(
                f"The reset of the environment {name} requires '{parameter.name}', but the data has no such column; "
                + (f"it has {there} besides the prompt." if there else "it has none besides the prompt.")
            )
    named = {parameter.name for parameter in others}
    keywords = {column: value for column, value in columns.items() if everything or column in named}
    _refuse_other_arguments(name, environment.reset, "reset", (prompt,), keywords, right)
    return (prompt,), keywords


def _signature(function: Any) -> inspect.Signature | None:
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):  # some functions written in C do not tell
        return None


def _as_in_gymnasium(environment: Any, parameters: Sequence[inspect.Parameter]) -> bool:
    """Whether it is an environment of gymnasium, or one whose `reset` is written like theirs: (*, seed, options)."""
    gymnasium = sys.modules.get("gymnasium")  # an environment of gymnasium cannot be there without it
    if gymnasium is not None and isinstance(environment, gymnasium.Env):
        return True
    return {p.name for p in parameters if p.kind is p.KEYWORD_ONLY} == {"seed", "options"} and len(parameters) == 2


def _refuse_other_arguments(
    name: str, function: Any, method: str, arguments: tuple[Any, ...], keywords: Mapping[str, Any], right: str
) -> None:
    """Raise `InputError` where a method cannot be called with what it is given."""
    signature = _signature(function)
    if signature is None:
        return
    try:
        signature.bind(*arguments, **keywords)
    except TypeError as error:
        raise InputError(
            f"The {method} of the environment {name} is called as {right}, which {signature} does not take ({error})."
        ) from error


def _refuse_async(name: str, method: str, returned: Any) -> None:
    """Raise `InputError` for a coroutine: a conversation's next word waits for the answer in any case."""
    if inspect.isawaitable(returned):
        if inspect.iscoroutine(returned):
            returned.close()  # else Python complains of it as well
        raise InputError(
            f"The {method} of the environment {name} is async, and environments are not awaited; a plain function is "
            "right."
        )


def _finite(number: Any) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:  # a whole number beyond what a float holds
        return False


def _observation(name: str, method: str, value: Any) -> Observation:
    """The observation, which has to be a text, a message or messages."""
    messages = [value] if isinstance(value, Mapping) else value
    if isinstance(value, str) or (is_chat(messages) and all(map(_is_said, messages))):
        return value  # type: ignore[no-any-return]
    raise InputError(
        f"The environment {name} returned {_shown(value)} as the observation of {method}; a text, or for a chat "
        "messages with a 'role' and a 'content', is right."
    )


def _is_said(message: Mapping[str, Any]) -> bool:
    """Whether a message has a role and a content that a chat template may read."""
    return isinstance(message["role"], str) and isinstance(message["content"], str | list | None)


def _failed(name: str, method: str, function: Any, error: BaseException, prompt: Any) -> NoReturn:
    """What is raised in place of the environment's own exception: the line that failed, and the prompt."""
    maker = function.__init__ if inspect.isclass(function) else function
    code = getattr(inspect.unwrap(maker), "__code__", None)
    frames = [f for f in traceback.extract_tb(error.__traceback__) if code and f.filename == code.co_filename]
    where = f" at {os.path.basename(frames[-1].filename)}, line {frames[-1].lineno}," if frames else ""
    said = " ".join(str(error).split()).rstrip(".")
    raise InputError(
        f"The environment {name} raised {type(error).__name__}{f' ({said:.200})' if said else ''} in {method}{where} "
        f"for the prompt {prompt!r:.60}."
    ) from error


def _shown(value: Any) -> str:
    """A value in a sentence, by its type where it is no plain one."""
    if value is None or isinstance(value, bool | int | float | str):
        return f"{value!r:.60}"
    if isinstance(value, tuple):
        return f"a tuple of {len(value)}"
    return f"a value of type {value.__name__ if inspect.isclass(value) else type(value).__name__}"
