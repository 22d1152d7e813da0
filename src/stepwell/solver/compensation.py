"""DC-Solver's dynamic compensation: one ratio a step, fitted so that few steps follow a fine reference trajectory.

Zhao et al. 2024 (arXiv 2409.03755). A corrector changes the state but not the prediction made before it; compensation
moves that prediction, along the polynomial in t through the last three, to the time r t + (1 - r) t_previous. The
ratios are part of a `Table` (`compensation`), so that a fitted solver is printed, saved and used like any other one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize_scalar
from torch import Tensor

from stepwell.errors import InputError
from stepwell.rng import Rng
from stepwell.solver import integrate
from stepwell.solver.integrate import COMPENSATED, History, Predict
from stepwell.solver.path import Path
from stepwell.solver.table import Table


def trajectory(
    predict: Predict,
    x: Tensor,
    path: Path,
    times: Sequence[float],
    table: Table,
    substeps: int,
    *,
    output: str = "velocity",
) -> tuple[Tensor, ...]:
    """The states (N, *D) at `times` of a trajectory with `substeps` equal steps in t for each of the grid's."""
    _check(table)
    fine = [
        float(time) + (float(target) - float(time)) * part / substeps
        for time, target in itertools.pairwise(times)
        for part in range(substeps)
    ]
    drawn = integrate.sample(predict, x, path, [*fine, float(times[-1])], table, Rng(0), output=output, partial=True)
    return drawn.states[::substeps]


def fit(
    predict: Predict,
    path: Path,
    times: Sequence[float],
    table: Table,
    reference: Sequence[Tensor],
    *,
    output: str = "velocity",
) -> Table:
    """The table with the compensation that follows the reference's states, one (N, *D) for each of the n + 1 times.

    Step by step, as published: the ratio that brings the next state, corrected where the table corrects, closest to
    the reference's in mean square, given the steps fitted so far; Brent's method stands in for their AdamW. A ratio
    that is no better than 1 is 1. Every trial costs one evaluation of the model where the table has a corrector. Each
    step is fitted for itself, which promises nothing for the last state: compare on seeds that it was not fitted to.
    """
    _check(table)
    if len(reference) != len(times):
        raise InputError(
            f"reference must have {len(times)} states, one for each time of the grid, got {len(reference)}."
        )
    x, history, ratios = reference[0], History(), [1.0] * (len(times) - 1)
    for step in range(len(times) - 1):
        raw = predict(x, float(times[step]))

        def trial(ratio: float, step: int = step, x: Tensor = x, raw: Tensor = raw, past: History = history) -> float:
            solver = table.replace(compensation=(*ratios[:step], float(ratio), *ratios[step + 1 :]))
            target = float(times[step + 1])
            distribution, following = integrate.propose(
                _answering(raw), x, step, times, path, solver, past, output=output
            )
            state = distribution.sample(Rng(0))
            if following.correction is not None:
                newest = path.convert(predict(state, target), state, target, output, following.correction.predicts)
                state = following.corrected(state, newest)
            return float((state - reference[step + 1]).double().square().mean())

        if len(history.times) + 1 >= COMPENSATED:
            best = minimize_scalar(trial, bracket=(1.0, 1.1))
            if best.fun < trial(1.0):
                ratios[step] = float(best.x)
        solver = table.replace(compensation=tuple(ratios))
        distribution, history = integrate.propose(_answering(raw), x, step, times, path, solver, history, output=output)
        x = distribution.sample(Rng(0))
    return table.replace(name=f"{table.name} compensated", compensation=tuple(ratios))


def _answering(raw: Tensor) -> Callable[[Tensor, float], Tensor]:
    """A model whose prediction is known already."""
    return lambda _x, _t: raw


def _check(table: Table) -> None:
    if table.stochastic:
        raise InputError(
            f"table must be a deterministic solver, to follow a reference; got '{table.name}', which draws noise."
        )


@dataclass(frozen=True)
class Regression:
    """Ratios as a polynomial in the step's place, whose coefficients are quadratic in guidance, and those in steps.

    DC-Solver's cascade polynomial regression: ratio = sum_ijk c_ijk (step / n)^i guidance^j n^k with j, k <= 2, so that
    settings which were not fitted get ratios too. It is linear in c (degree + 1, 3, 3): one least-squares problem.
    """

    numbers: tuple[tuple[tuple[float, ...], ...], ...]

    @staticmethod
    def fit(fitted: Mapping[tuple[float, int], Sequence[float]], degree: int) -> Regression:
        """From the compensation (n,) fitted at each (guidance, n), without ratios of exactly 1, which were not fitted.

        Raises `InputError` where they do not determine the coefficients.
        """
        rows, ratios = [], []
        for (guidance, steps), compensation in fitted.items():
            for step, ratio in enumerate(compensation):
                if ratio != 1.0:
                    rows.append(_monomials(step, steps, guidance, degree).ravel())
                    ratios.append(ratio)
        size = 9 * (degree + 1)
        matrix = np.array(rows).reshape(-1, size)
        if np.linalg.matrix_rank(matrix) < size:
            raise InputError(
                f"{len(rows)} fitted ratios do not determine the {size} numbers of a regression of degree {degree}; "
                "give three guidance scales, each at three numbers of steps, and more than `degree` ratios in each."
            )
        solution = np.linalg.lstsq(matrix, np.array(ratios), rcond=None)[0].reshape(degree + 1, 3, 3)
        return Regression(tuple(tuple(map(tuple, plane)) for plane in solution.tolist()))

    def compensation(self, guidance: float, steps: int) -> tuple[float, ...]:
        """A ratio for each step; 1 in the first two, which have nothing to interpolate through."""
        numbers, degree = np.array(self.numbers), len(self.numbers) - 1
        ratios = [float((numbers * _monomials(step, steps, guidance, degree)).sum()) for step in range(steps)]
        return (1.0,) * min(COMPENSATED - 1, steps) + tuple(ratios[COMPENSATED - 1 :])


def _monomials(step: int, steps: int, guidance: float, degree: int) -> np.ndarray:
    """(degree + 1, 3, 3), scaled as published: guidance by 12, the number of steps by 50, steps counted from 1."""
    place = ((step + 1) / steps) ** np.arange(degree + 1)
    return np.einsum("i,j,k->ijk", place, (guidance / 12.0) ** np.arange(3), (steps / 50.0) ** np.arange(3))
