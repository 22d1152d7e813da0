"""Put a language model in conversation with environments; `sw.conversation`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from stepwell.errors import InputError
from stepwell.process.conversation.process import Conversation
from stepwell.process.language.process import Language
from stepwell.ranges import Size, checked


@checked("model", "make_environment", "stop")
def conversation(
    model: Language,
    make_environment: Callable[[], Any],
    *,
    max_turns: Size = 8,
    role: str = "user",
    stop: str | Sequence[str] = (),
    max_turn_tokens: Size | None = None,
    environment_errors: Literal["raise", "end"] = "raise",
    environment_penalty: float = 0.0,
) -> Conversation:
    """A language model in conversation with environments, on the model's parameters and meter.

    `make_environment()` is called once for each row: a class or a function without arguments, whose objects have
    `reset` and `step` (`stepwell.process.conversation.environment.Environment`). A turn of the model's ends with an end
    token, one of the texts in `stop`, or after `max_turn_tokens` tokens; a row is cut after `max_turns` turns, and when
    the model has drawn `max_new_tokens` (`sw.language`) in all of them together. In a chat, observations that are texts
    become messages of the given `role`. `environment_errors`: an environment that raises an exception ends the run
    ("raise"), or its row with the reward `environment_penalty` ("end").

    Raises `InputError` for a model that is no language model, and for an argument out of its range.
    """
    if not isinstance(model, Language):
        raise InputError(f"model must be a language model, such as sw.language(FOLDER), got {model!r:.60}.")
    if not callable(make_environment):
        raise InputError(
            f"make_environment must be a class or a function without arguments, got {make_environment!r:.60}."
        )
    if not role.strip():
        raise InputError(f"role must be the name of a chat's role, such as 'user' or 'tool', got {role!r:.60}.")
    stops = (stop,) if isinstance(stop, str) and stop else tuple(stop)
    if not all(isinstance(text, str) and text for text in stops):
        raise InputError(f"stop must be a text, or texts, none of them empty, got {stop!r:.60}.")
    return Conversation(
        model,
        make_environment,
        max_turns=max_turns,
        role=role,
        stop=stops,
        max_turn_tokens=max_turn_tokens,
        environment_errors=environment_errors,
        environment_penalty=float(environment_penalty),
    )
