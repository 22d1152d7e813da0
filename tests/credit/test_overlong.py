"""DAPO's penalty on long samples, against its three cases written out."""

import pytest
import torch

from stepwell.credit.overlong import overlong_penalty
from stepwell.errors import InputError


def published(length, maximum, buffer):
    """Equation 13 of arXiv 2503.14476, case by case."""
    if length <= maximum - buffer:
        return 0.0
    if length <= maximum:
        return ((maximum - buffer) - length) / buffer
    return -1.0


@pytest.mark.parametrize(("maximum", "buffer"), [(20, 4), (20, 20), (7, 1)])
def test_the_penalty_is_equation_13(maximum, buffer):
    length = torch.arange(maximum + 5)
    expected = [published(int(value), maximum, buffer) for value in length]
    assert overlong_penalty(length, maximum, buffer).tolist() == expected


@pytest.mark.parametrize("buffer", [0, -1, 21])
def test_a_buffer_that_does_not_fit_is_refused(buffer):
    with pytest.raises(InputError, match=f"at most maximum = 20, got {buffer}"):
        overlong_penalty(torch.tensor([3]), 20, buffer)
