"""A tokenizer's chat template: the prompts, continued messages, completions and closings that it writes."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stepwell.errors import InputError
from stepwell.guarded import first_line_of
from stepwell.process.language.chat import Chat, content_of, like, message_fault, refuse_half_characters
from stepwell.process.language.watchdog import WATCHDOG, TookTooLong

SECONDS = 10.0
"""The longest that a template may take to write one chat, which is usually written in less than a millisecond."""

_MARK = "WHATTHEMODELSAID"  # stands for a message's words where the text around them is sought
_ANSWER = "WHATWASSAIDTOTHEMODEL"
_TALK = Chat([{"role": "user", "content": "."}, {"role": "assistant", "content": _MARK}], [])


class TemplateLoops(InputError):
    """A chat template did not end within its time."""

    def __init__(self, name: str):
        super().__init__(
            f"The tokenizer's chat template did not end within {SECONDS:g} seconds for {name}; mend its loops."
        )


@dataclass(frozen=True)
class ChatTemplate:
    """The chat template of a tokenizer, with what it is told besides the messages.

    system: a message put before chats that have none. tools: JSON schemas that every chat is told of which brings none
    of its own. arguments: further variables, such as `enable_thinking`.
    """

    tokenizer: Any
    system: str | None = None
    tools: tuple[Mapping[str, Any], ...] | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def there(self) -> bool:
        """True if the tokenizer has a template."""
        return bool(getattr(self.tokenizer, "chat_template", None))

    def described(self) -> dict[str, Any]:
        """All that changes a chat's tokens, as values for JSON; of the template's text a digest."""
        text = getattr(self.tokenizer, "chat_template", None)
        digest = None if not text else hashlib.sha256(json.dumps(text, sort_keys=True).encode()).hexdigest()
        tools = None if self.tools is None else [dict(tool) for tool in self.tools]
        own = {"chat_template": digest, "chat_template_kwargs": dict(self.arguments)}
        return {"system": self.system, "tools": tools, **own}

    # prompts

    def prompt(self, chat: Sequence[Any], opened: bool, name: str) -> str:
        """The text before the model's words: the chat, with the assistant's turn `opened`.

        A chat whose last message is the assistant's ends with that message's words, for the model to continue.
        """
        if chat[-1]["role"] == "assistant":
            return self._continued(chat, name)
        text, end = self.rendered(chat, opened, name), getattr(self.tokenizer, "eos_token", None)
        if not opened and end and text.endswith(end):  # which some templates write after a whole chat
            shorter = text.removesuffix(end)
            return shorter if self.rendered(chat, True, name).startswith(shorter) else text
        return text

    def _continued(self, chat: Sequence[Any], name: str) -> str:
        """The chat up to its last word, as `continue_final_message` of transformers has it.

        Where the template changes the last message or refuses to end with it, its words follow the opened turn, as
        they do where a thought is begun and not ended: templates that know of thoughts would put another before it.
        """
        said = content_of(chat[-1])
        if not said:
            raise InputError(f"The last message of {name} is the assistant's and has no text that could be continued.")
        *earlier, last = chat
        try:
            whole = self.rendered(like(chat, [*earlier, {**last, "content": f"{said}{_MARK} "}]), False, name)
            before, mark, after = whole.rpartition(_MARK)
            thinks = earlier and "<think>" in said and "</think>" not in said
            if mark and not thinks and _squeezed(said) in _squeezed(before):
                return before if after.startswith(" ") else before.rstrip()  # it trims what a message ends with
        except TemplateLoops:
            raise
        except InputError:
            if not earlier:
                raise
        if not earlier:
            raise InputError(f"The tokenizer's chat template changes the assistant's message that ends {name}.")
        opened = self.rendered(like(chat, earlier), True, name)
        return opened + _without_tag(said, opened)

    # completions

    def completion(self, chat: Sequence[Any], message: Mapping[str, Any], name: str) -> tuple[str, str, str]:
        """A message of the assistant's as the template writes it after a prompt: what comes before it, its words, and
        the text that closes it.

        Where the template writes the prompt or the words in another way once they are in the past, they are taken as
        they stand.
        """
        said, before = content_of(message), self.prompt(chat, True, name)
        if chat[-1]["role"] == "assistant":  # which the completion goes on with
            return before, said, self.closing(name)
        whole = self.rendered(like(chat, [*chat, message]), False, name)
        closing = self._closing_after(chat, name)
        rest = whole.removeprefix(before)
        if rest != whole and rest.endswith(closing) and _squeezed(whole).endswith(_squeezed(said + closing)):
            return before, rest[: len(rest) - len(closing)], closing
        if not said:
            raise InputError(
                f"The tokenizer's chat template writes the prompt of {name} in another way once it is answered, so "
                "that a message without a text cannot follow it."
            )
        return before, _without_tag(said, before), closing

    def _closing_after(self, chat: Sequence[Any], name: str) -> str:
        whole = self.rendered(like(chat, [*chat, _TALK[1]]), False, name)
        return whole.rpartition(_MARK)[2] if _MARK in whole else self.closing(name)

    def closing(self, name: str) -> str:
        """The text that the template writes after an assistant's message."""
        return self.rendered(_TALK, False, name).rpartition(_MARK)[2]

    def follows(self, messages: Sequence[Any], name: str) -> str:
        """The text from the end of an assistant's message to the model's next turn if `messages` are said to it."""
        _, mark, rest = self.rendered(like(_TALK, [*_TALK, *messages]), True, name).rpartition(_MARK)
        if not mark:
            raise InputError(
                "The tokenizer's chat template leaves out the assistant's message before an answer, so that no "
                "conversation can be continued; use another template."
            )
        self.check_told(_TALK, messages, rest, name)
        return rest

    def check_told(self, chat: Sequence[Any], messages: Sequence[Any], text: str, name: str) -> None:
        """Raise `InputError` where the template leaves words of `messages` out of the `text` that it writes of them."""
        spoken = [message for message in messages if content_of(message)]
        if all(_squeezed(content_of(message)) in _squeezed(text) for message in spoken):
            return
        marked = [{**message, "content": _ANSWER} if content_of(message) else message for message in messages]
        if self.rendered(like(chat, [*chat, *marked]), True, name).count(_ANSWER) < len(spoken):  # else it escapes them
            roles = ", ".join(dict.fromkeys(repr(message["role"]) for message in spoken))
            raise InputError(
                f"The tokenizer's chat template leaves out {name}, of the role {roles}, which the model would never "
                "read; use another role or another template."
            )

    # rendering

    def rendered(self, chat: Sequence[Any], opened: bool, name: str) -> str:
        """The messages as the template writes them, with the assistant's turn opened; `name` is for error messages.

        Raises `InputError` for a message that cannot be read, and where the template refuses or takes too long.
        """
        for message in chat:
            if fault := message_fault(message):
                raise InputError(f"A message must have a role and a text, got one {fault} in {name}.")
        messages, options = self._with_system(chat), {"tools": self._tools(chat, name), **self.arguments}
        plain = [_plain(message) for message in messages]
        if self._wants_parts():
            plain = [
                {**each, "content": [{"type": "text", "text": each["content"]}]} if "content" in each else each
                for each in plain
            ]
        try:
            text = self._apply(plain, opened, options)
        except TookTooLong as error:
            raise TemplateLoops(name) from error
        except Exception as error:  # templates raise whatever they like: most often that roles must alternate
            bare = [each for each in plain if "content" not in each]
            try:
                text = self._apply([{"content": "", **each} for each in plain], opened, options) if bare else ""
            except Exception:  # the first reason says more
                text = ""
            if not text:
                raise InputError(f"The tokenizer's chat template refuses {name}: {first_line_of(error)}.") from error
        refuse_half_characters(text, name[0].upper() + name[1:])
        return text

    def _apply(self, messages: list[dict[str, Any]], opened: bool, options: Mapping[str, Any]) -> str:
        apply = self.tokenizer.apply_chat_template
        keywords = {**options, "add_generation_prompt": opened, "tokenize": False}
        return str(WATCHDOG.run(lambda: apply(messages, **keywords), SECONDS))

    def _with_system(self, chat: Sequence[Any]) -> list[Any]:
        system = self.system is not None and chat[0]["role"] != "system"
        return [*([{"role": "system", "content": self.system}] if system else []), *chat]

    def _tools(self, chat: Sequence[Any], name: str) -> list[dict[str, Any]] | None:
        """The tools that a chat is told of: its own, of which texts name some of `tools`, or all of `tools`."""
        if not isinstance(chat, Chat):
            return None if self.tools is None else [dict(tool) for tool in self.tools]
        known = {tool_name(tool): tool for tool in self.tools or ()}
        unknown = [tool for tool in chat.tools if isinstance(tool, str) and tool not in known]
        if unknown:
            there = ", ".join(f"'{each}'" for each in known) or "none"
            raise InputError(f"The tool '{unknown[0]}' of {name} must be one of the model's tools; there is {there}.")
        return [dict(known[tool] if isinstance(tool, str) else tool) for tool in chat.tools] or None

    def _wants_parts(self) -> bool:
        """True for a template that leaves out texts, and writes them only as parts of a message."""
        text = self.tokenizer.chat_template
        key = json.dumps(text, sort_keys=True) if isinstance(text, dict) else str(text)
        if key not in _PARTS:
            written = []
            for content in (_MARK, [{"type": "text", "text": _MARK}]):
                try:
                    written.append(_MARK in self._apply([{"role": "user", "content": content}], True, self.arguments))
                except TookTooLong as error:
                    raise TemplateLoops(f"the message {content!r}") from error
                except Exception:  # it wants other messages first: texts are what templates usually write
                    written.append(len(written) == 0)
            _PARTS[key] = written == [False, True]
        return _PARTS[key]


