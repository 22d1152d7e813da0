"""The one door of randomness: its draws have the probabilities they state, and its twin walks through exactly those."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stepwell.check import expectation, law
from stepwell.errors import InputError, Unenumerable
from stepwell.rng import Replay, Rng

PROBABILITIES = torch.tensor([[0.5, 0.2, 0.3], [0.1, 0.0, 0.9]])


def chi_square_limit(freedom: int) -> float:
    """Mean plus four standard deviations of a chi-square variable."""
    return freedom + 4 * math.sqrt(2 * freedom)


def chi_square(counts: Counter, expected: dict, total: int) -> float:
    assert set(counts) <= set(expected)
    return sum((counts[key] - total * p) ** 2 / (total * p) for key, p in expected.items())


def draws(program, total):
    rng = Rng(1)
    return Counter(program(rng) for _ in range(total))


def test_the_same_seed_gives_the_same_stream_and_another_seed_another():
    def stream(seed):
        rng = Rng(seed)
        parts = rng.normal(3), rng.uniform(3), rng.gumbel(2), rng.permutation(5), rng.categorical(PROBABILITIES)
        return torch.cat([part.double() for part in parts])

    assert torch.equal(stream(7), stream(7))
    assert not torch.equal(stream(7), stream(8))


def test_a_split_stream_does_not_depend_on_how_much_the_parent_was_used():
    fresh, used = Rng(3), Rng(3)
    used.normal(100)
    assert torch.equal(fresh.split("prompt", 4).uniform(5), used.split("prompt", 4).uniform(5))


def test_split_streams_differ_by_every_part_of_their_name():
    rng = Rng(3)
    streams = [rng, rng.split(), rng.split("a"), rng.split("b"), rng.split("a", 1), rng.split("a").split(1)]
    assert len({stream.seed for stream in [*streams, Rng(4).split("a")]}) == 7


def test_splitting_leaves_the_parent_where_it_was():
    rng, twin = Rng(5), Rng(5)
    rng.split("a").normal(3)
    assert torch.equal(rng.normal(3), twin.normal(3))


def test_a_stream_resumes_bit_for_bit_from_its_state():
    rng = Rng(11)
    rng.normal(7)
    state = rng.state_dict()
    onwards = rng.normal(5), rng.split("x").uniform(2)
    resumed = Rng(0)
    resumed.load_state_dict(state)
    assert torch.equal(resumed.normal(5), onwards[0])
    assert torch.equal(resumed.split("x").uniform(2), onwards[1])


def test_categorical_has_the_probabilities_that_replay_enumerates():
    program = lambda rng: tuple(rng.categorical(PROBABILITIES).tolist())  # noqa: E731
    exact = law(program)
    one, two = PROBABILITIES.double().tolist()
    assert exact == pytest.approx({(a, b): one[a] * two[b] for a in range(3) for b in (0, 2)})
    assert chi_square(draws(program, 4000), exact, 4000) < chi_square_limit(len(exact) - 1)


def test_categorical_normalises_its_weights():
    assert law(lambda rng: rng.categorical(torch.tensor([[2.0, 6.0]]))) == {(0,): 0.25, (1,): 0.75}


def test_gumbel_top_k_draws_as_sequential_draws_without_replacement():
    log_weights = torch.tensor([[0.5, 0.2, 0.05, 0.25]]).log()
    program = lambda rng: tuple(rng.without_replacement(log_weights, 2)[0].tolist())  # noqa: E731
    exact = law(program)
    p = log_weights[0].double().exp().tolist()
    sequential = {(a, b): p[a] * p[b] / (1 - p[a]) for a in range(4) for b in range(4) if a != b}
    assert exact == pytest.approx(sequential, abs=1e-7)  # the weights are float32
    assert chi_square(draws(program, 4000), exact, 4000) < chi_square_limit(len(exact) - 1)


def test_the_chi_square_test_notices_draws_in_another_order():
    log_weights = torch.tensor([[0.5, 0.2, 0.05, 0.25]]).log()
    backwards = draws(lambda rng: tuple(rng.without_replacement(log_weights, 2)[0].flip(0).tolist()), 4000)
    exact = law(lambda rng: rng.without_replacement(log_weights, 2)[0])
    assert chi_square(backwards, exact, 4000) > chi_square_limit(len(exact) - 1)


@pytest.mark.parametrize("rng", [Rng(0), Replay()])
def test_more_draws_without_replacement_than_there_are_indices_are_refused(rng):
    with pytest.raises(InputError, match="at most 2, the indices of positive weight"):
        rng.without_replacement(torch.tensor([[0.0, 0.0, -math.inf]]), 3)


def test_the_rest_keeps_its_probabilities_when_the_likeliest_is_gone():
    weights = torch.tensor([[0.0, -800.0, -800.0 + math.log(3)]], dtype=torch.float64)
    found = law(lambda rng: rng.without_replacement(weights, 3)[0])
    assert found == pytest.approx({(0, 1, 2): 0.25, (0, 2, 1): 0.75}, abs=1e-12)


def test_a_permutation_is_uniform():
    exact = law(lambda rng: rng.permutation(3))
    assert list(exact.values()) == pytest.approx([1 / 6] * 6, abs=1e-15)
    counts = draws(lambda rng: tuple(rng.permutation(3).tolist()), 2000)
    assert chi_square(counts, exact, 2000) < chi_square_limit(5)


def test_bernoulli_keeps_shape_and_probability():
    exact = expectation(lambda rng: rng.bernoulli(torch.tensor([[0.25, 1.0], [0.0, 0.5]])))
    assert exact.tolist() == [[0.25, 1.0], [0.0, 0.5]]
    assert Rng(0).bernoulli(torch.full((3, 2), 0.5)).shape == (3, 2)


def test_gauss_hermite_nodes_are_exact_below_twice_their_number_and_not_beyond():
    moments = [1, 0, 1, 0, 3, 0, 15, 0, 105]
    for degree in range(8):
        found = expectation(lambda rng, d=degree: rng.normal() ** d, normal_nodes=4)
        assert float(found) == pytest.approx(moments[degree], abs=1e-12)
    assert float(expectation(lambda rng: rng.normal() ** 8, normal_nodes=4)) == pytest.approx(105 - 24)  # 4! less


def test_gauss_hermite_nodes_of_several_normals_are_independent():
    found = expectation(lambda rng: (lambda x: x[0] ** 2 * x[1] ** 4 + x[0] * x[1])(rng.normal(2)), normal_nodes=3)
    assert float(found) == pytest.approx(3.0)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.floats(0.05, 0.95), min_size=1, max_size=4),
    st.floats(-3, 3).filter(lambda scale: abs(scale) > 0.1),
    st.floats(-1, 1),
)
def test_uniforms_fall_below_thresholds_with_the_right_probability_under_any_affine_map(points, scale, shift):
    thresholds = scale * torch.tensor(points, dtype=torch.float64) + shift
    found = expectation(lambda rng: scale * rng.uniform() + shift < thresholds)
    wanted = torch.tensor([p if scale > 0 else 1 - p for p in points], dtype=torch.float64)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


def test_later_comparisons_of_a_uniform_agree_with_earlier_ones_in_any_view():
    def program(rng):
        u = rng.uniform(2)
        below_half, above = u < 0.5, 1 - u[0] > 0.3  # u0 < 0.7, after u0 < 0.5 was decided
        return bool(below_half[0]), bool(above), bool(torch.tensor(0.5) > u[1]) == bool(below_half[1])

    assert law(program) == pytest.approx({(True, True, True): 0.5, (False, True, True): 0.2, (False, False, True): 0.3})


def test_a_uniform_times_zero_is_compared_as_a_constant():
    def program(rng):
        u = 0.0 * rng.uniform()
        return bool(u <= 0.0), bool(u < 0.0), bool(u >= 0.0), bool(u > 0.0)

    assert law(program) == {(True, False, True, False): 1.0}


USES = {
    "value": lambda u: u.item(),
    "list": lambda u: u.tolist(),
    "log": lambda u: u.log(),
    "torch.log": lambda u: torch.log(u),
    "square": lambda u: u**2,
    "remainder": lambda u: u % 1,
    "floor": lambda u: u // 1,
    "inverse": lambda u: 1 / u,
    "product": lambda u: u * u,
    "comparison": lambda u: u[0] < u[1],
    "sum": lambda u: u.sum(),
    "equality": lambda u: u == 0.5,
    "inequality": lambda u: u != 0.5,
    "float": lambda u: float(u[0]),
    "integer": lambda u: int(u[0]),
    "truth": lambda u: bool(u[0]),
    "index": lambda u: [1, 2][u[0]],
    "numpy": lambda u: __import__("numpy").asarray(u),
    "searchsorted": lambda u: torch.searchsorted(torch.tensor([0.5]), u),
    "stack": lambda u: torch.stack([u, u]),
    "where": lambda u: torch.where(torch.tensor([True, False]), u, u),
    "negation": lambda u: -u,
}


@pytest.mark.parametrize("use", USES)
def test_any_other_use_of_a_uniform_is_refused(use):
    with pytest.raises(Unenumerable):
        USES[use](Replay().uniform(2))


def test_noise_without_a_finite_list_of_outcomes_is_refused():
    for program in (lambda rng: rng.normal(2), lambda rng: rng.gumbel(2), lambda rng: rng.state_dict()):
        with pytest.raises(Unenumerable):
            program(Replay())


def test_a_choice_between_impossible_outcomes_is_refused():
    for row in ([0.0, 0.0], [math.nan, 1.0], [-0.5, 1.5]):
        with pytest.raises(Unenumerable):
            Replay().choose(row)


def test_streams_split_off_a_replay_are_independent():
    coin = torch.tensor([0.5])
    exact = law(lambda rng: (rng.split("a").bernoulli(coin), rng.split("b").bernoulli(coin)))
    assert sorted(exact.values()) == [0.25] * 4


def test_splitting_one_name_twice_is_refused_because_a_real_stream_would_repeat_itself():
    with pytest.raises(Unenumerable, match="repeats"):
        law(lambda rng: (rng.split("a", 1), rng.split("a", 1)))
    law(lambda rng: (rng.split("a").split(1), rng.split("a", 1), rng.split("b").split(1)))


@pytest.mark.parametrize("symbols", [1, 3, 255, 256, 257, 1000])
@pytest.mark.parametrize("kind", [torch.float64, torch.float32])
def test_a_symbol_is_drawn_through_the_inverse_of_the_distribution_function(symbols, kind):
    weights = Rng(2).uniform(500, symbols, dtype=kind) * (Rng(3).uniform(500, symbols) < 0.7)
    weights[:, -1] += 0.1
    found, uniform = Rng(4).categorical(weights), Rng(4).uniform(500, 1, dtype=torch.float64)
    below = weights.double().cumsum(1)
    high, low = (x.gather(1, found[:, None]) for x in (below, torch.nn.functional.pad(below, (1, 0))))
    point, slack = uniform * below[:, -1:], symbols * torch.finfo(kind).eps * below[:, -1:]
    assert bool(((low - slack <= point) & (point <= high + slack)).all())
    assert bool((weights.gather(1, found[:, None]) > 0).all())


class Last(Rng):
    """Uniforms as close to 1 as there are."""

    def uniform(self, *shape, dtype=None):
        return torch.full(shape, 1 - 2**-53, dtype=dtype)


@pytest.mark.parametrize("symbols", [3, 300])
def test_the_largest_uniform_draws_the_last_symbol_that_there_is(symbols):
    weights = torch.rand(64, symbols, generator=torch.Generator().manual_seed(0)).double()
    weights[:, -2:] = 0.0
    assert Last(0).categorical(weights).tolist() == [symbols - 3] * 64


@pytest.mark.parametrize("row", [[0.0, 0.0], [math.nan, 1.0], [-1.0, 2.0], [math.inf, 1.0]])
def test_rows_that_are_no_probabilities_are_refused(row):
    with pytest.raises(InputError, match="must be numbers of at least 0"):
        Rng(0).categorical(torch.tensor([[0.5, 0.5], row]))


def test_no_row_draws_nothing():
    assert Rng(0).categorical(torch.zeros(0, 3)).shape == (0,)
