"""Rows that others wrote are compared with the policy's own, and take no part in their statistics."""

from __future__ import annotations

import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stepwell.batch import Batch
from stepwell.credit.sources import AgainstOwn
from stepwell.trajectories import count, make


def batch(reward, prompt, source):
    shape = (len(reward), 2)
    rows = make(torch.zeros(shape).long(), torch.zeros(shape).double(), torch.ones(shape).bool())
    rows = rows.replace(
        reward=torch.tensor(reward, dtype=torch.float64), prompt=torch.tensor(prompt), source=torch.tensor(source)
    )
    return Batch(rows, count(rows))


@given(st.lists(st.floats(-5, 5).map(lambda x: round(x, 3)), min_size=7, max_size=7))
@settings(deadline=None)
def test_all_rows_are_centred_and_scaled_by_their_prompts_own(reward):
    prompt, source = [0, 0, 0, 0, 1, 1, 1], [0, 0, 1, 0, 0, 0, 3]
    found = AgainstOwn(epsilon=0.5)(batch(reward, prompt, source)).tolist()
    for i, value in enumerate(found):
        own = [reward[j] for j in range(7) if prompt[j] == prompt[i] and source[j] == 0]
        equal = len(set(own)) == 1
        scale = 1.0 if equal else statistics.stdev(own) + 0.5
        assert value == pytest.approx((reward[i] - statistics.fmean(own)) / scale, rel=1e-9, abs=1e-12)


def test_a_demonstrations_distance_is_not_scaled_where_all_fail():
    """All of the policy's own rows, that is."""
    assert AgainstOwn()(batch([0.1, 0.1, 0.1, 1.1], [0] * 4, [0, 0, 0, 1])).tolist() == pytest.approx([0, 0, 0, 1])
    assert AgainstOwn()(batch([0.1, 0.1, 0.1, 1.1], [0] * 4, [0, 0, 0, 1])).tolist()[:3] == [0, 0, 0]


def test_with_fewer_than_two_own_rows_there_is_nothing_to_compare():
    assert AgainstOwn()(batch([1.0, 0.0, 5.0, 2.0], [0, 0, 1, 2], [0, 1, 1, 0])).tolist() == [0.0] * 4
    assert AgainstOwn().compares
