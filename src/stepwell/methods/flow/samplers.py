"""Samplers that methods for flows train under: DDPM's noise, flow SDEs and coefficients-preserving steps."""

from __future__ import annotations

from typing import Any

from stepwell.errors import InputError, UnknownName
from stepwell.methods.flow.variants import published


def check_steps(steps: int, random: int = 1) -> None:
    """Raise `InputError` unless there are so many steps before the last, which draws no noise and is never trained."""
    if steps <= random:
        raise InputError(
            f"steps must be at least {random + 1}, got {steps}: this method trains {random} random "
            f"{'step' if random == 1 else 'steps'}, and the last step of a flow is not random."
        )


def ancestral(eta: float, steps: int) -> dict[str, Any]:
    """DDPM's own noise, or less of it (eta of DDIM, arXiv 2010.02502, equation 16)."""
    check_steps(steps)
    return {"solver": "ddpm", "level": eta, "steps": steps}


def flow_sde(level: float, steps: int, variant: str) -> dict[str, Any]:
    """Flow-GRPO's SDE, whose noise is g^2 = level^2 t / (1 - t).

    `corrected` solves its linear part exactly: tau^2 = level^2 / 2, order 1, and the marginals are those of the ODE in
    the limit. `published` is stochastic Euler, whose first step leaves a variance of 1 + level^4 / 4.
    """
    check_steps(steps)
    if published(variant):
        return {"solver": "sde-euler-published", "level": level, "steps": steps}
    return {"solver": "sde-flow", "level": level * 0.5**0.5, "steps": steps}


def preserving(level: float, steps: int, variant: str) -> dict[str, Any]:
    """Coefficients-preserving steps (CPS, arXiv 2509.05952) as published; corrected, DDIM's eta, which converges.

    With noise of level 0.7 and ever more steps CPS leaves 0.7270 of the variance of Gaussian data.
    """
    return {"solver": "cps" if published(variant) else "ddim-eta", "level": level, "steps": steps}


NOISES = {"sde": flow_sde, "cps": preserving}


def noisy(kind: str, level: float, steps: int, variant: str) -> dict[str, Any]:
    """The sampler with a kind of noise; raises `UnknownName` for another kind."""
    if kind not in NOISES:
        raise UnknownName("noise of a flow's steps", kind, NOISES)
    return NOISES[kind](level, steps, variant)
