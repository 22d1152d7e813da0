"""Prompts and completions to tokens: plain texts and chats, checked on the way in; rows packed for a forward pass."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from stepwell.errors import InputError
from stepwell.process.language.chat import content_of, is_chat, message_fault, refuse_half_characters
from stepwell.process.language.template import ChatTemplate, TemplateLoops
from stepwell.process.language.vocabulary import Vocabulary


@dataclass(frozen=True)
class PromptEncoder:
    """Turns prompts and completions into token ids for one tokenizer and model, and ids back into texts.

    `limit` is the longest prompt that the model has positions for (None: no limit), `vocabulary` its number of
    tokens. `end` ends a completion of a plain text, `ends` are all tokens that samples end at. `template` writes chats.
    `keep_special_tokens`: texts show special tokens that are more than structure; None for the encoder's own choice.
    """

    tokenizer: Any
    limit: int | None
    vocabulary: int
    end: int
    ends: tuple[int, ...]
    template: ChatTemplate
    keep_special_tokens: bool | None = None

    def __call__(self, prompt: Any) -> list[int]:
        """The token ids of a text, or of a list of chat messages with the assistant's turn opened, or continued where
        the last message is the assistant's.

        Raises `InputError` for anything else, and for a prompt that is empty, too long, or holds a token beyond the
        model's vocabulary.
        """
        shown = shortened(prompt)
        if isinstance(prompt, str):
            if self.template.system is not None:
                raise InputError(f"The prompt {shown} is a plain text; the `system` option needs chat messages.")
            refuse_half_characters(prompt, f"The prompt {shown}")
            ids = self.words.prompt(prompt)
        elif is_chat(prompt):
            ids = self.tokens(self.chat(prompt))
            if len(ids) > 1 and ids[0] == ids[1] == self.tokenizer.bos_token_id:
                ids = ids[1:]  # the template's, and the first message's own
        else:
            raise InputError(
                f"A prompt must be a text or a list of messages with a 'role' and a 'content', got {shown}."
            )
        if not ids:
            raise InputError(f"The prompt {shown} is empty: it has no token to start from.")
        if self.limit is not None and len(ids) > self.limit:
            raise InputError(f"The prompt {shown} has {len(ids)} tokens; the model has positions for {self.limit}.")
        if max(ids) >= self.vocabulary:
            raise InputError(
                f"The prompt {shown} has the token id {max(ids)}, but the model has only {self.vocabulary} tokens; "
                "is it the right tokenizer?"
            )
        return ids

    def chat(self, messages: Sequence[Any]) -> str:
        """The text of a chat's prompt."""
        return self._template_for(messages).prompt(messages, self._opens, f"the prompt {shortened(messages)}")

    @property
    def _opens(self) -> bool:
        """True if a chat's prompt opens the assistant's turn."""
        return True

    def _template_for(self, messages: Sequence[Any]) -> ChatTemplate:
        if not self.template.there:
            raise InputError(
                f"The prompt {shortened(messages)} is a chat, but the tokenizer has no chat template; give a text."
            )
        return self.template

    # completions

    def completion(self, completion: Any, prompt: Any = None) -> list[int]:
        """The token ids of a completion from elsewhere, a text or the assistant's message, up to its end token.

        After a chat it is what the chat template writes after the opened turn, up to the token that closes the message;
        after a text it is the text, and the tokenizer's end of sequence. Without a prompt it is of the prompt's kind
        that it has itself. Raises `InputError` for anything else.
        """
        name = f"the completion {shortened(completion)}"
        message = self._message(completion, name)
        chat = prompt if is_chat(prompt) else None
        if chat is None and (prompt is not None or isinstance(completion, str) or not self.template.there):
            ids = self.tokens(content_of(message))
            if ids[-1:] != [self.end]:
                ids.append(self.end)
        else:
            chat = [{"role": "user", "content": "."}] if chat is None else chat
            ids = self._answer(chat, message, name)
        if max(ids) >= self.vocabulary:
            raise InputError(
                f"A completion must hold tokens of the model, from 0 to {self.vocabulary - 1}, got {max(ids)} in "
                f"{shortened(completion)}; is it the right tokenizer?"
            )
        return ids

    def _message(self, completion: Any, name: str) -> dict[str, Any]:
        """A completion as the assistant's message."""
        if isinstance(completion, str):
            return {"role": "assistant", "content": completion}
        if not is_chat(completion):
            raise InputError(f"A completion must be a text or a list of messages, got {shortened(completion)}.")
        if len(completion) > 1 or completion[0]["role"] != "assistant":
            roles = ", ".join(str(message["role"]) for message in completion)
            raise InputError(f"A completion must be one message of the assistant's, got messages of {roles}.")
        if fault := message_fault(completion[0]):
            raise InputError(f"A message must have a role and a text, got one {fault} in {name}.")
        return dict(completion[0])

    def _answer(self, chat: Sequence[Any], message: dict[str, Any], name: str) -> list[int]:
        """The tokens of an assistant's message after a chat, as its template writes and closes it."""
        before, words, closing = self._template_for(chat).completion(chat, message, name)
        kept, rest = self._closing(closing)
        if not kept:
            ids = self.tokens(words, before)
            return ids if ids[-1:] == [self.end] else [*ids, self.end]
        ids = self.tokens(words + closing, before)
        if ids[len(ids) - len(kept) - len(rest) :] == kept + rest:
            ids = ids[: len(ids) - len(rest)]
        else:  # the closing merged with the words
            ids = [*self.tokens(words, before), *kept]
        while len(ids) > 1 and ids[-2:] == [kept[-1]] * 2:  # the message brought it itself
            ids.pop()
        return ids

    def _closing(self, text: str) -> tuple[list[int], list[int]]:
        """The tokens of what the template writes after a message, up to the one that closes it, and those after that.

        It is the first that ends samples, or else the only special one, of those that stand there whether or not the
        chat goes on; where there are none such, of all; where there is neither, nothing closes a message.
        """
        ids = self.tokens(text)
        pairs = zip(ids, self._goes_on, strict=False)
        both = [token for token, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)]
        for tokens in (both, ids):
            special = [token for token in tokens if token in self.words.special]
            ends = [token for token in tokens if token in self.ends]
            others = [token for token in tokens if token not in special]
            if not ends and len(special) == 1 and not str(self.tokenizer.decode(others)).strip():
                ends = special
            if ends:
                place = ids.index(ends[0]) + 1
                return ids[:place], ids[place:]
        return [], ids

    @functools.cached_property
    def _goes_on(self) -> list[int]:
        """The tokens after an assistant's message that a user answers; none where the template refuses that."""
        try:
            return self.tokens(self.template.follows([{"role": "user", "content": "."}], "an answer"))
        except TemplateLoops:
            raise
        except InputError:
            return []

    def with_closing(self) -> PromptEncoder:
        """An encoder whose ends have the token by which the chat template closes the assistant's messages, too."""
        try:
            kept, _ = self._closing(self.template.closing("a chat")) if self.template.there else ([], [])
        except TemplateLoops:
            raise
        except InputError:  # it refuses this plain chat, and may take others
            return self
        if not kept or kept[-1] >= self.vocabulary:
            return self
        return replace(self, ends=tuple(sorted({*self.ends, kept[-1]})))

    # texts

    @functools.cached_property
    def words(self) -> Vocabulary:
        """The tokens of the tokenizer."""
        return Vocabulary(self.tokenizer, self.vocabulary, self.ends)

    def text(self, ids: Sequence[int]) -> str:
        """The text of tokens that the model drew."""
        return self.words.text(ids, self.keeps)

    @property
    def keeps(self) -> bool:
        """True if texts show special tokens."""
        return bool(self.keep_special_tokens)

    def tokens(self, text: str, before: str = "") -> list[int]:
        """The ids of a text that follows another one, without any token that begins or ends texts."""
        if not before:
            return self.words.tokens(text)
        first, both = self.words.tokens(before), self.words.tokens(before + text)
        return both[len(first) :] if both[: len(first)] == first else self.words.tokens(text)

    def describe(self) -> dict[str, Any]:
        """All that changes a prompt's tokens or a sample's text, as values for JSON."""
        return {**self.template.described(), "keep_special_tokens": self.keeps}


