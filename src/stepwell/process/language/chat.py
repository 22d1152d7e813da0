"""Chats and texts as users give them, before any tokenizer reads them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from stepwell.errors import InputError


def is_chat(prompt: Any) -> bool:
    """True for a non-empty list of messages, each with a role and a content."""
    return (
        isinstance(prompt, Sequence)
        and not isinstance(prompt, str)
        and len(prompt) > 0
        and all(isinstance(message, dict) and {"role", "content"} <= message.keys() for message in prompt)
    )


def refuse_half_characters(text: str, name: str) -> None:
    """Raise `InputError` for a lone surrogate, which JSON may hold and no tokenizer reads; `name` says whose text."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{name} holds half a character (a lone surrogate, at place {error.start}); mend or remove it."
        ) from error
