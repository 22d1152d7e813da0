"""Updates in which no rank has a gradient: a rollout without a trained step goes by, on several ranks too."""

from __future__ import annotations

from typing import Any

import torch

from stepwell.training.distribute import World


class Alike(World):
    """Two ranks that hold the same."""

    def gather(self, value: Any) -> list[Any]:
        return [value] * self.size


def test_ranks_without_any_gradient_have_none_to_add_up():
    parameter = torch.nn.Parameter(torch.zeros(3))
    Alike(0, 2).sum_gradients([parameter])
    assert parameter.grad is None
