"""Batches by tokens hold every row once and no more padded tokens than asked for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stepwell.errors import InputError
from stepwell.process.batching import token_batches


@given(st.lists(st.integers(0, 30), max_size=40), st.integers(1, 60))
def test_every_row_is_in_one_batch_that_fits(lengths: list[int], tokens: int) -> None:
    batches = token_batches(torch.tensor(lengths, dtype=torch.long), tokens)
    rows = [row for batch in batches for row in batch.tolist()]
    assert sorted(rows) == list(range(len(lengths)))
    for batch in batches:
        longest = max(lengths[row] for row in batch.tolist())
        assert len(batch) == 1 or longest * len(batch) <= tokens


def test_a_batch_needs_room() -> None:
    with pytest.raises(InputError, match="at least 1"):
        token_batches([1], 0)
