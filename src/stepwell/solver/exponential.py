"""The one exponential integrator under all solvers: a table and times become the coefficients of a step.

With lambda = log(alpha / sigma) and h = lambda' - lambda over a step, the probability-flow ODE with a data prediction D
has the exact solution x' = (sigma'/sigma) x + alpha' int_0^h exp(-(h-u)) D(lambda + u) du. A step that draws noise of
standard deviation q keeps r = sqrt(1 - q^2 / sigma'^2) of the old noise; it is the same integral with a steeper kernel:

    x' = (sigma'/sigma) r x + alpha' k int_0^h exp(-k(h-u)) D(lambda + u) du + q z,      z = k h = h - log r.

Interpolating D through the newest predictions turns the integral into weights that depend on times alone. DDIM's eta,
the ancestral step, the reverse SDE's tau and CPS differ only in q; DDIM, DPM-Solver++ and UniPC in the moments of the
kernel; DEIS is the kernel with z = -h for the noise prediction, Euler and Heun the flat one in t for the velocity.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from stepwell.errors import InputError
from stepwell.solver.path import Path
from stepwell.solver.table import Table


@dataclass(frozen=True)
class Coefficients:
    """x' = state x + sum_j weights[j] m_j + noise z, the newest prediction first; `predicts` is the kind of the m_j."""

    state: float
    weights: tuple[float, ...]
    noise: float
    predicts: str

    def mean(self, x: Tensor, predictions: Sequence[Tensor]) -> Tensor:
        moved = x if self.state == 1.0 else self.state * x
        for weight, prediction in zip(self.weights, predictions, strict=True):
            moved = torch.add(moved, prediction, alpha=weight)
        return moved


def moments(count: int, z: float, rule: str = "exact") -> list[float]:
    """M_i = int_0^1 z exp(-z (1 - v)) v^i dv for i < count, or the replacements that a table's rule makes.

    M_0 = 1 - exp(-z) and M_i = 1 - (i / z) M_{i-1}; a series where that would cancel. z is positive for data, and
    negative for noise predictions.
    """
    if abs(z) < 1.0:
        values = [
            z * math.fsum((-z) ** k * math.factorial(i) / math.factorial(i + k + 1) for k in range(20))
            for i in range(count)
        ]
    else:
        values = [-math.expm1(-z)]
        for i in range(1, count):
            values.append(1.0 - i / z * values[-1])
    if count == 2 and rule in ("half", "short-second"):
        values[1] = 0.5 * values[0]
    elif count == 2 and rule == "half-linear":
        values[1] = 0.5 * z
    elif count == 3 and rule == "short-second":
        values[2] *= 0.5
    return values


def interpolation_weights(nodes: Sequence[float], integrals: Sequence[float]) -> list[float]:
    """w with sum_j w_j nodes_j^i = integrals_i: integrates the polynomial through the nodes."""
    if len(nodes) == 1:
        return [integrals[0]]
    weights: list[float] = np.linalg.solve(np.vander(nodes, increasing=True).T, np.asarray(integrals)).tolist()
    return weights


def retention(path: Path, table: Table, time: float, target: float) -> float:
    """r in [0, 1]: the factor of the old noise that a step keeps; the fresh noise has q = sigma' sqrt(1 - r^2)."""
    if table.noise in ("none", "flow", "dance") or not _in_window(table, time):
        return 1.0
    if table.noise == "cps":  # q = sigma' sin(eta pi / 2)
        return math.cos(0.5 * math.pi * table.level)
    decay = _decay(path, time, target)
    if table.noise == "eta":  # q = eta sigma' sqrt(1 - exp(-2h))
        return math.sqrt(1.0 - table.level**2 * (1.0 - decay**2))
    return decay ** (table.level**2)  # tau: q = sigma' sqrt(1 - exp(-2 tau^2 h))


def _in_window(table: Table, time: float) -> bool:
    return table.window[0] <= time <= table.window[1]


def _decay(path: Path, time: float, target: float) -> float:
    """exp(-h), also where lambda is infinite at either end."""
    return path.alpha(time) * path.sigma(target) / (path.sigma(time) * path.alpha(target))


