"""Partial texts as a state that forks without copying: rows point at what the network has read of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Self

from torch import Tensor


@dataclass(frozen=True)
class Past:
    """What the network has read: R different texts of `columns` tokens, left-padded, and the law after each (R, V)."""

    cache: Any
    columns: int
    law: Tensor


@dataclass
class Memory:
    """What is known of a state's laws. The one thing in a state that changes: `propose` brings it up to date.

    All rows have the same `columns`, of which the network has read some more and some less: a row whose next tokens
    are known needs no law, and waits until they can be read at once.
    """

    pasts: tuple[Past, ...]  # the last is that of the laws asked for last
    past: Tensor  # (N,) the past that each row goes on from; -1 for rows that were done
    slot: Tensor  # (N,) the text of that past; -1 for rows that were done
    columns: int  # of the prompts and of all tokens since


@dataclass(frozen=True)
class LanguageState:
    """N partial texts of t steps. `state[index]` forks rows; their cache is copied when they are next read, once.

    `tokens` (N, t), of which the first `length` (N,) are the row's; `padding` (N,) columns before its prompt;
    `limit` (N,) most tokens it may have; `ended` (N,) it drew an end token; `done` (N,); `chat` (N,) its prompt was
    a chat.
    """

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
            tokens=self.tokens[index],
            length=self.length[index],
            padding=self.padding[index],
            limit=self.limit[index],
            ended=self.ended[index],
            chat=self.chat[index],
            memory=replace(self.memory, past=self.memory.past[index], slot=self.memory.slot[index]),
        )
