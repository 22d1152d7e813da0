"""Batches written down number by number, for tests that hold a part against its plain definition."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from stepwell.batch import Batch
from stepwell.columns import Columns
from stepwell.process.base import Scores
from stepwell.trajectories import count, make


def build(
    present: Tensor,
    *,
    behaviour: Tensor | None = None,
    mask: Tensor | None = None,
    info: dict[str, Tensor] | None = None,
    extra: dict[str, Tensor] | None = None,
    states: dict[str, float] | None = None,
    **fields: Any,
) -> Batch:
    """A batch whose present log-probabilities are `present` (N, T); the sampler's are the same unless given."""
    mask = torch.ones(present.shape, dtype=torch.bool) if mask is None else mask
    drawn = present.detach() if behaviour is None else behaviour
    if info is not None:
        fields["info"] = Columns(info, len(present))
    rows = make(torch.zeros(present.shape, dtype=torch.long), drawn, mask, **fields)
    return Batch(rows, count(rows), Scores(present, extra or {}), states or {})


@pytest.fixture(scope="session")
def batch_of() -> Callable[..., Batch]:
    return build
