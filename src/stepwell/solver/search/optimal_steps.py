"""Optimal steps: the few of many times at which a solver stays closest to its own fine trajectory."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from stepwell.distributions import Point
from stepwell.errors import InputError
from stepwell.rng import Rng
from stepwell.solver.grid import check_order
from stepwell.solver.integrate import Predict, propose, sample
from stepwell.solver.path import Path
from stepwell.solver.schedule import Schedule
from stepwell.solver.search.scores import Searched
from stepwell.solver.table import TABLES, Table


def optimal_steps(
    predict: Predict,
    x: Tensor,
    path: Path,
    times: Sequence[float],
    steps: int,
    table: Table | None = None,
    *,
    teacher: Sequence[Tensor] | None = None,
    output: str = "velocity",
) -> Searched:
    """`steps` steps through some of `times`, first and last included, that end near the teacher's (N, *D) last state.

    Optimal stepsize (Pei et al. 2025, arXiv 2503.21774): by dynamic programming, the state reached at times[j] in k
    steps is the one step from a state reached in k - 1 that comes nearest to the teacher's state at times[j]. One grid
    is found for all rows of x (N, *D), which are states at times[0]; the published code finds one for each row and
    takes the median. The teacher is the same table on all of `times`, unless its states are given, one for each time.

    Only one state is kept for each j and k, the nearest, so that the result is the best grid where being nearer now
    means being nearer later: in one dimension, where the errors have one sign, as Euler's on Gaussian data. In general
    it is not. `exhaust` finds the best of few.

    `score` is the root mean square error of the final state, and is that of the schedule; `spent` the evaluations of
    the model on N rows, at most one for each k and j of a one-evaluation table, the teacher's not counted.
    Raises `InputError` for tables that draw noise or remember earlier steps, whose step is not a function of a state.
    """
    table = table or TABLES["euler"]
    check_order(times)
    last = len(times) - 1
    if not 1 <= steps <= last:
        raise InputError(f"steps must be 1 to {last}, between {last + 1} times, got {steps}.")
    if table.stochastic or table.remembers:
        raise InputError(
            f"table must be a solver whose step depends on the state alone, such as euler or dpmpp-1, got "
            f"'{table.name}', which draws noise or remembers earlier steps."
        )
    if teacher is None:
        teacher = sample(predict, x, path, times, table, Rng(0), output=output, partial=True).states
    if len(teacher) != len(times):
        raise InputError(f"teacher must have {len(times)} states, one for each time, got {len(teacher)}.")
    spent = 0

    def step(state: Tensor, begin: int, ends: range) -> list[tuple[int, Tensor, float]]:
        """The states after one step from times[begin] to each end, with their mean square distance to the teacher."""
        nonlocal spent
        first, reached = predict(state, times[begin]), []
        spent += 1

        def predicted(at: Tensor, time: float) -> Tensor:
            nonlocal spent
            if time == times[begin]:
                return first
            spent += 1
            return predict(at, time)

        for end in ends:
            point, _ = propose(predicted, state, 0, (times[begin], times[end]), path, table, output=output)
            assert isinstance(point, Point)
            reached.append((end, point.value, float((point.value - teacher[end]).square().mean())))
        return reached

    nearest: dict[int, tuple[float, Tensor, tuple[int, ...]]] = {0: (0.0, x, (0,))}
    for taken in range(1, steps + 1):
        ends = range(last, last + 1) if taken == steps else range(taken, last - (steps - taken) + 1)
        reached: dict[int, tuple[float, Tensor, tuple[int, ...]]] = {}
        for begin, (_, state, route) in nearest.items():
            for end, value, error in step(state, begin, range(max(ends.start, begin + 1), ends.stop)):
                if end not in reached or error < reached[end][0]:
                    reached[end] = (error, value, (*route, end))
        nearest = reached
    error, _, route = nearest[last]
    name = f"{table.name}, {steps} optimal steps"
    schedule = Schedule(name, tuple(times[place] for place in route), (table,) * steps, "Pei et al. 2025, 2503.21774")
    return Searched(schedule, error**0.5, spent)
