"""Partial texts as a state that forks without copying: rows point at what the network has read of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Self

from torch import Tensor


@dataclass(frozen=True)
class ReadText:
    """R distinct texts of `columns` tokens, left-padded, as the network has read them.

    `cache` holds their keys and values, or recurrent states, without the first `cut` columns, which are padding in all
    of these texts; `log_probs` (R, V) are those of the token after each, truncation applied.
    """

    cache: Any
    columns: int
    log_probs: Tensor
    cut: int = 0


@dataclass
class Memory:
    """The network's readings of a state's rows. The one part of a state that changes: reading brings it up to date.

    All rows have `columns` tokens, of which more may have been read of some rows than of others: a row whose next
    tokens are given (an environment's words) waits until they can be read at once. Rows that the network cannot read
    together have readings of their own.
    """

    read: tuple[ReadText, ...]  # the last is one of the newest
    batch: Tensor  # (N,) which of `read` each row goes on from; -1 for rows that were done
    slot: Tensor  # (N,) which of its texts; -1 for rows that were done
    columns: int  # of the prompts and of all tokens since


@dataclass(frozen=True)
class LanguageState:
    """N partial texts of t steps. `state[index]` forks rows; their cache is copied when they are next read, once.

    `prompt` (N, P) is left-padded; `tokens` (N, t), of which the first `length` (N,) are the row's; `padding` (N,)
    columns before its prompt; `limit` (N,) most tokens it may have; `ended` (N,) it drew an end token; `done` (N,);
    `chat` (N,) its prompt was a chat.
    """

    prompt: Tensor
    tokens: Tensor
    length: Tensor
    padding: Tensor
    limit: Tensor
    ended: Tensor
    chat: Tensor
    memory: Memory

    @property
    def done(self) -> Tensor:
        return self.ended | (self.length >= self.limit)

    def __len__(self) -> int:
        return len(self.length)

    def __getitem__(self, index: Tensor) -> Self:
        index = index.to(self.length.device)
        return replace(
            self,
            prompt=self.prompt[index],
            tokens=self.tokens[index],
            length=self.length[index],
            padding=self.padding[index],
            limit=self.limit[index],
            ended=self.ended[index],
            chat=self.chat[index],
            memory=replace(self.memory, batch=self.memory.batch[index], slot=self.memory.slot[index]),
        )