def shortened(value: Any) -> str:
    """A prompt or completion in a message, in at most 60 characters."""
    shown = repr(list(value) if isinstance(value, list) else value)
    return shown if len(shown) <= 60 else shown[:57] + "..."


def left_padded(rows: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Token ids (N, P) with `pad` on the left, and a mask (N, P) that is True at the real ones."""
    width = max((len(row) for row in rows), default=0)
    ids = torch.full((len(rows), width), pad, dtype=torch.long)
    for row, tokens in enumerate(rows):
        ids[row, width - len(tokens) :] = torch.tensor(tokens, dtype=torch.long)
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.long)
    return ids, torch.arange(width) >= width - lengths[:, None]


@dataclass(frozen=True)
class Packed:
    """The input of one forward pass: prompts and actions side by side without gaps, padded on the right.

    `ids`, `mask` (N, L). Each trained step is listed once: its row and step (M,), the column (M,) whose hidden
    state predicts it, and its action (M,).
    """

    ids: Tensor
    mask: Tensor
    row: Tensor
    step: Tensor
    column: Tensor
    action: Tensor


def pack(prompt_ids: Tensor, prompt_mask: Tensor, action: Tensor, mask: Tensor, pad: int) -> Packed:
    """Prompts (N, P), padded on either side, and actions (N, T) of which the steps in `mask` (N, T) are scored.

    No column is padding only, and no token is read that no scored step depends on: a row's last action is
    predicted, never read.
    """
    steps = torch.arange(mask.shape[1], device=mask.device)
    last = (mask * steps).amax(1, keepdim=True) if mask.shape[1] else torch.zeros(len(mask), 1, device=mask.device)
    keep = torch.cat([prompt_mask, steps < last], 1)
    lengths = keep.sum(1)
    width = int(lengths.max()) if len(lengths) else 0
    inside = torch.arange(width, device=mask.device) < lengths[:, None]
    ids = torch.full(inside.shape, pad, dtype=torch.long, device=mask.device)
    ids[inside] = torch.cat([prompt_ids, action], 1)[keep]
    row, step = mask.nonzero(as_tuple=True)
    return Packed(ids, inside, row, step, prompt_mask.sum(1)[row] - 1 + step, action[row, step])
