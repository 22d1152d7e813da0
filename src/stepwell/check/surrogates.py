"""The law of surrogates: the slope of a loss at ratio 1, for advantages of either sign."""

from __future__ import annotations

import torch

from stepwell.batch import Batch
from stepwell.check.benches import bench
from stepwell.errors import InputError, LawBroken
from stepwell.objective.policy import Policy
from stepwell.objective.state import Coefficient
from stepwell.objective.surrogate import Surrogate
from stepwell.parts import parts_of
from stepwell.process.base import Scores
from stepwell.process.models import Models
from stepwell.recipe.recipe import Recipe
from stepwell.rng import Rng
from stepwell.trajectories import Trajectories, count

TOLERANCE = 1e-12


def surrogate(part: Surrogate) -> float:
    """Hold a surrogate to its slope: while the policy is the old one, d loss / d log pi is -A, whatever A's sign.

    Then the first update follows the policy gradient. A surrogate that declares another slope g (`Surrogate.slope`) is
    held to -g A. The slope is taken by autograd in float64 at every step of a batch of ratio 1. Returns the largest
    deviation; raises `LawBroken` where it is not rounding alone, and for a loss that is not finite.

    Example:
        >>> from stepwell.objective.surrogate import Clip
        >>> surrogate(Clip(0.2, 0.28))
        0.0
    """
    if not isinstance(part, Surrogate):
        raise InputError(f"part must be a Surrogate, such as Clip(), got {part!r:.60}.")
    return slope_at_one(part, *bench(Recipe(Policy(surrogate=part))))


def slope_at_one(part: Surrogate, models: Models, rows: Trajectories) -> float:
    """The largest deviation of a surrogate's slope on these rows, as if the present policy had drawn them."""
    with torch.no_grad():
        scores = models.score(rows, sorted(part.needs | part.present))
    log_prob = scores.log_prob.clone().requires_grad_()
    rows = rows.replace(log_prob=scores.log_prob, old_log_prob=scores.log_prob)
    states = {piece.name: piece.initial for piece in parts_of(part) if isinstance(piece, Coefficient)}
    batch = Batch(rows, count(rows), Scores(log_prob, scores.extra), states)
    advantage = Rng(15).normal(*rows.mask.shape, dtype=scores.log_prob.dtype)
    name, worst = type(part).__name__, 0.0
    loss = part(log_prob - scores.log_prob, advantage, batch)
    if loss.shape != rows.mask.shape or not bool(loss[rows.mask].isfinite().all()):
        raise LawBroken(
            f"The law 'surrogate' is broken: the loss of {name} is not one finite number a step at ratio 1."
        )
    found = torch.zeros_like(log_prob)
    if loss.requires_grad:
        (found,) = torch.autograd.grad(loss[rows.mask].sum(), log_prob)
    wanted = -part.slope(batch).detach() * advantage
    for sign, words in ((1, "above 0"), (-1, "below 0")):
        chosen = rows.mask & (advantage.sign() == sign)
        gaps = (found - wanted)[chosen].abs()
        gap = float(gaps.max())
        if not gap <= TOLERANCE:
            place = int(gaps.argmax())  # the first NaN, where there is one
            pair = f"{float(found[chosen][place]):.6g}, where {float(wanted[chosen][place]):.6g} is right"
            raise LawBroken(
                f"The law 'surrogate' is broken: at ratio 1 and an advantage {words} the slope of {name} is {pair}."
            )
        worst = max(worst, gap)
    return worst
