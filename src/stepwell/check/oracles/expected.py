"""Exact expectations of losses: over every group of samples of a tabular model, each weighted by its probability."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import torch
from torch import Tensor

from stepwell.batch import Batch
from stepwell.objective.term import Objective, Term
from stepwell.process.base import Scores
from stepwell.process.exact.table import TabularLanguage, markov
from stepwell.process.models import Models
from stepwell.rng import Rng
from stepwell.training.scoring import fill
from stepwell.trajectories import Trajectories, count


def uneven() -> tuple[TabularLanguage, Tensor]:
    """Strings of one to three symbols with real rewards."""
    process = markov(symbols=3, length=3, order=None, seed=1)
    return process, Rng(2).normal(len(process.strings()), dtype=torch.float64)


def even() -> tuple[TabularLanguage, Tensor, float]:
    """Strings of equal length with binary rewards, and the success rate."""
    process = markov(symbols=3, length=2, order=None, end=False, seed=3)
    reward = (Rng(4).uniform(len(process.strings())) < 0.4).double()
    return process, reward, float((process.string_probabilities().detach() * reward).sum())


def all_groups(
    process: TabularLanguage, size: int, reward: Tensor, behaviour: TabularLanguage | None = None
) -> tuple[Trajectories, Tensor]:
    """Every group of `size` strings as rows of one batch, and each row's group probability (N,) under the behaviour."""
    behaviour = behaviour or process
    strings = process.trajectories()
    ids = torch.tensor(list(itertools.product(range(len(strings)), repeat=size)))
    probability = behaviour.string_probabilities().detach()[ids].prod(1)
    flat = ids.reshape(-1)
    rows = strings[flat]
    with torch.no_grad():
        drawn, old = behaviour.score(rows).log_prob, process.score(rows).log_prob
    rows = rows.replace(
        prompt=torch.arange(len(ids)).repeat_interleave(size),
        reward=reward[flat],
        log_prob=drawn,
        old_log_prob=old,
        info=None,
    )
    return rows, probability.repeat_interleave(size)


def expected_gradient(
    process: TabularLanguage,
    objective: Term | Objective,
    size: int,
    reward: Tensor,
    behaviour: TabularLanguage | None = None,
    fields: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """The exact expectation of -dL/d logits over a minibatch of one group of `size` strings.

    For objectives whose weights are the same in every group (all reductions but `token` on strings of different
    lengths): the gradient of the loss in log_prob is taken on all groups at once and weighted by their probability.
    `fields` (strings, ...) are further fields of the rows, one entry a string; whatever else the objective reads of
    the policy is filled in.
    """
    objective = Objective((objective,)) if isinstance(objective, Term) else objective
    rows, probability = all_groups(process, size, reward, behaviour)
    given = fields or {}
    flat = torch.tensor(list(itertools.product(range(len(reward)), repeat=size))).reshape(-1)
    rows = rows.replace(**{name: value[flat] for name, value in given.items()})
    rows = fill(Models(process), rows, {read for read in objective.reads if read.name not in given}, tokens=None)
    counts = count(rows, process.horizon)
    scores = process.score(rows, objective.needs)
    leaf = Scores(scores.log_prob.detach().requires_grad_(), {k: v.detach() for k, v in scores.extra.items()})
    states = {name: state.initial for name, state in objective.states.items()}
    targets = objective.plan(Batch(rows, counts, leaf.detach(), states))
    slope = torch.autograd.grad(objective.loss(Batch(rows, counts, leaf, states), targets).value, leaf.log_prob)[0]
    total = (slope * (probability * counts.groups)[:, None] * scores.log_prob).sum()
    return -torch.autograd.grad(total, process.logits)[0]


def policy_gradient(process: TabularLanguage, reward: Tensor) -> Tensor:
    """The gradient of the expected reward, from the sum over all strings."""
    return torch.autograd.grad((process.string_probabilities() * reward).sum(), process.logits)[0]
