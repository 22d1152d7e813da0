"""The distribution of a batch in which some rows speak and others read what their environment said."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stepwell.distributions import Categorical
from stepwell.rng import Rng


@dataclass(frozen=True)
class Partly:
    """The distribution (M) of the rows in `drawn` (N,) bool, and for the others the certain token `given` (N,).

    A given token is no choice of the model's: it is not random, and nothing trains on it.
    """

    distribution: Categorical
    drawn: Tensor
    given: Tensor

    def __len__(self) -> int:
        return len(self.given)

    def __getitem__(self, index: Any) -> Partly:
        place = (self.drawn.cumsum(0) - 1)[index]
        drawn = self.drawn[index]
        return Partly(self.distribution[place[drawn]], drawn, self.given[index])

    @property
    def random(self) -> Tensor:
        return self.drawn

    @property
    def logits(self) -> Tensor:
        """(N, V) log-probabilities; those of a given token are 0 there and minus infinity elsewhere."""
        drawn = self.distribution.logits
        impossible = torch.full((len(self), drawn.shape[1]), -torch.inf, dtype=drawn.dtype).to(self.given.device)
        logits = impossible.scatter(1, self.given.clamp(min=0)[:, None], 0.0)
        logits[self.drawn] = drawn
        return logits

    def sample(self, rng: Rng) -> Tensor:
        return self.given.masked_scatter(self.drawn, self.distribution.sample(rng))

    def log_prob(self, action: Tensor) -> Tensor:
        return self._spread(self.distribution.log_prob(action[self.drawn]))

    def entropy(self) -> Tensor:
        return self._spread(self.distribution.entropy())

    def kl(self, other: Partly) -> Tensor:
        return self._spread(self.distribution.kl(other.distribution))

    def _spread(self, values: Tensor) -> Tensor:
        """(N,) the values where rows draw, and 0 elsewhere."""
        return values.new_zeros(len(self)).masked_scatter(self.drawn, values)
