"""An environment's words as tokens: as they stand after a plain text, through the chat template in a chat."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

from stepwell.errors import InputError
from stepwell.process.conversation.environment import Observation
from stepwell.process.language.chat import like, refuse_half_characters
from stepwell.process.language.prompts import PromptEncoder


@dataclass(frozen=True)
class ConversationEncoder(PromptEncoder):
    """Turns prompts and observations into tokens. `role` is that of observations which are plain texts.

    A chat's prompt ends before the model's turn is opened: the environment may speak first, and opening the turn is
    then part of its words. Texts show special tokens unless that is switched off, since tools are called by them.
    """

    role: str = "user"

    @classmethod
    def of(cls, encoder: PromptEncoder, role: str) -> Self:
        """An encoder of the same tokens and templates."""
        return cls(**{entry.name: getattr(encoder, entry.name) for entry in fields(PromptEncoder)}, role=role)

    @property
    def keeps(self) -> bool:
        return self.keep_special_tokens is not False

    @property
    def _opens(self) -> bool:
        return False

    def opening(self, prompt: Any, observation: Observation | None) -> list[int]:
        """The tokens between the prompt and the model's first word."""
        if isinstance(prompt, str):
            return [] if observation is None else self._plain(observation)
        before = self.chat(prompt)
        if observation is None and prompt[-1]["role"] == "assistant":
            return []  # the model goes on with what is said already
        longer = [*prompt, *([] if observation is None else self.messages(observation))]
        name = f"the environment's first observation {observation!r:.60}"
        after = self.template.rendered(like(prompt, longer), True, name)
        if not after.startswith(before):
            raise InputError(
                f"The tokenizer's chat template writes the prompt {prompt!r:.60} in another way if something follows "
                "it, so that it cannot be continued; use a template that does not look ahead."
            )
        if observation is not None:
            self.template.check_told(prompt, self.messages(observation), after, name)
        return self._checked(after.removeprefix(before), before)

    def answer(self, observation: Observation, chat: bool, end: int | None) -> list[int]:
        """The tokens after the model's message, whose last token was `end` if the model ended its turn by itself."""
        if not chat:
            return self._plain(observation)
        name = f"the observation {observation!r:.60}"
        tokens = self._checked(self.template.follows(self.messages(observation), name))
        closing = self.tokens(self.template.closing(name))
        if end in closing and end in tokens:
            return tokens[tokens.index(end) + 1 :]
        return tokens[1:] if tokens[:1] == [end] else tokens  # a message may end with what begins the next one

    def _plain(self, observation: Observation) -> list[int]:
        if not isinstance(observation, str):
            raise InputError(
                f"The observation of a conversation that is a plain text must be a text, got {observation!r:.60}; "
                "messages are for prompts that are chats."
            )
        return self._checked(observation)

    def messages(self, observation: Observation) -> list[Any]:
        """The observation as messages."""
        if isinstance(observation, str):
            return [{"role": self.role, "content": observation}]
        return [observation] if isinstance(observation, Mapping) else list(observation)

    def _checked(self, text: str, before: str = "") -> list[int]:
        """The tokens of the environment's words."""
        refuse_half_characters(text, f"The text {text!r:.60} of a conversation")
        ids = self.tokens(text, before)
        if ids and max(ids) >= self.vocabulary:
            raise InputError(
                f"The environment's words {text!r:.60} have the token id {max(ids)}, but the model has only "
                f"{self.vocabulary} tokens; is it the right tokenizer?"
            )
        return ids
