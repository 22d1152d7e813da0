"""Rows that were cut go on from the value of their last state: exact expectations on a tabular language."""

from __future__ import annotations

import functools

import pytest
import torch

from stepwell.batch import Batch, Read
from stepwell.check.replay import expectation
from stepwell.credit.traces import GeneralisedAdvantage, RewardToGo
from stepwell.objective.value import ValueLoss
from stepwell.process.exact.table import markov
from stepwell.process.models import Models
from stepwell.rng import Rng
from stepwell.sampling.request import Prompt, Request
from stepwell.sampling.rollout import rollout
from stepwell.training.scoring import fill
from stepwell.trajectories import concatenate, count

EXACT = 1e-12
VALUE = frozenset({Read("policy", "value")})
HORIZON = 2
GAMMA = 0.9


@functools.cache
def model():
    """Strings of one to four symbols with real rewards, and a critic that knows the expected discounted reward."""
    process = markov(symbols=3, length=4, order=None, seed=1).with_value_head()
    strings, probability = process.strings(), process.string_probabilities().detach()
    reward = 1 + Rng(2).normal(len(strings), dtype=torch.float64)
    rows = process.trajectories()
    contexts = process._contexts(rows.action)
    left = rows.length[:, None] - 1.0 - torch.arange(process.length).double()  # steps from each step to the last
    total, mass = torch.zeros(process.contexts).double(), torch.zeros(process.contexts).double()
    for row, trained in enumerate(rows.mask):
        total[contexts[row][trained]] += probability[row] * GAMMA ** left[row][trained] * reward[row]
        mass[contexts[row][trained]] += probability[row]
    value = torch.where(mass > 0, total / mass, 5.0)  # 5 where no step is ever drawn: it must not be read
    process.module.get_parameter("value").data.copy_(value[None])
    return process, dict(zip(strings, reward.tolist(), strict=True))


def drawn(rng, horizon, number=1):
    """Rows with the values of their states; a string that was cut earns nothing."""
    process, reward = model()
    made = rollout(process, [Request(Prompt(0, 0), number, horizon=horizon)], rng)
    rows = made.trajectories
    earned = [0.0 if cut else reward[text] for cut, text in zip(rows.truncated, made.samples.values, strict=True)]
    return fill(Models(process), rows.replace(reward=torch.tensor(earned, dtype=torch.float64)), VALUE, tokens=None)


def expected(lam, horizon, change=lambda rows: rows):
    """(contexts, symbols) the expected sum of the advantages of the first `HORIZON` steps, by state and action."""
    process, _ = model()

    def program(rng):
        rows = change(drawn(rng, horizon))
        table = torch.zeros(process.contexts, process.symbols, dtype=torch.float64)
        credit = GeneralisedAdvantage(GAMMA, lam)(Batch(rows, count(rows)))
        place = process._contexts(rows.action)[:, :HORIZON], rows.action[:, :HORIZON]
        return table.index_put(place, credit[:, :HORIZON], accumulate=True)

    return expectation(program)


def without(rows):
    """0 after the last step, whether or not the row was cut."""
    return rows.replace(final_value=None)


def too_early(rows):
    """The mistake of taking the value before the last step for the value after it."""
    last = rows.value.gather(1, rows.length[:, None] - 1)[:, 0]
    return rows.replace(final_value=torch.where(rows.truncated, last, 0.0))


@pytest.mark.parametrize("lam", [1.0, 0.95, 0.0])
def test_a_cut_row_has_the_expected_advantage_of_a_whole_one(lam):
    """For every state and action before the cut, and for every lambda."""
    whole = expected(lam, None)
    assert float(whole.abs().max()) > 0.05
    assert float((expected(lam, HORIZON) - whole).abs().max()) < EXACT


@pytest.mark.parametrize("mistake", [without, too_early])
@pytest.mark.parametrize("lam", [1.0, 0.95, 0.0])
def test_a_cut_row_without_its_final_value_is_biased(lam, mistake):
    assert float((expected(lam, HORIZON, mistake) - expected(lam, None)).abs().max()) > 0.01


def test_the_final_value_is_that_of_the_state_at_the_cut():
    process, _ = model()
    rows = drawn(Rng(3), HORIZON, number=40)
    assert 0 < int(rows.truncated.sum()) < 40
    table = process.module.get_parameter("value")[0].detach()
    for row in range(40):
        text = torch.cat([rows.action[row, : rows.length[row]], torch.zeros(1).long()])
        after = float(table[process._contexts(text[None])[0, -1]]) if rows.truncated[row] else 0.0
        assert float(rows.final_value[row]) == after


def test_rows_that_were_not_cut_are_as_they_were():
    """No row is cut: no score, no field, and the same bits; some are: the others keep their advantages."""
    process, _ = model()
    whole = drawn(Rng(4), None, number=20)
    assert whole.final_value is None
    credit = GeneralisedAdvantage(GAMMA, 0.95)
    both = concatenate([whole.replace(value=None), drawn(Rng(5), HORIZON, 20).replace(value=None, final_value=None)])
    both = fill(Models(process), both, VALUE, tokens=None)
    assert bool(both.truncated.any())
    found = credit(Batch(both, count(both)))[:20]
    assert torch.equal(found, credit(Batch(whole, count(whole))))
    assert torch.equal(credit(Batch(whole.replace(final_value=torch.zeros(20).double()), count(whole))), found)


def test_returns_of_the_critic_go_on_from_the_final_value():
    rows = drawn(Rng(3), HORIZON, number=10)
    batch = Batch(rows, count(rows))
    estimator = GeneralisedAdvantage(1.0, 1.0)
    returns = ValueLoss(estimator).credit(batch)["returns"]
    assert torch.allclose(returns, (rows.reward + rows.final_value)[:, None] * batch.mask, rtol=0, atol=EXACT)
    assert torch.equal(RewardToGo()(batch), rows.reward[:, None] * batch.mask)  # it reads no values


def test_a_process_without_final_values_ends_at_0():
    """A process that does not offer them is not asked for them."""

    class Text(type(model()[0])):
        offers = frozenset({"value"})

    process, _ = model()
    twin = process.frozen()
    twin.__class__ = Text
    rows = drawn(Rng(3), HORIZON, number=10).replace(value=None, final_value=None)
    filled = fill(Models(twin), rows, VALUE, tokens=None)
    assert filled.final_value is None
    assert filled.value is not None
