"""The law of a batch in which some rows read and some speak: what an environment said is no choice of the model's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stepwell.distributions import Categorical
from stepwell.rng import Rng


@dataclass(frozen=True)
class Partly:
    """`law` of those rows in `drawn` (N,) bool, in their order; elsewhere the certain token `given` (N,), untrained."""

    law: Categorical
    drawn: Tensor
    given: Tensor

    def __len__(self) -> int:
        return len(self.given)

    def __getitem__(self, index: Any) -> Partly:
        place = (self.drawn.cumsum(0) - 1)[index]
        drawn = self.drawn[index]
        return Partly(self.law[place[drawn]], drawn, self.given[index])

    @property
    def random(self) -> Tensor:
        return self.drawn

    @property
    def logits(self) -> Tensor:
        """(N, V) log-probabilities; those of a given token are 0 there and minus infinity elsewhere."""
        certain = torch.full((len(self), self.law.logits.shape[1]), -torch.inf, dtype=self.law.logits.dtype)
        answer = certain.to(self.given.device).scatter(1, self.given.clamp(min=0)[:, None], 0.0)
        answer[self.drawn] = self.law.logits
        return answer

    def sample(self, rng: Rng) -> Tensor:
        return self.given.masked_scatter(self.drawn, self.law.sample(rng))

    def log_prob(self, action: Tensor) -> Tensor:
        return self._spread(self.law.log_prob(action[self.drawn]))

    def entropy(self) -> Tensor:
        return self._spread(self.law.entropy())

    def kl(self, other: Partly) -> Tensor:
        return self._spread(self.law.kl(other.law))

    def _spread(self, values: Tensor) -> Tensor:
        """(N,) the values where rows draw, and 0 elsewhere."""
        return values.new_zeros(len(self)).masked_scatter(self.drawn, values)
