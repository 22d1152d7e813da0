"""Prompts to tokens: plain texts and chat messages, checked on the way in; rows packed for a forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stepwell.errors import InputError
from stepwell.process.language.chat import is_chat, refuse_half_characters


@dataclass(frozen=True)
class PromptEncoder:
    """Turns prompts into token ids for one tokenizer and model.

    `limit` is the longest prompt that the model has positions for (None: no limit), `vocabulary` its number of
    tokens, `system` a message put before every chat that has none of its own.
    """

    tokenizer: Any
    limit: int | None
    vocabulary: int
    system: str | None = None

    def __call__(self, prompt: Any) -> list[int]:
        """The token ids of a text, or of a list of chat messages with the assistant's turn opened.

        Raises `InputError` for anything else, and for a prompt that is empty, too long, or holds a token beyond the
        model's vocabulary.
        """
        shown = repr(prompt) if len(repr(prompt)) <= 60 else repr(prompt)[:57] + "..."
        if isinstance(prompt, str):
            if self.system is not None:
                raise InputError(f"The prompt {shown} is a plain text; the `system` option needs chat messages.")
            refuse_half_characters(prompt, f"The prompt {shown}")
            ids = list(self.tokenizer(prompt, verbose=False)["input_ids"])
        elif is_chat(prompt):
            ids = self._chat(prompt, shown)
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

    def _chat(self, messages: Sequence[Any], shown: str) -> list[int]:
        if not getattr(self.tokenizer, "chat_template", None):
            raise InputError(f"The prompt {shown} is a chat, but the tokenizer has no chat template; give a text.")
        if self.system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system}, *messages]
        try:
            encoded = self.tokenizer.apply_chat_template(
                list(messages), add_generation_prompt=True, tokenize=True, return_dict=True
            )
        except Exception as error:  # templates raise whatever they like: most often that roles must alternate
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
            raise InputError(f"The tokenizer's chat template refuses the prompt {shown}: {reason}.") from error
        return list(encoded["input_ids"])


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
