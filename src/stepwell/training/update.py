"""One update: the gradient of an objective on a minibatch, however the minibatch has to be cut."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor

from stepwell.columns import Columns
from stepwell.objective.term import Objective
from stepwell.parts import Batch
from stepwell.process.base import Process, Scores
from stepwell.process.batching import token_batches
from stepwell.process.models import Models
from stepwell.trajectories import Counts, Trajectories


@torch.no_grad()
def score_in_pieces(models: Models, rows: Trajectories, needs: Collection[str], tokens: int | None) -> Scores:
    """Scores of the policy as numbers only, computed for a few rows at a time."""
    if tokens is None:
        return models.score(rows, needs).detach()
    pieces = token_batches(models.policy.row_sizes(rows), tokens)
    scored = [models.score(rows[piece], needs).detach() for piece in pieces]
    order = torch.cat(pieces).argsort()
    extra = {need: torch.cat([scores[need] for scores in scored])[order] for need in needs}
    return Scores(torch.cat([scores.log_prob for scores in scored])[order], extra)


def cut(process: Process, rows: Trajectories, coupling: str, tokens: int | None) -> list[Tensor] | None:
    """Row indices of micro-batches of at most `tokens` padded tokens, or None where coupled rows do not fit one."""
    everything = torch.arange(len(rows))
    if tokens is None:
        return [everything]
    sizes = process.row_sizes(rows)
    if coupling == "rows":
        return token_batches(sizes, tokens)
    units = [everything] if coupling == "batch" else [(rows.prompt == p).nonzero()[:, 0] for p in rows.prompt.unique()]
    pieces: list[Tensor] = []
    for unit in units:
        if len(unit) * int(sizes[unit].max()) > tokens:
            return None
        joined = torch.cat([pieces[-1], unit]) if pieces else unit
        if pieces and len(joined) * int(sizes[joined].max()) <= tokens:
            pieces[-1] = joined
        else:
            pieces.append(unit)
    return pieces


def accumulate(
    models: Models,
    objective: Objective,
    rows: Trajectories,
    targets: Columns,
    counts: Counts,
    states: Mapping[str, float],
    tokens: int | None = None,
    judge: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> dict[str, float]:
    """Add the gradient of the objective on these rows to the parameters', and return the metrics.

    The rows may be any part of the minibatch that `targets` and `counts` come from. They are cut so that no forward
    holds more than `tokens`; neither the loss nor the gradient depends on the cut. Where coupled rows do not fit, the
    loss's gradient in the scores is taken on all rows first, and sent back piece by piece: one more forward, exact.
    """
    pieces = cut(models.policy, rows, objective.coupling, tokens)
    if pieces is None:
        return _through_scores(models, objective, rows, targets, counts, states, tokens, judge)
    metrics: dict[str, float] = {}
    for piece in pieces:
        part = rows[piece]
        batch = Batch(part, counts, models.score(part, objective.needs), states, judge)
        loss = objective.loss(batch, targets[piece])
        if loss.value.requires_grad:  # it does not where no step of these rows is trained: a window that is empty
            loss.value.backward()
        for name, value in loss.metrics.items():
            metrics[name] = metrics.get(name, 0.0) + float(value)
    return metrics


def _through_scores(
    models: Models,
    objective: Objective,
    rows: Trajectories,
    targets: Columns,
    counts: Counts,
    states: Mapping[str, float],
    tokens: int | None,
    judge: Callable[[Tensor, Tensor], Tensor] | None,
) -> dict[str, float]:
    numbers = score_in_pieces(models, rows, objective.needs, tokens)
    leaves = Scores(
        numbers.log_prob.requires_grad_(), {name: value.requires_grad_() for name, value in numbers.extra.items()}
    )
    loss = objective.loss(Batch(rows, counts, leaves, states, judge), targets)
    inputs = {"log_prob": leaves.log_prob, **leaves.extra}
    slopes = torch.autograd.grad(loss.value, list(inputs.values()), allow_unused=True)
    for piece in token_batches(models.policy.row_sizes(rows), tokens or len(rows)):
        scores = models.score(rows[piece], objective.needs)
        parts = [
            (scores[name] * slope[piece]).sum()
            for name, slope in zip(inputs, slopes, strict=True)
            if slope is not None and scores[name].requires_grad
        ]
        if parts:
            torch.stack(parts).sum().backward()
    return {name: float(value) for name, value in loss.metrics.items()}
