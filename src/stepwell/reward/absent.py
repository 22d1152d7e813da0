"""No reward at all, for methods that learn from something else: a teacher, demonstrations, the policy itself."""

from __future__ import annotations

import torch

from stepwell.meter import Meter
from stepwell.reward.mixing import Rewards, Scored
from stepwell.sampling.record import Drawn


class NoRewards(Rewards):
    """Rewards of no function: every row's is missing, and no part of a method may read it (`Recipe.rewarded`)."""

    def __init__(self) -> None:
        self.functions, self.names, self.weights, self.timeout = (), (), (), None

    def __call__(self, drawn: Drawn, meter: Meter) -> Scored:
        nothing = torch.zeros(len(drawn), 0, dtype=torch.float64)
        return Scored(nothing.sum(1), nothing, ())
