"""Corrected and published variants: the losses that methods for flows share, and the faults of the published ones."""

from __future__ import annotations

from typing import Any

from stepwell.errors import UnknownName
from stepwell.objective.flow.gaussian import PerDimension, PerDimensionRatio, StepSize
from stepwell.objective.policy import Policy
from stepwell.objective.ratio import Ratio
from stepwell.objective.regularise import Divergence, Regulariser
from stepwell.objective.surrogate import Clip
from stepwell.objective.term import Objective, Term
from stepwell.parts import Part

VARIANTS = ("corrected", "published")
RATIO = (
    "the ratio is of log-densities averaged over the D dimensions, whose mean is exp(-K/D + K/D^2) and not 1: 0.779 "
    "for a step of divergence K = 1 in D = 2"
)
FIRST = "the first step leaves a variance of 1 + level^4 / 4, 1.060 at level 0.7, however many steps there are"
KL = "the penalty is |dt| / D of the step's divergence, 0.05 of it for ten steps in two dimensions"
WINDOW = "with 25 random steps, 75 of 650 rollouts train one to three steps and 25 train none"
CPS = "noise='cps' leaves 0.7270 of the variance of Gaussian data at level 0.7 as steps grow; corrected, DDIM's eta"
"""Faults of published variants, in figures that tests/check/oracles/test_flow_figures.py and tests/solver measure."""


def published(variant: str) -> bool:
    """True for the method as published, with the faults that its card names; raises `UnknownName` for a third way."""
    if variant not in VARIANTS:
        raise UnknownName("variant", variant, VARIANTS)
    return variant == "published"


def clipped(variant: str, clip: float | None, credit: Part, **parts: Any) -> Policy:
    """A clipped policy loss on steps: the ratio of densities, or as published of their mean logarithms over D."""
    if published(variant):
        bound = 1e-4 if clip is None else clip
        return Policy(credit, PerDimensionRatio(), Clip(bound, bound), **parts)
    bound = 0.2 if clip is None else clip
    return Policy(credit, Ratio(), Clip(bound, bound), **parts)


def near(policy: Term, kl: float, variant: str) -> Term | Objective:
    """The policy term with the exact divergence of each step from the reference's; as published, times |dt| over D."""
    if not kl:
        return policy
    quantity = Divergence("exact") * StepSize() * PerDimension() if published(variant) else Divergence("exact")
    return Objective((policy, Regulariser(quantity, kl)))
