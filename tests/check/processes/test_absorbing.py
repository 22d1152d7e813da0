"""Rows that are done are absorbing: without that, a particle filter that reads partial texts finds another evidence."""

import torch
from mistakes import GoesOnWriting

from stepwell import check
from stepwell.check import expectation
from stepwell.process.exact.table import TabularLanguage, markov
from stepwell.rng import Rng

LOGITS = Rng(4).normal(1, 3, 2, dtype=torch.float64)
PARTICLES = 2


def log_potential(text):
    """(N,) of partial texts (N, T): 0.13 for each symbol 1."""
    return 0.13 * (text == 1).sum(1).double()


def evidence(process, rng):
    """The estimate of sum_y p(y) exp(log_potential(y)) by particles, resampled by their weights after every step."""
    state, found = process.start([0] * PARTICLES, rng), 1.0
    for step in range(process.horizon):
        before = log_potential(state.text)
        state = process.advance(state, process.propose(state).sample(rng), rng)
        weight = (log_potential(state.text) - before).exp()
        found *= float(weight.mean())
        if step < process.horizon - 1:
            state = state[rng.categorical((weight / weight.sum()).expand(PARTICLES, -1))]
    return found


def off(kind):
    """The bias of the estimate, over every outcome."""
    process = kind(LOGITS.clone(), 2)
    exact = process.log_partition(lambda text: 0.13 * text.count(1)).exp().item()
    return expectation(lambda rng: evidence(process, rng)) - exact


def test_the_evidence_of_a_particle_filter_is_exact_where_texts_end_early():
    assert abs(off(TabularLanguage)) < 1e-12


def test_the_evidence_is_biased_where_ended_rows_go_on_writing():
    assert 0.09 < off(GoesOnWriting) < 0.11


def test_rows_that_are_done_stay_for_every_order_and_length():
    for order, length, end in ((1, 4, True), (2, 4, True), (None, 3, True), (None, 3, False)):
        report = check.process(markov(symbols=3, length=length, order=order, prompts=2, end=end), [0, 1])
        assert report.measured["absorbing"] < 1e-14


def test_rows_that_are_not_done_soon_enough_are_not_checked():
    report = check.process(markov(symbols=2, length=70, end=False), [0], horizon=3)
    assert report.skipped["absorbing"] == "no row was done within 3 steps"
