"""Exact laws of programs: everything is seen once, with its probability, and what cannot be seen says so."""

import itertools
import math

import pytest
import torch

import stepwell.check as check
from stepwell.check import expectation, law, outcomes, unbiased
from stepwell.errors import InputError, LawBroken, Unenumerable
from stepwell.process.exact.table import markov
from stepwell.rng import Rng
from stepwell.sampling.request import Prompt, Request
from stepwell.sampling.rollout import rollout

COIN = torch.tensor([0.25])
WEIGHTS = torch.tensor([0.5, 0.15, 0.35], dtype=torch.float64)
PARTICLES = 4


def systematic(rng):
    """Offspring (K,) of each index: one uniform, PARTICLES evenly spaced points."""
    points = (rng.uniform() + torch.arange(PARTICLES)) / PARTICLES
    upper = WEIGHTS.cumsum(0)
    upper[-1] = 1.0
    below = (points[:, None] < upper).sum(0)
    return below.diff(prepend=torch.zeros(1, dtype=torch.long))


def stratified(rng):
    points = (rng.uniform(PARTICLES) + torch.arange(PARTICLES)) / PARTICLES
    upper = WEIGHTS.cumsum(0)
    upper[-1] = 1.0
    return (points[:, None] < upper).sum(0).diff(prepend=torch.zeros(1, dtype=torch.long))


def multinomial(rng):
    return rng.categorical(WEIGHTS.expand(PARTICLES, -1)).bincount(minlength=3)


def rounded(rng):
    """A planted mistake: fractions are rounded instead of resampled."""
    return (PARTICLES * WEIGHTS).round()


def half_open(rng):
    """A planted mistake: the first point starts half a stratum late, so its uniform covers half the range."""
    points = (rng.uniform() / 2 + torch.arange(PARTICLES) + 0.5) / PARTICLES
    upper = WEIGHTS.cumsum(0)
    upper[-1] = 1.0
    return (points[:, None] < upper).sum(0).diff(prepend=torch.zeros(1, dtype=torch.long))


@pytest.mark.parametrize("scheme", [systematic, stratified, multinomial])
def test_resampling_gives_every_particle_its_share_of_offspring(scheme):
    assert unbiased(scheme, PARTICLES * WEIGHTS, tolerance=1e-12) <= 1e-12


@pytest.mark.parametrize("scheme", [rounded, half_open])
def test_biased_resampling_is_caught(scheme):
    with pytest.raises(LawBroken, match="is right"):
        unbiased(scheme, PARTICLES * WEIGHTS)


def test_systematic_offspring_are_the_floor_or_the_ceiling_of_the_share():
    exact = law(systematic)
    shares = (PARTICLES * WEIGHTS).tolist()
    for offspring in exact:
        assert sum(offspring) == PARTICLES
        for count, share in zip(offspring, shares, strict=True):
            assert count in (math.floor(share), math.ceil(share))
    assert 2 <= len(exact) <= 4  # at most as many cuts as there are inner boundaries, plus one


def test_outcomes_are_each_seen_once_depth_first():
    tree = list(outcomes(lambda rng: tuple(rng.categorical(torch.ones(2, 3)).tolist())))
    assert [result for _, result in tree] == list(itertools.product(range(3), repeat=2))
    assert [probability for probability, _ in tree] == pytest.approx([1 / 9] * 9)


def test_a_program_may_choose_how_much_it_draws():
    def first_success(rng):
        return next((n for n in range(3) if rng.bernoulli(COIN)), 3)

    assert law(first_success) == pytest.approx({3: 0.75**3, 2: 0.25 * 0.75**2, 1: 0.25 * 0.75, 0: 0.25})


def test_a_program_without_choices_has_one_outcome():
    assert law(lambda rng: "always") == {"always": 1.0}


def test_outcomes_of_probability_zero_are_not_visited():
    assert law(lambda rng: int(rng.categorical(torch.tensor([[0.0, 1.0, 0.0]])))) == {1: 1.0}


def test_too_many_outcomes_are_refused_not_truncated():
    with pytest.raises(Unenumerable, match="more than 100 outcomes"):
        law(lambda rng: rng.bernoulli(torch.full((7,), 0.5)), limit=100)
    assert len(law(lambda rng: rng.bernoulli(torch.full((7,), 0.5)), limit=128)) == 128


def test_a_loop_without_end_is_refused():
    def forever(rng):
        count = 0
        while not rng.bernoulli(COIN):
            count += 1
        return count

    with pytest.raises(Unenumerable):
        law(forever, limit=50)


def test_a_program_with_a_memory_is_noticed():
    calls = []

    def restless(rng):
        """Its coin changes from run to run, so that its probabilities cannot add up."""
        calls.append(1)
        return bool(rng.bernoulli(torch.tensor([0.2 if len(calls) == 1 else 0.5])))

    with pytest.raises(LawBroken, match="add up to"):
        law(restless)


def test_a_program_whose_choices_vanish_is_noticed():
    calls = []

    def once(rng):
        calls.append(1)
        return bool(rng.bernoulli(COIN)) if len(calls) == 1 else False

    with pytest.raises(Unenumerable, match="fewer choices"):
        law(once)

    def narrowing(rng):
        calls.append(1)
        return int(rng.categorical(torch.ones(1, 3 if len(calls) < 5 else 1)))

    with pytest.raises(Unenumerable, match="other choices"):
        law(narrowing)


def test_results_that_mean_the_same_are_one_outcome():
    assert law(lambda rng: [rng.bernoulli(COIN) | True, {"a": torch.ones(2)}]) == {
        ((True,), frozenset({("a", (1.0, 1.0))})): 1.0
    }
    with pytest.raises(InputError, match="cannot be compared"):
        law(lambda rng: bytearray(b"a"))


