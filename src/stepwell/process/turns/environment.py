"""A user's environment, called with care: what it gets, what it has to return, and one sentence where it does not."""

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
from typing import Any, NoReturn, Protocol

import numpy as np

from stepwell.errors import InputError, StepwellError
from stepwell.process.prompts import is_chat

Observation = str | Mapping[str, Any] | Sequence[Mapping[str, Any]]
"""What an environment says: a text, or for a chat also a message, or several, with a 'role' and a 'content'."""


class Environment(Protocol):
    """What a model talks to: one conversation, from `reset` on. Also any `gymnasium.Env` whose observations are text.

    `reset` gets the prompt and those columns of its row of data that it names (all, with `**columns`), and returns
    what is said to the model after the prompt: an observation or None, alone or with a dict, as gymnasium has it. An
    environment of gymnasium gets them as `options`, and as its seed the column `seed` or a number made of the prompt.

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
    try:
        first = environment.reset(*arguments, **keywords)
    except StepwellError:
        raise
    except (Exception, SystemExit) as error:
        _failed(name, "reset", environment.reset, error, prompt)
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
    if not isinstance(returned, tuple):
        if inspect.iscoroutine(returned):
            returned.close()  # else Python complains of it as well
        raise InputError(f"The environment {name} returned {_shown(returned)} from step; {right}")
    if len(returned) != 5:
        raise InputError(f"The environment {name} returned {len(returned)} values from step; {right}")
    observation, reward, terminated, truncated, info = returned
    if getattr(reward, "ndim", None) == 0:
        reward = reward.item()
    if not isinstance(reward, Real) or not math.isfinite(reward):
        raise InputError(f"The environment {name} returned the reward {_shown(reward)}; a finite number is right.")
    for what, value in (("terminated", terminated), ("truncated", truncated)):
        if not isinstance(value, bool | np.bool_):
            raise InputError(f"The environment {name} returned {what}={_shown(value)}; True or False is right.")
    if not isinstance(info, Mapping):
        raise InputError(f"The environment {name} returned {_shown(info)} as info; a dict is right.")
    said = _observation(name, "step", observation)
    return Answer(said, float(reward), bool(terminated), bool(truncated and not terminated))


def _reset_arguments(
    environment: Any, prompt: Any, columns: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """How `reset` is called: with what it names, or as gymnasium calls it."""
    gymnasium = sys.modules.get("gymnasium")  # an environment of gymnasium cannot be there without it
    if gymnasium is not None and isinstance(environment, gymnasium.Env):
        number = int.from_bytes(blake2b(repr(prompt).encode(), digest_size=4).digest(), "little") >> 1
        return (), {"seed": columns.get("seed", number), "options": {**columns, "prompt": prompt}}
    try:
        parameters = inspect.signature(environment.reset).parameters.values()
    except (TypeError, ValueError):  # some functions written in C do not tell
        return (prompt,), dict(columns)
    everything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    named = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return (prompt,), {name: value for name, value in columns.items() if everything or name in named[1:]}


def _observation(name: str, method: str, value: Any) -> Observation:
    """The observation, which has to be a text, a message or messages."""
    if isinstance(value, str) or is_chat([value]) or is_chat(value):
        return value  # type: ignore[no-any-return]
    raise InputError(
        f"The environment {name} returned {_shown(value)} as the observation of {method}; a text, or for a chat "
        "messages with a 'role' and a 'content', is right."
    )


def _failed(name: str, method: str, function: Any, error: BaseException, prompt: Any) -> NoReturn:
    """What is raised in place of the environment's own exception: the line that failed, and the prompt."""
    code = getattr(inspect.unwrap(function), "__code__", None)
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
