"""Minibatches cut into micro-batches: no number depends on the cut, although rows are coupled."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from tilted import models, some_rows

from stepwell.batch import Batch
from stepwell.check.oracles.provable import deviation
from stepwell.objective.balance import TrajectoryBalance
from stepwell.objective.groups import Consistency, GroupLoss, PosteriorMatching
from stepwell.objective.policy import Policy
from stepwell.objective.preference.pairs import Logistic, Pairing, Pairs
from stepwell.objective.regularise import Divergence, Regulariser, entropy_bonus
from stepwell.objective.term import Coupling, Loss, Objective, Term
from stepwell.objective.value import ValueLoss
from stepwell.process.models import Models
from stepwell.rng import Rng
from stepwell.training.update import accumulate, cut
from stepwell.trajectories import count


@dataclass(frozen=True)
class Sorted(Term):
    """Couples all rows of the batch (AOT): scores are sorted against rewards; it also reads a second score."""

    coefficient: float = 1.0
    coupling: Coupling = "batch"
    needs = frozenset({"entropy"})

    def loss(self, batch, targets):
        score = batch.row_sum(batch.log_prob + batch.present("entropy"))[:, 0]
        value = (score.sort().values - batch.reward.sort().values).pow(2).sum() / batch.counts.rows
        return Loss(value, {"sorted": value.detach()})


COUPLED = {
    "pairs": Pairs(Logistic(0.5), pairing=Pairing("all")),
    "copg": GroupLoss(Consistency(0.5)),
    "brain": GroupLoss(PosteriorMatching(0.5)),
    "vargrad": TrajectoryBalance(partition="group"),
    "batch": Sorted(),
    "mixed": Pairs() + 0.3 * Policy() + Regulariser(Divergence("exact"), 0.1) + entropy_bonus(0.2),
    "critic": GroupLoss() + ValueLoss(),
}


def update(term, tokens):
    """The gradients in all parameters, and the metrics, of one accumulation."""
    process, reference, _, _ = models()
    process = process.frozen()
    process.module.requires_grad_(True)
    pair = Models(process, reference)
    rows = some_rows(number=17, groups=4)
    rows = rows.replace(value=Rng(9).normal(*rows.mask.shape, dtype=torch.float64) * rows.mask)
    objective = term if isinstance(term, Objective) else Objective((term,))
    counts = count(rows, process.horizon)
    with torch.no_grad():
        targets = objective.plan(Batch(rows, counts, pair.score(rows, objective.needs).detach()))
    metrics = accumulate(pair, objective, Batch(rows, counts), targets, tokens)
    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in process.module.parameters()]
    return torch.cat([gradient.reshape(-1) for gradient in gradients]), metrics


@pytest.mark.parametrize("tokens", [1, 7, 30])
@pytest.mark.parametrize("name", COUPLED)
def test_a_coupled_loss_is_the_same_however_its_batch_is_cut(name, tokens):
    whole, cut_up = update(COUPLED[name], None), update(COUPLED[name], tokens)
    assert float(whole[0].norm()) > 0.01
    assert torch.allclose(cut_up[0], whole[0], rtol=0, atol=1e-12)
    assert cut_up[1] == pytest.approx(whole[1], abs=1e-12)


@pytest.mark.parametrize("name", ["pairs", "copg", "brain", "batch"])
def test_cutting_coupled_rows_without_their_scores_gives_another_gradient(name, monkeypatch):
    whole = update(COUPLED[name], None)[0]
    plain = cut
    loose = lambda process, rows, coupling, tokens: plain(process, rows, "rows", tokens)  # noqa: E731
    monkeypatch.setitem(accumulate.__globals__, "cut", loose)
    assert deviation(update(COUPLED[name], 1)[0], whole) > 0.01


def test_whole_groups_that_fit_are_taken_together():
    rows, process = some_rows(number=12, groups=4), models()[0]
    pieces = cut(process, rows, "groups", 20)
    assert pieces is not None
    assert sorted(torch.cat(pieces).tolist()) == list(range(12))
    for piece in pieces:
        assert len(piece) * int(rows.length[piece].max()) <= 20
        assert all(set((rows.prompt == p).nonzero()[:, 0].tolist()) <= set(piece.tolist()) for p in rows.prompt[piece])
    assert cut(process, rows, "groups", 5) is None
    assert cut(process, rows, "batch", 20) is None