def test_the_law_of_a_rollout_is_that_of_its_samples_or_of_its_actions():
    model = markov(symbols=2, length=2)
    samples = law(lambda rng: rollout(model, [Request(Prompt(0, 0), 1)], rng))
    actions = law(lambda rng: rollout(model, [Request(Prompt(0, 0), 1)], rng).trajectories)
    strings = {(text,): p for text, p in zip(model.strings(), model.string_probabilities().tolist(), strict=True)}
    assert samples == pytest.approx(strings, abs=1e-14)
    assert actions == pytest.approx(strings, abs=1e-14)


def test_an_expectation_keeps_the_structure_of_the_result():
    """In double precision."""

    def program(rng):
        heads = rng.bernoulli(COIN)
        return {"float": float(heads), "bool": bool(heads), "pair": (heads.float(), [torch.ones(2, 2)])}

    found = expectation(program)
    assert found["float"] == found["bool"] == 0.25
    assert found["pair"][0].dtype == torch.float64
    assert torch.equal(found["pair"][1][0], torch.ones(2, 2, dtype=torch.float64))


def test_an_expectation_stays_differentiable_in_its_results():
    x = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    expectation(lambda rng: x * 3 if rng.bernoulli(COIN) else x**2).backward()
    assert float(x.grad) == pytest.approx(0.25 * 3 + 0.75 * 4)


def test_results_of_different_structure_have_no_expectation():
    with pytest.raises(InputError, match="one structure"):
        expectation(lambda rng: torch.ones(2) if rng.bernoulli(COIN) else torch.ones(3))
    with pytest.raises(InputError, match="one structure"):
        expectation(lambda rng: {"a": 1.0} if rng.bernoulli(COIN) else {"b": 1.0})
    with pytest.raises(InputError, match="str"):
        expectation(lambda rng: "heads")


def test_unbiased_names_what_was_found_and_what_is_right():
    with pytest.raises(LawBroken, match=r"the program\['b'\] is 0.25, where 0.3 is right: it is off by 0.05"):
        unbiased(lambda rng: {"a": 1.0, "b": float(rng.bernoulli(COIN))}, {"a": 1.0, "b": 0.3})
    with pytest.raises(LawBroken, match="nan"):
        unbiased(lambda rng: math.nan, 0.0)
    assert unbiased(lambda rng: rng.bernoulli(COIN), lambda: COIN) == 0.0
    with pytest.raises(InputError, match="shape"):
        unbiased(lambda rng: rng.bernoulli(COIN), torch.ones(2))
    with pytest.raises(InputError, match="target"):
        unbiased(lambda rng: 0.0)


MODEL = markov(symbols=3, length=2)


def plain(process, rng):
    return rollout(process, [Request(Prompt(0, 0), 2)], rng)


def flat(law_, state, prompts):
    return type(law_)(torch.zeros_like(law_.logits))


def proposed(process, rng):
    return rollout(process, [Request(Prompt(0, 0), 1, proposal=flat)], rng)


def proposed_without_weights(process, rng):
    return proposed(process, rng).samples.values


def potential(text):
    return 0.7 * text.count(1) - 0.2 * len(text)


def weighted_by_potential(process, rng):
    drawn = plain(process, rng)
    return drawn.samples.values, torch.tensor([potential(text) for text in drawn.samples.values], dtype=torch.float64)


def test_a_sampler_and_a_weighted_proposal_are_unbiased():
    assert unbiased(plain, on=MODEL, tolerance=1e-12) <= 1e-12
    assert unbiased(proposed, on=MODEL, tolerance=1e-12) <= 1e-12
    assert unbiased(lambda process, rng: plain(process, rng).samples.values, on=MODEL) <= 1e-12


def test_a_proposal_whose_weights_are_forgotten_is_caught():
    with pytest.raises(LawBroken, match="string"):
        unbiased(proposed_without_weights, on=MODEL)


def test_weights_of_a_potential_are_proper_for_the_tilted_measure():
    assert unbiased(weighted_by_potential, on=MODEL, log_potential=potential, tolerance=1e-12) <= 1e-12
    with pytest.raises(LawBroken):
        unbiased(plain, on=MODEL, log_potential=potential)


def test_only_the_test_functions_asked_for_are_compared():
    def reflected(process, rng):
        """Swaps symbols 1 and 2 of a model that is symmetric in length but not in symbols."""
        swap = {0: 0, 1: 2, 2: 1}
        return [tuple(swap[symbol] for symbol in text) for text in plain(process, rng).samples.values]

    assert unbiased(reflected, on=MODEL, test_functions={"length": len}) <= 1e-12
    with pytest.raises(LawBroken, match="ones"):
        unbiased(reflected, on=MODEL, test_functions={"length": len, "ones": lambda text: text.count(1)})


def test_an_estimator_is_held_against_a_function_of_the_process():
    def estimator(process, rng):
        return sum(len(text) for text in plain(process, rng).samples.values) / 2

    assert unbiased(estimator, lambda process: process.expectation(len).detach(), on=MODEL) <= 1e-12


def test_strings_outside_the_process_are_refused():
    """So are samplers without strings."""
    with pytest.raises(LawBroken, match="no complete string"):
        unbiased(lambda process, rng: [(7, 7)], on=MODEL)
    with pytest.raises(InputError, match="weight each"):
        unbiased(lambda process, rng: [], on=MODEL)


def test_public_names_are_there_and_no_others():
    assert {"law", "expectation", "outcomes", "unbiased", "process"} <= set(dir(check))
    assert callable(check.process)
    with pytest.raises(AttributeError, match="has no 'proces'"):
        check.proces  # noqa: B018


def test_a_real_stream_is_one_of_the_outcomes():
    assert tuple(systematic(Rng(3)).tolist()) in law(systematic)
