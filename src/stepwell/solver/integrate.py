"""Steps and trajectories: the distribution of the next state, given the model's predictions so far.

The coefficients come from `exponential.coefficients`; here they are applied to predictions, corrector and history.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from stepwell.distributions import Gaussian, Point
from stepwell.errors import InputError
from stepwell.rng import Rng
from stepwell.solver.exponential import Coefficients, coefficients, interpolation_weights
from stepwell.solver.grid import check_order
from stepwell.solver.path import Path
from stepwell.solver.table import Table

Predict = Callable[[Tensor, float], Tensor]
"""The model: (x (N, *D), t) -> its prediction (N, *D)."""


@dataclass(frozen=True)
class History:
    """The memory of a solver: earlier predictions, the newest first, and the step that led here, for its corrector.

    That step is corrected by its own `correction`, so that a table may change from one step to the next. Where it drew
    noise, `mean` is kept too: the corrected state has the same noise around the corrected mean, hence is a function of
    the state and the history, and the next state is Gaussian still. `history[index]` forks along with the rows of a
    state.
    """

    times: tuple[float, ...] = ()
    predictions: tuple[Tensor, ...] = ()  # (N, *D) each, of the table's kind
    origin: Tensor | None = None  # (N, *D) where the last step began
    used: int = 0  # predictions that its correction uses besides the new one
    mean: Tensor | None = None  # (N, *D) the mean that the last step drew its noise around
    correction: Coefficients | None = None

    def __getitem__(self, index: Any) -> History:
        predictions = tuple(prediction[index] for prediction in self.predictions)
        origin, mean = (None if tensor is None else tensor[index] for tensor in (self.origin, self.mean))
        return History(self.times, predictions, origin, self.used, mean, self.correction)

    def corrected(self, x: Tensor, newest: Tensor) -> Tensor:
        """The state x (N, *D) that the last step led to, given the prediction there; x itself without a corrector."""
        if self.correction is None or self.origin is None:
            return x
        mean = self.correction.mean(self.origin, (newest, *self.predictions[: self.used]))
        return mean if self.mean is None else x + (mean - self.mean)


def propose(
    predict: Predict,
    x: Tensor,
    step: int,
    times: Sequence[float],
    path: Path,
    table: Table,
    history: History | None = None,
    *,
    output: str = "velocity",
) -> tuple[Gaussian | Point, History]:
    """The distribution of the state at times[step + 1], given x (N, *D) at times[step], and the history after it.

    `output` is the kind of prediction that `predict` returns (`path.PREDICTIONS`). A deterministic step is a `Point`;
    a stochastic one is exactly Gaussian given x and the history. The model is called `table.evaluations` times, or
    once where the step can use one prediction only. Raises `InputError` for a prediction of another shape than x or
    with NaNs.
    """
    history = history or History()
    time, target = float(times[step]), float(times[step + 1])
    raw = _checked(predict(x, time), x, time)
    kind = table.predicts
    finite = math.isfinite(path.log_snr(time)) if kind != "velocity" else True
    if not finite and kind == "noise":  # of no use for interpolation; order one takes the data
        current = raw
    else:
        current = path.convert(raw, x, time, output, kind)
    if history.correction is not None:
        wanted = history.correction.predicts
        x = history.corrected(x, current if wanted == kind else path.convert(raw, x, time, output, wanted))
    nodes, predictions = (time, *history.times), (current, *history.predictions)
    if table.compensation:
        current = _compensated(table, step, len(times) - 1, nodes, predictions)
        predictions = (current, *history.predictions)
    order = _order(path, table, target, step, len(times) - 1, nodes)
    if table.inner is not None and order == 2:
        mean = _singlestep(predict, x, current, time, target, path, table, output)
        return Point(mean), History()
    numbers = coefficients(path, table, nodes[:order], target)
    newest = current if numbers.predicts == kind else path.convert(raw, x, time, output, numbers.predicts)
    mean = numbers.mean(x, (newest, *predictions[1:order]))
    distribution = Gaussian(mean, mean.new_tensor(numbers.noise)) if numbers.noise > 0.0 else Point(mean)
    if not finite:
        return distribution, History()
    kept = History(nodes[: table.memory], predictions[: table.memory])
    if not table.corrector or target == 0.0:  # there is no prediction at t = 0 to correct with
        return distribution, kept
    used = _corrector_order(table, order, step, len(times) - 1, nodes) - 1
    correction = coefficients(path, table, (target, *nodes[:used]), target, time)
    return distribution, replace(
        kept, origin=x, used=used, mean=mean if numbers.noise > 0.0 else None, correction=correction
    )


def _checked(prediction: Tensor, x: Tensor, time: float) -> Tensor:
    if prediction.shape != x.shape:
        raise InputError(
            f"The model must return a prediction of its states' shape, {tuple(x.shape)}, got {tuple(prediction.shape)}."
        )
    # a sum of finite numbers is finite but for overflow, and takes a fifth of the time
    if not math.isfinite(float(prediction.detach().sum())) and not bool(torch.isfinite(prediction).all()):
        raise InputError(f"The model's prediction at t = {time:.6g} has values that are NaN or infinite.")
    return prediction


COMPENSATED = 3
"""The number of predictions that DC-Solver interpolates through: its dc_order of 2, and one."""


def _compensated(table: Table, step: int, steps: int, times: Sequence[float], predictions: Sequence[Tensor]) -> Tensor:
    """The newest prediction, moved along the polynomial in t through the last three, to r t + (1 - r) t_previous.

    DC-Solver's dynamic compensation (arXiv 2409.03755, as in its published code). Ratio 1, and steps with a shorter
    history, leave it as it is.
    """
    if len(table.compensation) != steps:
        raise InputError(
            f"The compensation of solver '{table.name}' must have {steps} entries, one for each step of the grid, got "
            f"{len(table.compensation)}."
        )
    ratio = table.compensation[step]
    if ratio == 1.0 or len(times) < COMPENSATED:
        return predictions[0]
    nodes = [(time - times[0]) / (times[1] - times[0]) for time in times[:COMPENSATED]]
    weights = interpolation_weights(nodes, [(1.0 - ratio) ** power for power in range(COMPENSATED)])
    moved = weights[0] * predictions[0]
    for weight, prediction in zip(weights[1:], predictions[1:COMPENSATED], strict=True):
        moved = moved + weight * prediction
    return moved


def _order(path: Path, table: Table, target: float, step: int, steps: int, nodes: Sequence[float]) -> int:
    """The number of predictions that the step can use: one where lambda is infinite at either end."""
    wanted = table.order
    if table.lower_final and table.inner is None:
        wanted = min(wanted, steps - step)
    if target == 0.0 and (table.predicts != "velocity" or table.inner is not None):
        return 1
    if table.predicts != "velocity" and not math.isfinite(path.log_snr(nodes[0])):
        return 1
    return wanted if table.inner is not None else min(wanted, len(nodes))


def _corrector_order(table: Table, order: int, step: int, steps: int, nodes: Sequence[float]) -> int:
    """The number of predictions that the corrector of this step will use, the coming one included."""
    if table.corrector_order is None:
        return order + 1
    wanted = table.corrector_order
    if table.lower_final:
        wanted = min(wanted, steps - step + 1)
    return min(wanted, len(nodes) + 1)


def _singlestep(
    predict: Predict, x: Tensor, current: Tensor, time: float, target: float, path: Path, table: Table, output: str
) -> Tensor:
    """A step with a second prediction inside, at the table's fraction of it in lambda, or in t for velocity."""
    assert table.inner is not None
    if table.inner == 1.0:
        inner = target
    elif table.predicts == "velocity":
        inner = time + table.inner * (target - time)
    else:
        start, end = path.log_snr(time), path.log_snr(target)
        inner = path.time(start + table.inner * (end - start))
    numbers = coefficients(path, table, (time,), inner)
    newest = current if numbers.predicts == table.predicts else path.convert(current, x, time, table.predicts, "data")
    between = numbers.mean(x, (newest,))
    second = path.convert(_checked(predict(between, inner), x, inner), between, inner, output, table.predicts)
    return coefficients(path, table, (time, inner), target).mean(x, (current, second))


