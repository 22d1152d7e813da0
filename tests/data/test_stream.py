"""The stream of prompts: epochs are permutations, takes have their exact distribution, resuming changes nothing."""

import itertools
import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stepwell.data.stream import PromptStream
from stepwell.errors import CheckpointError, InputError
from stepwell.rng import Replay, Rng
from stepwell.sampling.request import Prompt

counts = st.lists(st.integers(1, 9), min_size=1, max_size=8)


def prompts(count):
    return [Prompt(i, f"p{i}") for i in range(count)]


def ids(taken):
    return [prompt.id for prompt in taken]


def distribution(program):
    """Every outcome of the program with its exact probability."""
    outcomes, script = Counter(), []
    while script is not None:
        replay = Replay(script)
        outcome = program(replay)
        outcomes[outcome] += replay.probability
        script = replay.next_script()
    return outcomes


def assert_same(found, expected):
    assert set(found) == set(expected)
    assert all(abs(found[key] - expected[key]) < 1e-12 for key in expected)


@given(st.integers(1, 7), counts, st.booleans(), st.integers(0, 99))
@settings(deadline=None)
def test_every_epoch_is_a_permutation_and_no_prompt_comes_twice_in_a_take(size, takes, shuffle, seed):
    stream = PromptStream(prompts(size), Rng(seed), shuffle)
    taken = [ids(stream.take(count)) for count in takes]
    assert [len(take) for take in taken] == takes
    flat = list(itertools.chain(*taken))
    for start in range(0, len(flat), size):
        epoch = flat[start : start + size]
        assert len(set(epoch)) == len(epoch)
        assert shuffle or epoch == list(range(len(epoch)))
    assert all(len(set(take)) == len(take) for take in taken if len(take) <= size)


@given(st.integers(1, 7), counts, counts, st.booleans(), st.integers(0, 99))
@settings(deadline=None)
def test_a_resumed_stream_equals_an_uninterrupted_one(size, before, after, shuffle, seed):
    weights = torch.rand(size, generator=torch.Generator().manual_seed(seed)) + 0.01

    def go_on(stream):
        return [(ids(stream.take(count)), ids(stream.take(count, weights))) for count in after]

    stream = PromptStream(prompts(size), Rng(seed), shuffle)
    for count in before:
        stream.take(count)
    state = stream.state_dict()
    uninterrupted = go_on(stream)
    resumed = PromptStream(prompts(size), Rng(seed + 1), shuffle)
    resumed.load_state_dict(state)
    assert go_on(resumed) == uninterrupted


def by_listing(size, takes):
    """Two epochs, each uniform over the orders that repeat no prompt within a take; by listing them all."""
    ends = list(itertools.accumulate(takes))
    split = lambda flat: tuple(flat[end - take : end] for end, take in zip(ends, takes, strict=True))  # noqa: E731
    orders = list(itertools.permutations(range(size)))
    outcomes = Counter()
    for first in orders:
        seconds = [second for second in orders if all(len(set(take)) == len(take) for take in split(first + second))]
        for second in seconds:
            outcomes[split(first + second)] += 1 / len(orders) / len(seconds)
    return outcomes


@pytest.mark.parametrize("takes", [(3, 3), (2, 2, 2), (1, 3, 2)])
def test_shuffled_takes_are_uniform_over_the_orders_without_repeats(takes):
    def program(rng, stream=PromptStream):
        stream = stream(prompts(3), rng)
        return tuple(tuple(ids(stream.take(count))) for count in takes)

    assert_same(distribution(program), by_listing(3, takes))


def test_planted_repeats_that_are_passed_over_have_another_distribution():
    class PassesOver(PromptStream):
        def _new_epoch(self, apart, first):
            order = self._shuffled(torch.arange(len(self))).tolist()
            head = [i for i in order if i not in apart][:first]
            return torch.tensor(head + [i for i in order if i not in head])

    def program(rng):
        stream = PassesOver(prompts(3), rng)
        return tuple(tuple(ids(stream.take(count))) for count in (2, 2, 2))

    with pytest.raises(AssertionError):
        assert_same(distribution(program), by_listing(3, (2, 2, 2)))


def test_weighted_takes_are_sequential_draws_without_replacement():
    weights = [0.0, 1.0, 2.0, 5.0]
    found = distribution(lambda rng: tuple(ids(PromptStream(prompts(4), rng).take(2, torch.tensor(weights)))))
    expected = {(i, j): weights[i] / 8 * weights[j] / (8 - weights[i]) for i, j in itertools.permutations((1, 2, 3), 2)}
    assert_same(found, expected)


def test_weighted_takes_beyond_the_positive_weights_are_independent_draws():
    weights = [0.0, 1.0, 3.0]
    found = distribution(lambda rng: tuple(ids(PromptStream(prompts(3), rng).take(3, torch.tensor(weights)))))
    drawn = itertools.product((1, 2), repeat=3)
    assert_same(found, {key: math.prod(weights[i] / 4 for i in key) for key in drawn})


def test_a_real_stream_never_takes_a_prompt_of_weight_zero():
    stream = PromptStream(prompts(4), Rng(0))
    weights = torch.tensor([0.0, 1e-30, 1.0, 0.0])
    assert all(sorted(ids(stream.take(2, weights))) == [1, 2] for _ in range(50))


def test_a_weighted_take_leaves_the_epoch_where_it_is():
    stream = PromptStream(prompts(5), Rng(0))
    first = ids(stream.take(2))
    stream.take(3, torch.ones(5))
    assert sorted(first + ids(stream.take(3))) == list(range(5))


def test_the_length_is_that_of_an_epoch():
    assert len(PromptStream(prompts(5), Rng(0))) == 5


def test_prompts_are_found_by_their_ids_in_whatever_order_they_come():
    given = [Prompt(7, "a"), Prompt(2, "b"), Prompt(0, "c")]
    stream = PromptStream(given, Rng(0))
    assert {number: prompt.value for number, prompt in stream.by_id.items()} == {7: "a", 2: "b", 0: "c"}


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ([1.0], r"must be one for each of the 2 prompts, got a tensor of shape \(1,\)"),
        ([0.0, 0.0], "not all zero"),
        ([1.0, -1.0], "non-negative"),
        ([1.0, float("nan")], "finite"),
    ],
)
def test_weights_that_are_none_are_refused(weights, said):
    with pytest.raises(InputError, match=said):
        PromptStream(prompts(2), Rng(0)).take(1, torch.tensor(weights))


def test_empty_streams_and_takes_are_refused():
    with pytest.raises(InputError, match="at least one prompt"):
        PromptStream([], Rng(0))
    with pytest.raises(InputError, match="to take must be at least 1, got 0"):
        PromptStream(prompts(2), Rng(0)).take(0)


def test_the_state_of_other_data_is_refused():
    state = PromptStream(prompts(3), Rng(0)).state_dict()
    with pytest.raises(CheckpointError, match="has 3 prompts with shuffle=True, this one has 2"):
        PromptStream(prompts(2), Rng(0)).load_state_dict(state)
