"""Scores of a rollout before its updates: the fields that credit and losses read, a few rows at a time."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from stepwell.batch import Read
from stepwell.columns import Columns
from stepwell.process.abilities import Segmented, ability
from stepwell.process.base import AT_POINTS, Scores
from stepwell.process.batching import token_batches
from stepwell.process.models import Models, Role
from stepwell.training.distribute import World
from stepwell.trajectories import FIELDS, Trajectories

ROLES: tuple[Role, ...] = ("policy", "reference", "teacher")
FINAL_VALUE = Read("policy", "final_value")
VALUE = Read("policy", "value")
OPTIONAL = {"turn"}
"""Notes that a part uses where they are there, and does not need: `objective.ratio.Ratio` at the level of turns."""


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


def score_everywhere(
    models: Models, rows: Trajectories, needs: Collection[str], tokens: int | None, world: World
) -> Scores:
    """Scores of all rows as numbers, each computed by one rank and known to all."""
    others = sorted(set(needs) - {"log_prob"})

    def scored(index: Tensor) -> dict[str, Tensor]:
        scores = score_in_pieces(models, rows[index], others, tokens)
        return {"log_prob": scores.log_prob, **scores.extra}

    numbers = world.map_rows(len(rows), scored)
    return Scores(numbers.pop("log_prob"), numbers)


def with_declared_notes(rows: Trajectories, reads: Collection[Read]) -> Trajectories:
    """The rows without the notes that no part has declared, so that a part which reads one of them is told so."""
    names = {read.name for read in reads if read.of == "rows"} | OPTIONAL
    entries = {} if rows.info is None else {name: note for name, note in rows.info.items() if name in names}
    return rows.replace(info=Columns(entries, len(rows)) if entries else None)


def fill(
    models: Models, rows: Trajectories, reads: Collection[Read], *, tokens: int | None, world: World | None = None
) -> Trajectories:
    """The rows with the scores that `reads` name, under the parameters before the update.

    Each model scores the rows once for all that is read of it. Fields of the rows are filled; other scores go into
    `rows.info`, or into `rows.points` where they belong to points that a term drew. A read of the rows is left alone:
    notes of planners are there already, and `segment` is asked of the process if it is not.

    Where the policy's `value` is read, rows were truncated, and the policy offers it, `final_value` is filled too: the
    value of the last state of truncated rows, 0 for the others.
    """
    if Read("rows", "segment") in reads and rows.segment is None:
        segmented = ability(models.policy, Segmented, "A method that goes by sentences")
        rows = rows.replace(segment=segmented.segments(rows))
    drawn = () if rows.points is None else rows.points.keys()
    wanted = {read for read in reads if read.of != "rows" and read.name not in drawn}
    if VALUE in wanted and "final_value" in models.policy.offers and bool(rows.truncated.any()):
        wanted.add(FINAL_VALUE)
    if not wanted:
        return rows
    by_role = {role: sorted(read for read in wanted if read.of == role) for role in ROLES}
    scorers = {role: models if role == "policy" else Models(models.of(role)) for role in ROLES if by_role[role]}

    def scored(index: Tensor) -> dict[str, Tensor]:
        numbers: dict[str, Tensor] = {}
        for role, scorer in scorers.items():
            needs = sorted({read.need for read in by_role[role]} - {"log_prob"})
            scores = score_in_pieces(scorer, rows[index], needs, tokens)
            numbers |= {read.name: scores[read.need] for read in by_role[role]}
        return numbers

    numbers = (world or World()).map_rows(len(rows), scored)
    if FINAL_VALUE in wanted:
        numbers["final_value"] = torch.where(rows.truncated, numbers["final_value"], 0.0)
    fields = {name: value for name, value in numbers.items() if name in FIELDS}
    others = [read for read in sorted(wanted) if read.name not in FIELDS]
    points = {read.name: numbers[read.name] for read in others if read.need in AT_POINTS}
    info = {read.name: numbers[read.name] for read in others if read.need not in AT_POINTS}
    tables = {"info": _with(rows.info, info, len(rows)), "points": _with(rows.points, points, len(rows))}
    return rows.replace(**fields, **tables)


def _with(table: Columns | None, entries: dict[str, Tensor], rows: int) -> Columns | None:
    """The table with further entries; None where there is nothing in it."""
    if not entries:
        return table
    return Columns(entries, rows) if table is None else table.replace(**entries)