def coefficients(
    path: Path, table: Table, times: Sequence[float], target: float, start: float | None = None
) -> Coefficients:
    """The numbers of the step from `start` to `target`, with predictions at `times`, the newest first.

    `times` has as many entries as the step shall use predictions; the step starts at times[0] unless `start` says
    otherwise. A singlestep solver has its first prediction at times[0] and its inner one at times[1]; a corrector has
    one at the target too, and at the target alone when it uses but one. They depend on numbers alone, so that a grid's
    are computed once and kept.
    """
    return _coefficients(path, table, tuple(times), target, start)


@lru_cache(maxsize=8192)
def _coefficients(
    path: Path, table: Table, times: tuple[float, ...], target: float, start: float | None
) -> Coefficients:
    time, scale = times[0] if start is None else start, path.sigma(target)
    if table.predicts == "velocity":
        return _in_time(path, table, times, target, time)
    if table.conjugate != 0.0 and math.isfinite(path.log_snr(time)):
        return conjugated(path, table.conjugate, time, target)
    retained = retention(path, table, time, target)
    state, noise = scale / path.sigma(time) * retained, scale * math.sqrt(1.0 - retained**2)
    if len(times) == 1:  # order one is the same for data and noise, and data exists at both ends
        weight = path.alpha(target) * (1.0 - _decay(path, time, target) * retained)
        return Coefficients(state, (weight,), noise, "data")
    h = path.log_snr(target) - path.log_snr(time)
    nodes = [(path.log_snr(node) - path.log_snr(time)) / h for node in times]
    if table.predicts == "noise":
        weights = interpolation_weights(nodes, moments(len(times), -h, table.weights))
        return Coefficients(path.alpha(target) / path.alpha(time), tuple(scale * w for w in weights), 0.0, "noise")
    if retained == 0.0:
        raise InputError(
            f"Solver '{table.name}' keeps nothing of the old noise, so its order must be 1, got {len(times)}."
        )
    weights = interpolation_weights(nodes, moments(len(times), h - math.log(retained), table.weights))
    return Coefficients(state, tuple(path.alpha(target) * weight for weight in weights), noise, "data")


NODES = tuple(values.tolist() for values in np.polynomial.legendre.leggauss(24))


def conjugated(path: Path, rate: float, time: float, target: float) -> Coefficients:
    """Lambda-DDIM: Euler's step in exp(rate t) x / alpha, of which DDIM is the case of rate 0.

    Conjugate integrators with B = rate times the identity (Pandey et al. 2024, arXiv 2310.07894). The noise prediction
    is weighted by the integral of exp(rate t) over the noise ratio sigma / alpha: by Gauss-Legendre in log(1 + ratio),
    in which t is smooth up to pure noise.
    """
    start, end = (math.log1p(path.sigma(place) / path.alpha(place)) for place in (time, target))
    integral = 0.0
    for node, weight in zip(*NODES, strict=True):
        place = 0.5 * (start + end) + 0.5 * (end - start) * node
        growth = math.exp(rate * (path.time(-math.log(math.expm1(place))) - target))
        integral += 0.5 * (end - start) * weight * growth * math.exp(place)
    step = target - time
    state = path.alpha(target) / path.alpha(time) * math.exp(-rate * step) * (1.0 + rate * step)
    return Coefficients(state, (path.alpha(target) * integral,), 0.0, "noise")


def _in_time(path: Path, table: Table, times: Sequence[float], target: float, time: float) -> Coefficients:
    """Steps in t with the velocity: Adams and Heun, or stochastic Euler, dx = [v + g^2 / (2 sigma) E] dt + g dW."""
    step = target - time
    if not table.stochastic or not _in_window(table, time):
        nodes = [(node - time) / step for node in times]
        weights = interpolation_weights(nodes, [1.0 / (i + 1) for i in range(len(times))])
        return Coefficients(1.0, tuple(step * weight for weight in weights), 0.0, "velocity")
    if path.name != "linear":
        raise InputError(f"Stochastic Euler is stated for the linear path, not for {path.name}; use ddim-eta there.")
    if table.noise == "flow":
        if time == 1.0 and table.first == "corrected":
            exact = Table(table.name, noise="eta", level=min(table.level, 1.0))
            return coefficients(path, exact, times, target)
        diffusion = table.level**2 * time / (1.0 - (target if time == 1.0 else time))  # g^2
    else:
        diffusion = table.level**2
    pull = diffusion * step / (2.0 * time)  # of E = x + (1 - t) v
    return Coefficients(1.0 + pull, (step + pull * (1.0 - time),), math.sqrt(-diffusion * step), "velocity")
