"""The yardstick itself: what the tabular model says in closed form is what enumeration by hand gives."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stepwell.check import law, process
from stepwell.errors import MissingAbility
from stepwell.process.exact.table import TabularLanguage, conditioned, markov
from stepwell.rng import Rng
from stepwell.sampling.request import Prompt, Request
from stepwell.sampling.rollout import rollout
from stepwell.trajectories import make, pad_steps

SHAPES = [
    {"symbols": 3, "length": 3, "order": 1},
    {"symbols": 2, "length": 4, "order": 2},
    {"symbols": 3, "length": 2, "order": None},
    {"symbols": 2, "length": 3, "order": 0},
    {"symbols": 2, "length": 3, "order": 1, "end": False},
]


def context_by_hand(model, text):
    """The index of the context that a text leads to, written out symbol by symbol."""
    before = [model.symbols] * model.order + list(text)
    code = 0
    for symbol in before[len(before) - model.order :]:
        code = code * (model.symbols + 1) + symbol
    return code


def by_hand(model, text, prompt=0):
    """p(text) as a product of table entries."""
    probability = 1.0
    for step, symbol in enumerate(text):
        row = model.logits[prompt, context_by_hand(model, text[:step])]
        probability *= float(row.detach().softmax(-1)[symbol])
    return probability


@pytest.mark.parametrize("shape", SHAPES)
def test_string_probabilities_are_products_of_table_entries_and_sum_to_one(shape):
    model = markov(**shape, prompts=2, seed=3)
    for prompt in range(2):
        found = model.string_probabilities(prompt).tolist()
        assert found == pytest.approx([by_hand(model, text, prompt) for text in model.strings()], abs=1e-14)
        assert math.fsum(found) == pytest.approx(1.0, abs=1e-13)


@pytest.mark.parametrize("shape", SHAPES)
def test_strings_are_all_that_the_rollout_can_give_each_once(shape):
    model = markov(**shape)
    exact = law(lambda rng: rollout(model, [Request(Prompt(0, 0), 1)], rng))
    assert {text for (text,) in exact} == set(model.strings())
    assert len(model.strings()) == len(set(model.strings()))
    assert [exact[(text,)] for text in model.strings()] == pytest.approx(model.string_probabilities().tolist())


@pytest.mark.parametrize("shape", SHAPES)
def test_a_tabular_model_obeys_every_law_of_a_process(shape):
    report = process(markov(**shape, prompts=2), prompts=[0, 1], evaluations_per_step=1)
    assert not report.skipped
    assert max(report.measured.values()) < 1e-12


def test_strings_end_with_their_first_end_symbol():
    for text in markov(symbols=3, length=3).strings():
        assert 0 not in text[:-1]
        assert len(text) == 3 or text[-1] == 0
    assert markov(symbols=2, length=2, end=False).strings() == list(itertools.product(range(2), repeat=2))


def test_an_expectation_is_the_weighted_sum_and_its_gradient_a_finite_difference():
    model = markov(symbols=2, length=3, seed=2)
    value = model.expectation(len)
    pairs = zip(model.strings(), model.string_probabilities().tolist(), strict=True)
    assert float(value.detach()) == pytest.approx(sum(len(text) * p for text, p in pairs))
    (gradient,) = torch.autograd.grad(value, model.logits)
    width = 1e-6
    for entry in itertools.product(*map(range, model.logits.shape)):
        ends = []
        for sign in (1, -1):
            model.logits.data[entry] += sign * width
            ends.append(float(model.expectation(len).detach()))
            model.logits.data[entry] -= sign * width
        slope = (ends[0] - ends[1]) / (2 * width)
        assert slope == pytest.approx(float(gradient[entry]), abs=1e-9)  # width^2 and 1e-16 / width


def test_the_gradient_of_an_expectation_is_the_score_function_estimator_in_the_mean():
    model = markov(symbols=2, length=3, seed=2)
    (exact,) = torch.autograd.grad(model.expectation(len), model.logits)
    rows = model.trajectories()
    weight = model.string_probabilities().detach() * rows.length
    (estimator,) = torch.autograd.grad((weight * model.score(rows).log_prob.sum(1)).sum(), model.logits)
    torch.testing.assert_close(estimator, exact, rtol=0, atol=1e-13)


def log_potential(text):
    return 0.9 * text.count(1) - 0.4 * len(text)


def only_ones(text):
    return 0.0 if set(text) <= {0, 1} else -math.inf


@pytest.mark.parametrize("potential", [log_potential, only_ones])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_tilted_model_has_the_tilted_law_and_log_partition_is_its_constant(shape, potential):
    model = markov(**shape, prompts=2, seed=5)
    tilted = model.tilted(potential)
    assert tilted.strings() == model.strings()
    for prompt in range(2):
        weights = [
            p * math.exp(potential(text))
            for text, p in zip(model.strings(), model.string_probabilities(prompt).tolist(), strict=True)
        ]
        constant = math.fsum(weights)
        assert float(model.log_partition(potential, prompt).detach()) == pytest.approx(math.log(constant), abs=1e-13)
        found = tilted.string_probabilities(prompt).tolist()
        assert found == pytest.approx([weight / constant for weight in weights], abs=1e-13)


def test_a_constant_potential_tilts_nothing():
    model = markov(symbols=2, length=3)
    found = model.tilted(lambda text: 1.7).string_probabilities()
    torch.testing.assert_close(found, model.string_probabilities(), rtol=0, atol=1e-14)
    assert float(model.log_partition(lambda text: 1.7).detach()) == pytest.approx(1.7)


def forbidding():
    """A model whose end symbol is impossible, so that padding itself is impossible as a symbol."""
    logits = Rng(0).normal(1, 4, 3, dtype=torch.float64)
    logits[:, :, 0] = -math.inf
    return TabularLanguage(logits, 3)


def test_impossible_symbols_make_no_number_undefined():
    model = forbidding()
    assert float(model.string_probabilities().detach().sum()) == pytest.approx(1.0)
    rows = pad_steps(model.trajectories()[torch.tensor([3, 10])], 5)
    scores = model.score(rows, TabularLanguage.offers, reference=forbidding())
    for need in ("log_prob", "entropy", "value", "sum_of_squares", "kl"):
        assert not scores[need].isnan().any(), need
        assert not scores[need][:, 3:].any(), need
    total = scores["entropy"].sum() + scores["kl"].sum() + model.expectation(len)
    (gradient,) = torch.autograd.grad(total, model.logits)
    assert gradient.isfinite().all()


def test_what_a_method_may_need_is_what_the_definition_says():
    model, reference = markov(symbols=3, length=2, seed=1), markov(symbols=3, length=2, seed=2)
    rows = model.trajectories()
    scores = model.score(rows, {"entropy", "kl", "sum_of_squares", "logits", "value"}, reference=reference)
    p, q = scores["logits"].exp(), reference.score(rows, {"logits"})["logits"].exp()
    mask = rows.mask
    torch.testing.assert_close(p.sum(-1), torch.ones_like(p[..., 0]))
    torch.testing.assert_close(scores["entropy"], -(p * p.log()).sum(-1) * mask)
    torch.testing.assert_close(scores["kl"], (p * (p / q).log()).sum(-1) * mask)
    torch.testing.assert_close(scores["sum_of_squares"], p.square().sum(-1) * mask)
    torch.testing.assert_close(scores["logits"].gather(-1, rows.action[..., None])[..., 0] * mask, scores["log_prob"])
    assert not scores["value"].any()


def test_needs_are_computed_only_if_asked_for_and_refused_if_unknown():
    model = markov()
    scores = model.score(model.trajectories(), {"entropy"})
    with pytest.raises(MissingAbility, match="needs=frozenset"):
        scores["kl"]
    with pytest.raises(MissingAbility, match="deviation"):
        model.score(model.trajectories(), {"deviation"})
    with pytest.raises(MissingAbility, match="no condition"):
        model.score(model.trajectories().replace(condition=None))


def test_the_values_are_parameters_looked_up_by_prompt_and_context():
    value = torch.arange(8.0).reshape(2, 4)
    model = TabularLanguage(torch.zeros(2, 4, 3), 2, value=value)
    here = torch.tensor([model.strings().index((1, 2))])
    rows = conditioned(model.trajectories()[here], [1])
    assert model.score(rows, {"value"})["value"][0].tolist() == [value[1, 3], value[1, 1]]  # 3: before the string


@pytest.mark.parametrize("shape", SHAPES)
def test_the_final_value_is_that_of_the_context_after_the_last_symbol(shape):
    """Rows of every length, of two prompts, with anything in what is padding."""
    plain = markov(**shape, prompts=2)
    value = Rng(1).normal(2, plain.contexts, dtype=torch.float64)
    model = TabularLanguage(plain.logits.detach(), plain.length, shape["order"], plain.end, value)
    texts = [text[:length] for text in model.strings() for length in range(len(text) + 1)]
    prompts = [row % 2 for row in range(len(texts))]
    action = torch.full((len(texts), model.length), 1)
    mask = torch.zeros(action.shape, dtype=torch.bool)
    for row, text in enumerate(texts):
        action[row, : len(text)], mask[row, : len(text)] = torch.tensor(text, dtype=torch.long), True
    rows = conditioned(make(action, torch.zeros(mask.shape, dtype=torch.float64), mask), prompts)
    expected = [float(value[prompt, context_by_hand(model, text)]) for prompt, text in zip(prompts, texts, strict=True)]
    assert model.score(rows, {"final_value"})["final_value"].tolist() == expected
    assert model.score(pad_steps(rows, model.length + 2), {"final_value"})["final_value"].tolist() == expected


def test_a_planted_final_value_of_the_last_symbols_own_context_is_another():
    value = torch.arange(8.0).reshape(2, 4)
    model = TabularLanguage(torch.zeros(2, 4, 3), 2, value=value)
    rows = model.trajectories()[torch.tensor([model.strings().index((1, 2))])]
    scores = model.score(rows, {"value", "final_value"})
    assert scores["final_value"].tolist() == [value[0, 2]]  # after the 2
    assert scores["value"][0, -1] == value[0, 1]  # before it


# rows that are done


@pytest.mark.parametrize("end", [True, False])
def test_rows_that_are_done_stay_as_they_are_and_the_others_go_on(end):
    """With an end symbol rows are done early; without, all at once, when their texts are full."""
    model = markov(symbols=3, length=4, order=2, end=end)
    state, rng = model.start([0] * 40, Rng(0)), Rng(1)
    for position in range(model.length):
        done, texts = state.done, state.text
        assert bool(done.any()) == (end and position > 0)
        before = model.finish(state).values
        action = model.propose(state).sample(rng)
        action[done] = 1 + action[done] % 2  # a done row is handed a symbol that would show
        state = model.advance(state, action, rng)
        assert torch.equal(state.text[done], texts[done])
        assert torch.equal(state.text[~done, position], action[~done])
        assert torch.equal(state.text[~done, :position], texts[~done, :position])
        assert state.position == position + 1
        over = torch.full((40,), position + 1 == model.length) | ((action == 0) & torch.tensor(end))
        assert torch.equal(state.done, done | over)
        after = model.finish(state).values
        assert all(after[row] == before[row] for row in done.nonzero()[:, 0].tolist())


@pytest.mark.parametrize("end", [True, False])
def test_a_state_in_which_all_rows_are_done_is_handed_back(end):
    model = markov(symbols=3, length=2, end=end)
    state = model.start([0, 0], Rng(0))
    for symbols in ([1, 2], [2, 0]):
        state = model.advance(state, torch.tensor(symbols), Rng(0))
    assert state.done.all()
    again = model.advance(state, model.propose(state).sample(Rng(0)), Rng(0))
    assert torch.equal(again.text, state.text)
    assert again.position == state.position
    assert model.finish(again).values == [(1, 2), (2, 0)]


def test_the_same_rows_score_under_another_prompt_as_if_drawn_there():
    model = markov(prompts=2)
    rows = conditioned(model.trajectories(0), [1] * len(model.strings()))
    torch.testing.assert_close(model.score(rows).log_prob, model.score(model.trajectories(1)).log_prob)


def test_a_table_of_the_wrong_size_is_refused():
    with pytest.raises(ValueError, match="must have 16 contexts for order 2, got 4"):
        TabularLanguage(torch.zeros(1, 4, 3), 4, order=2)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000), st.floats(0.3, 5.0))
def test_a_markov_model_is_a_function_of_its_seed_and_temperature(seed, temperature):
    one, two = markov(seed=seed, temperature=temperature), markov(seed=seed)
    torch.testing.assert_close(one.logits * temperature, two.logits)
    assert torch.equal(one.logits, markov(seed=seed, temperature=temperature).logits)
