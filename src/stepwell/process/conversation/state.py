"""Conversations under way as a state: partial texts, each with the turns that it consists of and its environment."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stepwell.process.conversation.episode import Episode
from stepwell.process.language.state import LanguageState


@dataclass(frozen=True)
class ConversationState:
    """N conversations of t steps. `text.ended` (N,): the environment, the last turn or a lack of room ended it."""

    text: LanguageState
    episodes: tuple[Episode, ...]

    @property
    def done(self) -> Tensor:
        return self.text.done

    @property
    def given(self) -> Tensor:
        """(N,) the environment's token that a row reads next; -1 for rows that the model draws, or that are done."""
        step = self.text.tokens.shape[1]
        return torch.tensor([episode.given_at(step) for episode in self.episodes], device=self.text.tokens.device)

    def __len__(self) -> int:
        return len(self.text)

    def __getitem__(self, index: Tensor) -> ConversationState:
        rows = torch.arange(len(self))[index.cpu()].tolist()
        return ConversationState(self.text[index], tuple(self.episodes[row] for row in rows))