@dataclass(frozen=True)
class Sampled:
    """The result of `sample`: n + 1 states (N, *D), log_prob (N, n), random (n,) bool, evaluations of the model."""

    states: tuple[Tensor, ...]
    log_prob: Tensor
    random: Tensor
    evaluations: int

    @property
    def final(self) -> Tensor:
        return self.states[-1]


def sample(
    predict: Predict,
    x: Tensor,
    path: Path,
    times: Sequence[float],
    table: Table,
    rng: Rng,
    *,
    output: str = "velocity",
    history: History | None = None,
    partial: bool = False,
) -> Sampled:
    """All steps of a grid, from x (N, *D) at times[0]; a step's log-density is the sum over its dimensions.

    `partial=True` allows grids that do not end at t = 0. At t = 1, x is noise of standard deviation sigma(1).

    Example:
        >>> from stepwell.solver import grid
        >>> from stepwell.solver.path import Linear
        >>> from stepwell.solver.table import table
        >>> one, noise = torch.ones(2, 1), torch.zeros(2, 1)
        >>> times = grid.uniform(4, Linear())
        >>> drawn = sample(lambda x, t: one, noise, Linear(), times, table("heun"), Rng(0), output="data")
        >>> drawn.final[:, 0].tolist(), drawn.evaluations
        ([1.0, 1.0], 7)
    """
    check_order(times)
    if times[-1] != 0.0 and not partial:
        raise InputError(f"times must end at 0, got {times[-1]:.6g}, where noise is left; partial=True allows that.")

    def proposed(
        counted: Predict, state: Tensor, step: int, memory: History | None
    ) -> tuple[Gaussian | Point, History]:
        return propose(counted, state, step, times, path, table, memory, output=output)

    return walk(proposed, predict, x, len(times) - 1, rng, history)


def walk(
    proposed: Callable[[Predict, Tensor, int, Any], tuple[Gaussian | Point, Any]],
    predict: Predict,
    x: Tensor,
    steps: int,
    rng: Rng,
    memory: Any = None,
) -> Sampled:
    """All steps from x (N, *D): `proposed(predict, state, step, memory)` is a step's distribution and the memory after
    it."""
    calls = 0

    def counted(state: Tensor, time: float) -> Tensor:
        nonlocal calls
        calls += 1
        return predict(state, time)

    states, log_probs, random = [x], [], []
    for step in range(steps):
        distribution, memory = proposed(counted, states[-1], step, memory)
        states.append(distribution.sample(rng))
        log_probs.append(distribution.log_prob(states[-1]))
        random.append(isinstance(distribution, Gaussian))
    return Sampled(tuple(states), torch.stack(log_probs, 1), torch.tensor(random), calls)
