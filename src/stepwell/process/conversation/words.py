"""An environment's words as tokens: as they stand after a plain text, through the chat template in a chat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stepwell.errors import InputError
from stepwell.process.conversation.environment import Observation
from stepwell.process.language.chat import refuse_half_characters
from stepwell.process.language.prompts import PromptEncoder

_MESSAGE = "WHATTHEMODELSAID"  # stands for the model's words when a template is rendered for what follows them


@dataclass(frozen=True)
class ConversationEncoder(PromptEncoder):
    """Turns prompts and observations into tokens. `role` is that of observations which are plain texts.

    A chat's prompt ends before the model's turn is opened: the environment may speak first, and opening the turn is
    then part of its words.
    """

    role: str = "user"

    def _chat(self, messages: Sequence[Any], shown: str) -> list[int]:
        if not getattr(self.tokenizer, "chat_template", None):
            raise InputError(f"The prompt {shown} is a chat, but the tokenizer has no chat template; give a text.")
        return self._tokens(self._rendered(self._with_system(messages), False, f"the prompt {shown}"))

    def opening(self, prompt: Any, observation: Observation | None) -> list[int]:
        """The tokens between the prompt and the model's first word."""
        if isinstance(prompt, str):
            return [] if observation is None else self._plain(observation)
        messages = self._with_system(prompt)
        longer = messages if observation is None else messages + self.messages(observation)
        name = f"the environment's first observation {observation!r:.60}"
        before, after = self._rendered(messages, False, name), self._rendered(longer, True, name)
        if not after.startswith(before):
            raise InputError(
                f"The tokenizer's chat template writes the prompt {prompt!r:.60} in another way if something follows "
                "it, so that it cannot be continued; use a template that does not look ahead."
            )
        return self._tokens(after.removeprefix(before))

    def answer(self, observation: Observation, chat: bool, end: int | None) -> list[int]:
        """The tokens after the model's message, whose last token was `end` if the model ended its turn by itself."""
        if not chat:
            return self._plain(observation)
        name = f"the observation {observation!r:.60}"
        talk = [{"role": "user", "content": "."}, {"role": "assistant", "content": _MESSAGE}]
        closing = self._tokens(self._rendered(talk, False, name).rpartition(_MESSAGE)[2])
        _, mark, rest = self._rendered(talk + self.messages(observation), True, name).rpartition(_MESSAGE)
        if not mark:
            raise InputError(
                "The tokenizer's chat template leaves out the assistant's message before an answer, so that no "
                "conversation can be continued; use another template."
            )
        tokens = self._tokens(rest)
        return tokens[tokens.index(end) + 1 :] if end in closing and end in tokens else tokens

    def _plain(self, observation: Observation) -> list[int]:
        if not isinstance(observation, str):
            raise InputError(
                f"The observation of a conversation that is a plain text must be a text, got {observation!r:.60}; "
                "messages are for prompts that are chats."
            )
        return self._tokens(observation)

    def messages(self, observation: Observation) -> list[Any]:
        """The observation as messages."""
        if isinstance(observation, str):
            return [{"role": self.role, "content": observation}]
        return [observation] if isinstance(observation, Mapping) else list(observation)

    def _with_system(self, messages: Sequence[Any]) -> list[Any]:
        system = self.system is not None and messages[0]["role"] != "system"
        return [*([{"role": "system", "content": self.system}] if system else []), *messages]

    def _rendered(self, messages: Sequence[Any], opened: bool, name: str) -> str:
        """The messages as the template writes them, with the assistant's turn opened; `name` is for error messages."""
        try:
            return str(self.tokenizer.apply_chat_template(messages, add_generation_prompt=opened, tokenize=False))
        except Exception as error:  # templates raise whatever they like: most often that roles must alternate
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
            raise InputError(f"The tokenizer's chat template refuses {name}: {reason}.") from error

    def _tokens(self, text: str) -> list[int]:
        refuse_half_characters(text, f"The text {text!r:.60} of a conversation")
        ids = list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        if ids and max(ids) >= self.vocabulary:
            raise InputError(
                f"The environment's words {text!r:.60} have the token id {max(ids)}, but the model has only "
                f"{self.vocabulary} tokens; is it the right tokenizer?"
            )
        return ids
