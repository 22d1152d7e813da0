"""Oracles of what one preference or distillation method claims: its labels, its point, its samples, its teacher."""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import torch
from torch import Tensor

from stepwell.batch import Batch
from stepwell.check.oracles.preference import by_hand as hand
from stepwell.check.oracles.provable import Provable, deviation, known
from stepwell.check.oracles.registry import register
from stepwell.check.replay import law
from stepwell.columns import Columns
from stepwell.objective.preference.pairs import Logistic, Pairs
from stepwell.objective.preference.unpaired import Prospect, RejectionPairs
from stepwell.objective.regularise import Regulariser
from stepwell.objective.term import Objective, Term
from stepwell.process.base import Scores
from stepwell.process.exact.table import TabularLanguage, markov
from stepwell.rng import Rng
from stepwell.trajectories import Trajectories, count


def models() -> tuple[TabularLanguage, TabularLanguage, Tensor]:
    """A policy, its reference, and the rewards of all strings."""
    process, reference = (markov(symbols=3, length=3, order=None, seed=seed) for seed in (5, 6))
    return process, reference, Rng(2).normal(len(process.strings()), dtype=torch.float64)


def only(card: Provable, **options: Any) -> Term:
    """The method's first term, with those of the options that it has."""
    return card.recipe(**known(card, options)).whole.terms[0]


@register
def flipped_labels(card: Provable) -> float:
    """The mean loss over labels flipped with probability e is the logistic loss of the true ones."""
    link = only(card, beta=0.7, smoothing=0.2).link  # type: ignore[attr-defined]
    x, zero = Rng(1).normal(20, dtype=torch.float64) * 5, torch.zeros(20, dtype=torch.float64)
    return deviation(0.8 * link(x, zero) + 0.2 * link(zero, x), Logistic(0.7)(x, zero))


@register
def reference_point(card: Provable) -> float:
    """The mean of the point over the policy's own rows is KL(pi || ref), from every string by itself.

    The reference is moved so far down that no string's own score is below 0, where the point is cut off.
    """
    process, reference, reward = models()
    term, rows = only(card), process.trajectories().replace(reward=reward)
    assert isinstance(term, Prospect)
    with torch.no_grad():
        probability, far = process.string_probabilities(), 10.0 * rows.mask
        rows = rows.replace(reference_log_prob=reference.score(rows).log_prob - far)
        points = []
        for i in range(len(rows)):
            row = rows[i : i + 1]
            points.append(term.plan(Batch(row, count(row), process.score(row)), {})["center"][0] - far[i].sum())
        gap = process.string_log_probabilities() - reference.string_log_probabilities()
    return deviation((probability * torch.stack(points)).sum(), (probability * gap).sum())


@register
def guiding_weight(card: Provable) -> float:
    """At the start, pi = ref, a pair's slope is -beta sigmoid(beta (log guide - log ref)(y_w - y_l))."""
    rows, scores = hand.some_rows()
    term = only(card, beta=0.7)
    assert isinstance(term, Pairs)
    leaf = scores["log_prob"].clone().requires_grad_()
    batch = Batch(rows, count(rows), Scores(leaf))
    targets = Objective((term,)).plan(batch)["0"]
    found = torch.autograd.grad(term.loss(batch, targets).value, leaf)[0] * rows.mask
    view, expected = hand.numbers(rows, scores), torch.zeros_like(found)
    pairs = view.pairs("extremes")
    for i, j in pairs:
        lead = [sum(view.teacher[k, t] - view.log_prob[k, t].real for t in view.steps(k)) for k in (i, j)]
        weight = 0.7 / (1 + math.exp(-0.7 * (lead[0] - lead[1]))) / len(pairs)
        expected[i] -= weight * rows.mask[i].double()
        expected[j] += weight * rows.mask[j].double()
    return deviation(found, expected)


@register
def rejection_law(card: Provable) -> float:
    """The probability of each accepted set, over every outcome of every draw, is that of a recursion by hand."""
    reward, beta = [0.3, 1.1, 0.3, -0.6], 0.7
    term = only(card, beta=beta, accept=2)
    assert isinstance(term, RejectionPairs)
    rows, _ = hand.some_rows()
    index = (rows.prompt == 0).nonzero()[:, 0]
    rows = rows[index].replace(reward=torch.tensor(reward, dtype=torch.float64))
    drawn: Any = law(lambda rng: tuple(term.draw(rows, None, rng)["kept"].tolist()))  # type: ignore[arg-type]

    @functools.cache
    def chances(left: tuple[int, ...], place: int, kept: tuple[int, ...], top: float) -> dict[frozenset[int], float]:
        if len(kept) == 2:
            return {frozenset(kept): 1.0}
        if place == len(left):
            rest = tuple(i for i in left if i not in kept)
            return chances(rest, 0, kept, max(reward[i] for i in rest))
        i = left[place]
        chance, found = math.exp((reward[i] - top) / beta), dict[frozenset[int], float]()
        for share, now in ((chance, (*kept, i)), (1 - chance, kept)):
            if share > 0:
                for outcome, probability in chances(left, place + 1, now, top).items():
                    found[outcome] = found.get(outcome, 0.0) + share * probability
        return found

    expected = chances((0, 1, 2, 3), 0, (), max(reward))
    found = {frozenset(i for i, kept in enumerate(flags) if kept): p for flags, p in drawn.items()}
    return max(abs(found.get(key, 0.0) - expected.get(key, 0.0)) for key in found.keys() | expected.keys())