_PARTS: dict[str, bool] = {}
"""The templates that were tried, by their texts."""


def tool_name(tool: Mapping[str, Any]) -> str:
    """The name of a tool, from its JSON schema."""
    inner = tool.get("function", tool)
    return str(inner.get("name") if isinstance(inner, Mapping) else inner)


def tool_schemas(tools: Sequence[Any] | None) -> tuple[dict[str, Any], ...] | None:
    """Tools as JSON schemas; functions become such by their signatures and docstrings. None for None.

    Raises `InputError` for anything that is neither a schema nor such a function.
    """
    if tools is None:
        return None
    schemas = []
    for tool in tools:
        if isinstance(tool, Mapping):
            schemas.append(dict(tool))
        elif callable(tool):
            from transformers.utils import get_json_schema

            try:
                schemas.append(get_json_schema(tool))
            except Exception as error:  # its own errors are of several kinds
                raise InputError(
                    "tools must be functions with type hints and a docstring that explains every argument, got "
                    f"{getattr(tool, '__name__', tool)!r:.60}: {first_line_of(error)}."
                ) from error
        else:
            raise InputError(f"tools must be functions or JSON schemas, got {tool!r:.60}.")
    return tuple(schemas)


def chat_template(
    tokenizer: Any,
    system: str | None = None,
    tools: Sequence[Any] | None = None,
    template: str | os.PathLike[str] | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> ChatTemplate:
    """The chat template of a tokenizer, or of a twin of it with another `template`, a text or a file.

    Raises `InputError` for a template that is not there or cannot be read, and for tools and arguments that are none.
    """
    if template is not None:
        tokenizer = copy.copy(tokenizer)  # the caller's own keeps its template
        tokenizer.chat_template = _template_text(template)
    given = dict(arguments or {})
    if not all(isinstance(name, str) for name in given):
        raise InputError(f"chat_template_kwargs must be a dictionary of variables by name, got {given!r:.60}.")
    own = {"conversation", "messages", "tools", "chat_template", "add_generation_prompt", "continue_final_message"}
    own |= {"tokenize", "return_dict", "return_tensors", "padding", "truncation", "max_length"}
    taken = sorted(own & given.keys())
    if taken:
        raise InputError(f"chat_template_kwargs must be variables of the template's own, got '{taken[0]}'.")
    return ChatTemplate(tokenizer, system, tool_schemas(tools), given)


def _template_text(template: str | os.PathLike[str]) -> str:
    """The text of a template, which may be in a file."""
    if isinstance(template, str) and ("{{" in template or "{%" in template):
        text, place = template, "chat_template"
    elif os.fspath(template):
        place = f"The chat template '{os.fspath(template)!s:.200}'"
        try:
            text = Path(template).expanduser().read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{place} is not UTF-8 text; save it as UTF-8.") from error
        except (OSError, ValueError, RuntimeError) as error:  # no such file, a name that no file may have, no such user
            reason = getattr(error, "strerror", None) or f"{error}"
            raise InputError(f"{place} cannot be read: {reason}; give a file, or the template's text.") from error
    else:
        raise InputError(f"chat_template must be a file or a template's text, got {template!r:.60}.")
    from jinja2 import TemplateSyntaxError
    from transformers.utils.chat_template_utils import _compile_jinja_template

    try:
        _compile_jinja_template(text)
    except TemplateSyntaxError as error:
        raise InputError(f"{place} is no template of jinja (line {error.lineno}: {error.message}).") from error
    return text


def _plain(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as templates read it: its content is a text, and what it does not have is not there."""
    own = {name: value for name, value in message.items() if value is not None}
    return {**own, "content": content_of(message)} if "content" in own else own


def _without_tag(said: str, before: str) -> str:
    """Words without the tag that they begin with, where the text before them ends with it: a thought begins once."""
    tag = re.match(r"<[^<>\s]+>", said)
    if tag is None or not before.rstrip().endswith(tag[0]):
        return said
    return said[tag.end() :].removeprefix(before[len(before.rstrip()) :])


def _squeezed(text: str) -> str:
    """The text without white space, which templates trim and add."""
    return "".join(text.split())
