"""Put a language model in conversation with environments; `sw.conversation`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from stepwell.errors import InputError
from stepwell.process.conversation.process import Conversation
from stepwell.process.language.process import Language


def conversation(
    model: Language,
    make_environment: Callable[[], Any],
    *,
    max_turns: int = 8,
    role: str = "user",
    stop: str | Sequence[str] = (),
) -> Conversation:
    """A language model in conversation with environments, on the model's parameters and meter.

    `make_environment()` is called once for each row: a class or a function without arguments, whose objects have
    `reset` and `step` (`stepwell.process.conversation.environment.Environment`). A row is cut after `max_turns` turns
    of the model, each of which ends with an end token or one of the texts in `stop`. In a chat, observations that are
    texts become messages of the given `role`.

    Raises `InputError` for a model that is no language model, and for an argument out of its range.
    """
    if not isinstance(model, Language):
        raise InputError(f"model must be a language model, such as sw.language(FOLDER), got {model!r:.60}.")
    if not callable(make_environment):
        raise InputError(
            f"make_environment must be a class or a function without arguments, got {make_environment!r:.60}."
        )
    if isinstance(max_turns, bool) or not isinstance(max_turns, int) or max_turns < 1:
        raise InputError(f"max_turns must be a whole number of at least 1, got {max_turns!r}.")
    if not isinstance(role, str) or not role.strip():
        raise InputError(f"role must be the name of a chat's role, such as 'user' or 'tool', got {role!r:.60}.")
    stops = (stop,) if isinstance(stop, str) and stop else tuple(stop)
    if not all(isinstance(text, str) and text for text in stops):
        raise InputError(f"stop must be a text, or texts, none of them empty, got {stop!r:.60}.")
    return Conversation(model, make_environment, max_turns=max_turns, role=role, stop=stops)
