"""One update: the gradient of an objective on a minibatch, however the minibatch has to be cut."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from stepwell.batch import Batch
from stepwell.columns import Columns
from stepwell.objective.term import Coupling, Objective
from stepwell.process.base import Process, Scores
from stepwell.process.batching import token_batches
from stepwell.process.models import Models
from stepwell.training.scoring import score_in_pieces
from stepwell.trajectories import Trajectories


def cut(process: Process, rows: Trajectories, coupling: Coupling, tokens: int | None) -> list[Tensor] | None:
    """Row indices of micro-batches of at most `tokens` padded tokens, or None where coupled rows do not fit one."""
    everything = torch.arange(len(rows))
    if tokens is None:
        return [everything]
    sizes = process.row_sizes(rows)
    if coupling == "rows":
        return token_batches(sizes, tokens)
    group_sizes = rows.prompt.unique(return_counts=True)[1].tolist()
    units = [everything] if coupling == "batch" else rows.prompt.argsort(stable=True).split(group_sizes)
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
    batch: Batch,
    targets: Columns,
    tokens: int | None = None,
    gather: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Add the gradient of the objective on a batch to that of the parameters, and return the metrics.

    The batch, which needs no scores, may be any part of the minibatch that `targets` and its counts come from. Its rows
    are cut so that no forward holds more than `tokens`; neither the loss nor the gradient depends on the cut. Where
    coupled rows do not fit, the loss's gradient in the scores is taken on all rows first, and sent back piece by piece:
    one more forward, exact. `gather` is called after each backward pass, so that an optimiser can add the gradients of
    parameters in half precision up in a finer format.
    """
    pieces = cut(models.policy, batch.rows, objective.coupling, tokens)
    if pieces is None:
        return _through_scores(models, objective, batch, targets, tokens, gather)
    metrics: dict[str, float] = {}
    for piece in pieces:
        rows = batch.rows[piece]
        loss = objective.loss(replace(batch, rows=rows, scores=models.score(rows, objective.needs)), targets[piece])
        if loss.value.requires_grad:  # it does not where no step of these rows is trained: a window that is empty
            loss.value.backward()
            gather()
        for name, value in loss.metrics.items():
            metrics[name] = metrics.get(name, 0.0) + float(value)
    return metrics


def _through_scores(
    models: Models,
    objective: Objective,
    batch: Batch,
    targets: Columns,
    tokens: int | None,
    gather: Callable[[], None],
) -> dict[str, float]:
    """`accumulate` by way of the loss's gradient in the scores of all rows."""
    rows = batch.rows
    numbers = score_in_pieces(models, rows, objective.needs, tokens)
    leaves = Scores(
        numbers.log_prob.requires_grad_(), {name: value.requires_grad_() for name, value in numbers.extra.items()}
    )
    loss = objective.loss(replace(batch, scores=leaves), targets)
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
            gather()
    return {name: float(value) for name, value in loss.metrics.items()}
