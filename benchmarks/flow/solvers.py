"""Our side of the comparison: every table without noise on every grid, and schedules found by a search."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from models import Problem
from torch import Tensor

from stepwell import Rng
from stepwell.solver import grid, integrate
from stepwell.solver.path import Path
from stepwell.solver.schedule import Schedule
from stepwell.solver.search.evolution import Space, evolve
from stepwell.solver.search.scores import endpoint_error
from stepwell.solver.table import TABLES, Table


@dataclass(frozen=True)
class Sampler:
    """One sampler: `draw(z)` turns standard normal noise (N, D) into samples."""

    name: str
    draw: Callable[[Tensor], Tensor]
    schedule: Schedule


def tables() -> list[Table]:
    """The list's tables without noise, and others that differ from them in an entry or two."""
    found = [row for row in TABLES.values() if not row.stochastic]
    for order in (2, 3, 4):
        found.append(Table(f"adams-{order}", predicts="velocity", order=order))
        found.append(Table(f"adams-{order} corrected", predicts="velocity", order=order, corrector=True))
    for order in (3, 4):
        found.append(Table(f"unipc-{order} exact", order=order, corrector=True))
    kept = [
        row.replace(name=f"{row.name} to the end", lower_final=False) for row in found if row.predicts == "velocity"
    ]
    names = {row.name for row in found if row.order > 1 and row.inner is None}
    return found + [row for row in kept if row.name.removesuffix(" to the end") in names]


def grids(path: Path, steps: int) -> Iterator[tuple[str, tuple[float, ...]]]:
    """Named grids that a flow takes: they begin where alpha / sigma is at most 0.1, and end at 0."""
    for factor in (0.33, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0):
        yield f"shift {factor}", grid.shifted(steps, path, factor)
    top = path.sigma(1.0) / path.alpha(1.0) if path.alpha(1.0) > 0.0 else math.inf
    for smallest in (0.03, 0.1, 0.2, 0.3):
        for largest in (10.0001, 20.0, 80.0):
            levels = {"smallest": smallest, "largest": min(largest, top)}
            yield f"log {smallest}-{largest:.3g}", grid.log_snr_uniform(steps, path, **levels)
            yield f"karras {smallest}-{largest:.3g}", grid.karras(steps, path, **levels)


def scaled(problem: Problem, z: Tensor, time: float) -> Tensor:
    """Noise as `process.Flow` begins with it: of the variance that data of variance one has at this time."""
    return math.hypot(problem.path.alpha(time), problem.path.sigma(time)) * z


def entries(problem: Problem, evaluations: int) -> Iterator[Sampler]:
    """Every table on every grid, with as many steps as the evaluations allow."""
    for table in tables():
        most = evaluations // table.evaluations + 1
        for steps in range(most, 1, -1):
            found = [
                Sampler(f"{table.name}, {name}", _sampler(problem, times, table), Schedule.of(times, table))
                for name, times in grids(problem.path, steps)
                if _evaluations(problem.path, table, times) <= evaluations
            ]
            if found:
                yield from found
                break


def _evaluations(path: Path, table: Table, times: Sequence[float]) -> int:
    """Evaluations that `integrate` will make: no inner prediction where lambda is infinite at either end."""
    steps = len(times) - 1
    if table.inner is None:
        return steps
    infinite = table.predicts != "velocity" and math.isinf(path.log_snr(times[0]))
    return 2 * steps - 1 - infinite


def _sampler(problem: Problem, times: Sequence[float], table: Table) -> Callable[[Tensor], Tensor]:
    def draw(z: Tensor) -> Tensor:
        x = scaled(problem, z, times[0])
        return integrate.sample(problem.data, x, problem.path, times, table, Rng(0), output="data").final

    return draw


def searched(
    problem: Problem, z: Tensor, exact: Tensor, best: Sequence[Sampler], generations: int = 8, population: int = 40
) -> Sampler:
    """The sampler that an evolution finds from noise z (N, D) with samples `exact`, beginning at the best named ones.

    It chooses a table for each step and the times, among those of the best grids that begin at the same time, and of a
    fine one.
    """
    first = best[0].schedule
    allies = [entry.schedule for entry in best if entry.schedule.steps == first.steps]
    allies = [schedule for schedule in allies if schedule.times[0] == first.times[0]]
    chosen = list(dict.fromkeys(table for schedule in allies for table in schedule.tables))
    top, bottom = (math.log(problem.path.sigma(t) / max(problem.path.alpha(t), 1e-2)) for t in (0.999, first.times[-2]))
    fine = [problem.path.time(-(top + (bottom - 0.7 - top) * place / 40)) for place in range(41)]
    known = {time for schedule in allies for time in schedule.times}
    kept = [first.times[0]]
    for time in sorted(known | set(fine), reverse=True):  # an interpolation through times that almost agree is singular
        alone = all(abs(time - other) > 0.01 * time for other in (*known, kept[-1]))
        if time < first.times[0] and (time in known or alone):
            kept.append(time)
    times = tuple(kept)
    space = Space(times, first.steps, tuple(chosen))
    score = endpoint_error(problem.data, problem.path, scaled(problem, z, times[0]), exact, output="data")
    settings = {"population": population, "mutated": population // 2, "crossed": population // 4}
    found = evolve(space, score, Rng(3), generations=generations, parents=8, start=allies, **settings)

    def draw(noise: Tensor) -> Tensor:
        x = scaled(problem, noise, times[0])
        return found.schedule.sample(problem.data, x, problem.path, Rng(0), output="data").final

    names = list(dict.fromkeys(table.name for table in found.schedule.tables))
    return Sampler(f"searched: {', '.join(names)}", draw, found.schedule)
