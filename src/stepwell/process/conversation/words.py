"""What an environment says, as tokens: as it stands after a plain text, through the chat template in a chat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stepwell.errors import InputError
from stepwell.process.conversation.environment import Observation
from stepwell.process.language.prompts import PromptEncoder, refuse_half_characters

_MESSAGE = "WHATTHEMODELSAID"  # stands for the model's words where a template is asked what comes after them


@dataclass(frozen=True)
class ConversationEncoder(PromptEncoder):
    """Prompts and observations to tokens. `role` is that of observations which are plain texts.

    A chat's prompt ends before the model's turn is opened: the environment may have something to say first, and
    opening the turn is then part of its words.
    """

    role: str = "user"

    def _chat(self, messages: Sequence[Any], shown: str) -> list[int]:
        if not getattr(self.tokenizer, "chat_template", None):
            raise InputError(f"The prompt {shown} is a chat, but the tokenizer has no chat template; give a text.")
        return self._tokens(self._rendered(self._whole(messages), False, f"the prompt {shown}"))

    def opening(self, prompt: Any, observation: Observation | None) -> list[int]:
        """What comes after the prompt and before the model's first word."""
        if isinstance(prompt, str):
            return [] if observation is None else self._plain(observation)
        whole = self._whole(prompt)
        said = whole if observation is None else whole + self.messages(observation)
        what = f"what the environment says first, {observation!r:.60}"
        before, after = self._rendered(whole, False, what), self._rendered(said, True, what)
        if not after.startswith(before):
            raise InputError(
                f"The tokenizer's chat template writes the prompt {prompt!r:.60} otherwise where something follows it, "
                "so that it cannot be gone on with; use a template that does not look ahead."
            )
        return self._tokens(after.removeprefix(before))

    def answer(self, observation: Observation, chat: bool, end: int | None) -> list[int]:
        """What comes after the model's words, of which `end` was the last token if it ended its turn by itself."""
        if not chat:
            return self._plain(observation)
        what = f"the observation {observation!r:.60}"
        talk = [{"role": "user", "content": "."}, {"role": "assistant", "content": _MESSAGE}]
        closing = self._tokens(self._rendered(talk, False, what).rpartition(_MESSAGE)[2])
        found, _, rest = self._rendered(talk + self.messages(observation), True, what).rpartition(_MESSAGE)
        if not found:
            raise InputError(
                "The tokenizer's chat template leaves out what the assistant said before an answer, so that no "
                "conversation can be gone on with; use another template."
            )
        tokens = self._tokens(rest)
        return tokens[tokens.index(end) + 1 :] if end in closing and end in tokens else tokens

    def _plain(self, observation: Observation) -> list[int]:
        if not isinstance(observation, str):
            raise InputError(
                f"The environment answers a plain text with the message {observation!r:.60}; a text is right, or "
                "prompts that are chats."
            )
        return self._tokens(observation)

    def messages(self, observation: Observation) -> list[Any]:
        """The observation as messages."""
        if isinstance(observation, str):
            return [{"role": self.role, "content": observation}]
        return [observation] if isinstance(observation, Mapping) else list(observation)

    def _whole(self, messages: Sequence[Any]) -> list[Any]:
        system = self.system is not None and messages[0]["role"] != "system"
        return [*([{"role": "system", "content": self.system}] if system else []), *messages]

    def _rendered(self, messages: Sequence[Any], opened: bool, what: str) -> str:
        try:
            return str(self.tokenizer.apply_chat_template(messages, add_generation_prompt=opened, tokenize=False))
        except Exception as error:  # templates raise whatever they like: most often that roles must alternate
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
            raise InputError(f"The tokenizer's chat template refuses {what}: {reason}.") from error

    def _tokens(self, text: str) -> list[int]:
        refuse_half_characters(text, f"The text {text!r:.60} of a conversation")
        ids = list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        if ids and max(ids) >= self.vocabulary:
            raise InputError(
                f"The environment's words {text!r:.60} have the token id {max(ids)}, but the model knows only "
                f"{self.vocabulary} tokens; is it the right tokenizer?"
            )
        return ids
