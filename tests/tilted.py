"""A tabular policy, its reference, and the reference tilted by the exponential of a reward."""

from __future__ import annotations

import functools

import torch

from stepwell.batch import Batch
from stepwell.objective.preference.pairs import SequenceScore
from stepwell.objective.term import Objective
from stepwell.process.exact.table import markov
from stepwell.rng import Rng
from stepwell.trajectories import count

EXACT = 1e-10
FLAT = 1e-13  # a gradient of a few hundred float64 terms of order one that cancel
BETA = 0.7
OWN = SequenceScore(against="none")


@functools.cache
def models():
    """A policy, its reference, rewards of all strings, and the reference tilted by exp(R / BETA)."""
    process, reference = (markov(symbols=3, length=3, order=None, seed=seed) for seed in (5, 6))
    reward = Rng(2).normal(len(process.strings()), dtype=torch.float64)
    by_string = dict(zip(process.strings(), reward.tolist(), strict=True))
    return process, reference, reward, reference.tilted(lambda text: by_string[text] / BETA)


def some_rows(number=40, groups=8, seed=3):
    """Arbitrary strings in arbitrary groups, with reference and made-up sampler log-probabilities."""
    process, reference, reward, _ = models()
    chosen = (Rng(seed).uniform(number) * len(reward)).long()
    rows = reference.trajectories()[chosen]
    return rows.replace(
        prompt=torch.arange(number) % groups,
        reward=reward[chosen],
        reference_log_prob=rows.log_prob,
        log_prob=Rng(seed + 1).normal(*rows.mask.shape, dtype=torch.float64) * rows.mask,
        old_log_prob=process.score(rows).log_prob.detach(),
    )


def loss_on(process, term, rows, states=None):
    """The loss of a term on these rows, and its gradient in the logits."""
    objective = Objective((term,))
    counts = count(rows, process.horizon)
    with torch.no_grad():
        scored = process.score(rows, objective.needs).detach()
    targets = objective.plan(Batch(rows, counts, scored, states or {}))
    loss = objective.loss(Batch(rows, counts, process.score(rows, objective.needs), states or {}), targets)
    return float(loss.value.detach()), torch.autograd.grad(loss.value, process.logits)[0], loss.metrics
