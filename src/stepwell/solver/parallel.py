"""Steps in parallel: Picard iteration on a sliding window, which ends at the trajectory of one-by-one sampling.

All states of a window are guessed, the model is asked about all of them in one batch, each step is taken from its
guess, and the guesses move to where the steps lead. What no longer changes is done, and the window slides past it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stepwell.distributions import Gaussian
from stepwell.errors import InputError
from stepwell.rng import Rng
from stepwell.solver.exponential import coefficients
from stepwell.solver.grid import check_order
from stepwell.solver.integrate import History, Sampled, propose
from stepwell.solver.path import Path
from stepwell.solver.table import TABLES, Table
from stepwell.solver.wrappers import Predict


@dataclass(frozen=True)
class Parallel:
    """`sampled`, as one-by-one sampling returns it, with its evaluations of N rows in all; `rounds` of the model.

    A round is one call of the model with up to `window` times N rows. One-by-one sampling has as many rounds as
    evaluations.
    """

    sampled: Sampled
    rounds: int

    @property
    def final(self) -> Tensor:
        return self.sampled.final


def sample_parallel(
    predict: Predict,
    x: Tensor,
    path: Path,
    times: Sequence[float],
    table: Table,
    rng: Rng,
    *,
    window: int,
    tolerance: float,
    output: str = "velocity",
    partial: bool = False,
) -> Parallel:
    """All steps of a grid from x (N, *D) at times[0], `window` steps at a time (ParaDiGMS, Shih et al. 2023).

    arXiv 2305.16317, algorithm 1: x_{j+1} <- x_j + (step from the old guess of x_j - the old guess) + noise. The noise
    of a step is drawn once, in the order in which `integrate.sample` draws it. A guess is accepted when, in every row,
    the mean square of its change is at most tolerance^2 times the variance of the ancestral (DDPM) step that leads to
    its time, and all before it are accepted; the step after an accepted one is accepted too. At tolerance 0 the result
    is that of `integrate.sample`, bit for bit if the model's answers do not depend on what else is in the batch. The
    published tolerances lie between 1e-3 and 1e-1.

    `predict` is called with states (M N, *D) and a tensor of times (M N, 1, ..., 1), the N rows at one time after
    those at the time before, so that a condition with a row for each of N is repeated M times. Multistep tables and
    correctors iterate on their histories too. Raises `InputError` for a table with two evaluations a step, and for
    grids that do not end at t = 0 unless `partial`.
    """
    check_order(times)
    if times[-1] != 0.0 and not partial:
        raise InputError(f"times must end at 0, got {times[-1]:.6g}, where noise is left; partial=True allows that.")
    if table.evaluations != 1:
        raise InputError(
            f"table must be a solver of one evaluation a step, got '{table.name}', of {table.evaluations}."
        )
    if window < 1 or not tolerance >= 0.0:
        raise InputError(
            f"window must be at least 1 and tolerance at least 0, got window={window} and tolerance={tolerance}."
        )
    count, steps = len(x), len(times) - 1
    scales = [
        coefficients(path, TABLES["ddpm"], (float(time),), float(target)).noise ** 2
        for time, target in itertools.pairwise(times)
    ]
    states, histories, noise = [x] * (steps + 1), [History()] * (steps + 1), dict[int, Tensor]()
    log_probs, random = [torch.zeros(count)] * steps, [False] * steps
    begin = rounds = evaluations = 0
    while begin < steps:
        end = min(begin + window, steps)
        first, predictions = begin, _ask(predict, states[begin:end], times[begin:end])
        rounds, evaluations = rounds + 1, evaluations + end - begin
        moved, settled = states[begin], True
        for step in range(first, end):
            old, prediction = states[step], predictions[step - first]
            distribution, histories[step + 1] = propose(
                lambda _, __, prediction=prediction: prediction,  # type: ignore[misc]
                old,
                step,
                times,
                path,
                table,
                histories[step],
                output=output,
            )
            reached = distribution.mean if isinstance(distribution, Gaussian) else distribution.value
            if isinstance(distribution, Gaussian):
                if step not in noise:
                    noise[step] = rng.normal(*x.shape, dtype=x.dtype).to(x.device)
                reached = reached + distribution.standard_deviation * noise[step]
            log_probs[step], random[step] = distribution.log_prob(reached), isinstance(distribution, Gaussian)
            # in this order nothing is lost to rounding where the guess was right
            states[step], moved = moved, reached + (moved - old)
            if settled:
                begin = step + 1
                change = (moved - states[step + 1]).flatten(1).square().mean(1).max()
                settled = bool(change <= tolerance**2 * scales[step])
        for step in range(end, min(begin + window, steps) + 1):
            states[step] = moved
    return Parallel(Sampled(tuple(states), torch.stack(log_probs, 1), torch.tensor(random), evaluations), rounds)


def _ask(predict: Predict, states: Sequence[Tensor], times: Sequence[float]) -> list[Tensor]:
    """The model's predictions for M states (N, *D), each at its own time, in one call."""
    together, count = torch.cat(list(states)), len(states[0])
    at = torch.tensor([float(time) for time in times], dtype=together.dtype, device=together.device)
    at = at.repeat_interleave(count).reshape(-1, *[1] * (together.dim() - 1))
    predictions = predict(together, at)
    if predictions.shape != together.shape:
        raise InputError(
            f"The model must return a prediction of its states' shape, {tuple(together.shape)}, got "
            f"{tuple(predictions.shape)}."
        )
    return list(predictions.split(count))
