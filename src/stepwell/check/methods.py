"""The laws of methods, checked by registration alone: no number depends on the layout or the cuts of a batch."""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType

import torch
from torch import Tensor

from stepwell.batch import Batch
from stepwell.check.benches import FLOW_PROMPTS, FLOW_REWARDS, bench
from stepwell.check.oracles.provable import Provable
from stepwell.check.oracles.registry import oracle
from stepwell.check.surrogates import slope_at_one, surrogate
from stepwell.errors import InputError, LawBroken, StepwellError
from stepwell.meter import Meter
from stepwell.objective.surrogate import Surrogate
from stepwell.parts import parts_of
from stepwell.process.models import Models
from stepwell.recipe.card import Card
from stepwell.recipe.recipe import Recipe
from stepwell.recipe.source import unread
from stepwell.reward.differentiable import Judge
from stepwell.rng import Rng
from stepwell.training.scoring import score_in_pieces
from stepwell.training.update import accumulate
from stepwell.trajectories import Trajectories, count, pad_steps

__all__ = ["bench", "check_method", "gradient"]

TOLERANCE = 1e-9
"""The largest deviation allowed, in float64: sums of a few hundred terms of order one, in another order."""


def gradient(
    models: Models,
    recipe: Recipe,
    rows: Trajectories,
    pieces: list[Tensor] | None = None,
    tokens: int | None = None,
) -> Tensor:
    """The flat gradient of one update on these rows, computed piece by piece with global counts and one plan."""
    objective, counts = recipe.whole, count(rows, models.policy.horizon)
    states = {name: state.initial for name, state in objective.states.items()}
    judge = Judge(FLOW_REWARDS, FLOW_PROMPTS, Meter())
    scores = None
    if objective.plans_on_scores:
        scores = score_in_pieces(models, rows, sorted(objective.present - {"log_prob"}), None)
    targets = objective.credit(Batch(rows, counts, None, states))
    targets = objective.plan(Batch(rows, counts, scores, states), targets)
    parameters = [p for p in models.policy.module.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.grad = None
    for piece in pieces or [torch.arange(len(rows))]:
        accumulate(models, objective, Batch(rows[piece], counts, None, states, judge), targets[piece], tokens)
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    return torch.cat([part.reshape(-1) for part in parts])


def check_method(card: Provable, tolerance: float = TOLERANCE) -> MappingProxyType[str, float]:
    """Hold a method to its laws: a mapping from each law to the largest deviation found.

    `padding`, `permutation`, `micro-batches` (as small as they get) and `ranks` (two that sum their gradients) leave
    the gradient as it is, on rows that the method's own planner asked for; the gradient is not zero; each surrogate
    has its slope at ratio 1 (`surrogate`); an option that the method does not have is refused (`unknown option`); and
    every oracle that the card names as its proof holds. Raises `LawBroken` for the first law that does not hold, and
    `InputError` for a method that cannot be checked, or that has an option which its function never reads.
    """
    recipe = card.recipe()
    idle = unread(card.build) if isinstance(card, Card) else []
    if idle:
        raise InputError(f"Option '{idle[0]}' of method '{card.id}' must be used: its function never reads it.")
    models, rows = bench(recipe, card.processes[0])
    whole = gradient(models, recipe, rows)
    size = float(whole.norm())
    if not size > 0 or not bool(whole.isfinite().all()):
        raise LawBroken(f"The method '{card.id}' has a gradient of norm {size} on a batch that is not degenerate.")
    order = Rng(11).permutation(len(rows))
    ranks = [(rows.prompt % 2 == parity).nonzero()[:, 0] for parity in (0, 1)]
    laws: dict[str, Callable[[], Tensor]] = {
        "padding": lambda: gradient(models, recipe, pad_steps(rows, rows.mask.shape[1] + 3)),
        "permutation": lambda: gradient(models, recipe, rows[order]),
        "micro-batches": lambda: gradient(models, recipe, rows, tokens=1),
        "ranks": lambda: gradient(models, recipe, rows, ranks),
    }
    report = {law: float((changed() - whole).abs().max()) for law, changed in laws.items()}
    for part in parts_of(recipe.whole.terms):
        if isinstance(part, Surrogate):
            report["surrogate"] = max(report.get("surrogate", 0.0), _slope(card, part, models, rows))
    report |= {f"oracle {name}": oracle(name)(card) for name in card.proof}
    for law, error in report.items():
        if not error <= tolerance:
            raise LawBroken(
                f"The method '{card.id}' breaks the law '{law}' by {error:.1e}, where at most {tolerance:g} is allowed."
            )
    try:
        card.recipe(**{"an_option_nobody_has": 1})
    except (StepwellError, TypeError):
        report["unknown option"] = 0.0
    else:
        raise LawBroken(f"The method '{card.id}' accepts an option that it does not have.")
    return MappingProxyType(report)


def _slope(card: Provable, part: Surrogate, models: Models, rows: Trajectories) -> float:
    """The deviation of a surrogate of the method from its slope; on a table's rows where the method's draw no noise."""
    try:
        return slope_at_one(part, models, rows) if bool(rows.mask.any()) else surrogate(part)
    except LawBroken as broken:
        raise LawBroken(f"In the method '{card.id}': {broken}") from broken
