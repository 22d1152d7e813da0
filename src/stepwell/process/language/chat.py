"""Chats and texts as users give them, before any tokenizer reads them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from stepwell.errors import InputError


class Chat(list[Any]):
    """The messages of a chat with tools of its own: JSON schemas, or names of tools that the model is given.

    It is a list of messages in every other respect, and rewards and environments see it as such.

    Example:
        >>> chat = Chat([{"role": "user", "content": "What time is it?"}], ["clock"])
        >>> chat[0]["content"], chat.tools
        ('What time is it?', ('clock',))
    """

    def __init__(self, messages: Iterable[Any], tools: Sequence[Any]):
        super().__init__(messages)
        self.tools = tuple(tools)

    def __repr__(self) -> str:
        return f"Chat({super().__repr__()}, {list(self.tools)!r})"


def like(chat: Any, messages: Any) -> Any:
    """Other messages, with the tools of a chat that has its own; anything but messages as it is."""
    return Chat(messages, chat.tools) if isinstance(chat, Chat) and is_chat(messages) else messages


def is_chat(prompt: Any) -> bool:
    """True for a non-empty list of messages, each with a role and something that it says or calls."""
    return (
        isinstance(prompt, Sequence)
        and not isinstance(prompt, str)
        and len(prompt) > 0
        and all(isinstance(message, Mapping) and "role" in message and len(message) > 1 for message in prompt)
    )


def message_fault(message: Any) -> str | None:
    """The reason why a message cannot be read, in words that follow "a message"; None for one that can.

    A message has a `role` and a `content`, a text or a list of parts of text; one that calls tools needs no content.

    Example:
        >>> message_fault({"role": "user", "content": [{"type": "image", "url": "cat.png"}]})
        "with a part of type 'image', of which only the text can be read"
        >>> message_fault({"role": "assistant", "tool_calls": [{"name": "clock"}]})
    """
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str) or not message["role"]:
        return "without a 'role' that is a text"
    content = message.get("content")
    if content is None and all(value is None for name, value in message.items() if name != "role"):
        return "without a 'content'"
    if not isinstance(content, str | list | tuple | None):
        return f"whose 'content' is of type {type(content).__name__}"
    for part in [] if content is None or isinstance(content, str) else content:
        text = part.get("text") if isinstance(part, Mapping) else part
        kind = part.get("type", "text") if isinstance(part, Mapping) else "text"
        if kind != "text" or not isinstance(text, str):
            named = f"of type {kind!r:.40}" if kind != "text" else "without a text"
            return f"with a part {named}, of which only the text can be read"
    return None


def content_of(message: Mapping[str, Any]) -> str:
    """The text of a message, its parts put together; empty for one that only calls tools."""
    content = message.get("content")
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part if isinstance(part, str) else part["text"] for part in content)


def refuse_half_characters(text: str, name: str) -> None:
    """Raise `InputError` for a lone surrogate, which JSON may hold and no tokenizer reads; `name` says whose text."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{name} holds half a character (a lone surrogate, at place {error.start}); mend or remove it."
        ) from error