@register
def teacher_gradient(card: Provable) -> float:
    """On policy the expected gradient of what the teacher adds is that of each state's KL(pi || teacher), visits
    frozen; with advantages to go, that of whole sequences'."""
    process, teacher = (markov(symbols=3, length=3, order=None, end=False, seed=seed) for seed in (5, 6))
    rows, probability = process.trajectories(), process.string_probabilities().detach()
    rows = rows.replace(old_log_prob=rows.log_prob, reward=torch.zeros(len(rows)).double())
    table: dict[str, Tensor] = {"teacher_log_prob": teacher.score(rows).log_prob.detach()}
    rows = rows.replace(info=_table(table, rows))
    worst = 0.0
    for options in [{}, *([{"to_go": True}] if "to_go" in card.options else [])]:
        objective = card.recipe(**options).whole
        term = next(t for t in objective.terms if isinstance(t, Regulariser) or "to_go" in card.options)
        scores, counts = process.score(rows), count(rows)
        targets = Objective((term,)).plan(Batch(rows, counts, scores.detach()))["0"]
        leaf = Scores(scores.log_prob.detach().requires_grad_())
        slope = torch.autograd.grad(term.loss(Batch(rows, counts, leaf), targets).value, leaf.log_prob)[0]
        # the minibatch holds each string once: its share is made its probability
        weighted = (slope * (probability * len(rows))[:, None] * process.score(rows).log_prob).sum()
        found = torch.autograd.grad(weighted, process.logits)[0]
        coefficient = term.coefficient if isinstance(term, Regulariser) else 1.0
        exact = coefficient * _teacher_divergence(process, teacher, rows, bool(options)) / process.length  # type: ignore[operator]
        worst = max(worst, deviation(found, exact))
    return worst


def _table(entries: dict[str, Tensor], rows: Trajectories) -> Any:
    return Columns(entries, len(rows))


def _teacher_divergence(process: TabularLanguage, teacher: TabularLanguage, rows: Trajectories, whole: bool) -> Tensor:
    """The gradient of sum_s d(s) KL(pi(s) || teacher(s)) with visits d frozen, or of the sequences' KL."""
    own, other = process.score(rows, {"logits"})["logits"], teacher.score(rows, {"logits"})["logits"].detach()
    each = (own.exp() * (own - other)).sum(-1)
    weight = process.string_probabilities()
    total = ((weight if whole else weight.detach())[:, None] * each).sum()
    return torch.autograd.grad(total, process.logits)[0]


@register
def exact_distillation(card: Provable) -> float:
    """The loss and its gradient in the logits are the divergence's, summed by hand over the vocabulary, for five
    mixtures; scaled, the family goes to the two divergences at its ends."""
    process, teacher = (markov(symbols=4, length=2, order=None, seed=seed) for seed in (5, 6))
    rows = process.trajectories().replace(reward=torch.zeros(len(process.strings())).double())
    logits = teacher.score(rows, {"logits"})["logits"].detach()
    rows = rows.replace(info=_table({"teacher_logits": logits}, rows))
    worst = 0.0
    for beta, scaled in [*itertools.product((0.0, 0.2, 0.5, 0.9, 1.0), (False,)), (0.3, True)]:
        objective, counts = card.recipe(beta=beta, scaled=scaled).whole, count(rows)
        scores = process.score(rows, objective.needs)
        loss = objective.loss(Batch(rows, counts, scores), objective.plan(Batch(rows, counts, scores.detach()))).value
        s, t = scores["logits"].exp(), logits.exp()
        m = (1 - beta) * s + beta * t
        if beta in (0.0, 1.0):
            each = (t * (t / s).log() if beta == 0.0 else s * (s / t).log()).sum(-1)
        else:
            each = (beta * t * (t / m).log() + (1 - beta) * s * (s / m).log()).sum(-1)
        each = each / (beta * (1 - beta)) if scaled else each
        expected = (each * rows.mask).sum() / rows.mask.sum()
        slopes = [torch.autograd.grad(x, process.logits, retain_graph=True)[0] for x in (loss, expected)]
        worst = max(worst, deviation(*slopes), abs(float((loss - expected).detach())))
    return worst
