"""Solvers, their overhead, windows and batched scoring of flows, compared with diffusers' schedulers, in one run.

The last line is JSON: each ratio is the peer's error or time over ours, above 1 means ours is better.

`error_5` ... `error_20` are errors of samples at that many evaluations of the model: the root mean square distance,
over samples and dimensions, to the exact end of the probability-flow ODE from the same noise. The model is an exact
denoiser of a mixture in 16 dimensions, on the linear path and on a variance-preserving one; the ratio is that of the
path that is **worse for us**. The peers are all of diffusers' schedulers that draw no noise, in every setting they
offer (`schedulers`), evaluated at exactly the noise level they believe to be at. Ours are the tables without noise on
named grids, and a schedule that an evolution found from the best of those (`solvers`). Each side's sampler is chosen on
one set of noises, and its error on another is reported. A scheduler that begins just below the end of the path is
compared with the exact solution from there. The table also shows our best without the search, the best of their
schedulers on our best grids, and the same comparison on a network trained here.

`overhead` is time a step without the model, `window` a training step on 10 steps against one on 3 of them, `replay`
scoring steps with their gradient one at a time against all at once; the last two are ours against ours.
"""

from __future__ import annotations

import json
import math
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import costs
import schedulers
import solvers
import torch
from models import Problem, digits, mixture
from rich.console import Console
from rich.table import Table as Grid
from torch import Tensor

from stepwell.solver.path import Linear, path

COUNTS = (5, 8, 10, 20)
NEAR_THE_END = 0.99
SHOWN = 5
KEPT = 20
"""The best samplers on the mixture, which are tried on the network."""


@dataclass(frozen=True)
class SamplerError:
    """A sampler's error on the noises it was chosen on, and on others."""

    name: str
    chosen_on: float
    error: float = math.nan


@dataclass
class Noises:
    """One set of noises and the exact samples from them, by the time a sampler starts at."""

    problem: Problem
    z: Tensor
    exact: dict[float, Tensor] = field(default_factory=dict)

    def error(self, samples: Tensor, start: float = 1.0) -> float:
        time = start if NEAR_THE_END <= start < 1.0 else 1.0
        key = round(time, 5)
        if key not in self.exact:
            self.exact[key] = self.problem.exact(self.z, time)
        return float((samples.double() - self.exact[key]).square().mean().sqrt())


@dataclass(frozen=True)
class BothSides:
    """At one number of evaluations: the best of each side and the names, both by rank, and the best crossed sampler."""

    theirs: list[SamplerError]
    ours: list[SamplerError]
    crossed: SamplerError | None
    names: dict[str, list[str]]

    @property
    def ratio(self) -> float:
        return self.theirs[0].error / min(self.ours, key=lambda row: row.chosen_on).error

    @property
    def unsearched(self) -> float:
        return self.theirs[0].error / next(row for row in self.ours if "searched" not in row.name).error


Draw = Callable[[Tensor], Tensor]


def ranked(entries: Iterable[tuple[str, Draw, float]], chosen_on: Noises) -> list[tuple[SamplerError, Draw, float]]:
    """(name, sampler, start) by error; those that fail or diverge are left out, and of equals one stays."""
    by_error: dict[float, tuple[SamplerError, Draw, float]] = {}
    for name, draw, start in entries:
        try:
            error = chosen_on.error(draw(chosen_on.z), start)
        except (
            ValueError,
            RuntimeError,
            IndexError,
            TypeError,
            ZeroDivisionError,
        ):  # settings it does not offer
            continue
        if math.isfinite(error):
            by_error.setdefault(error, (SamplerError(name, error), draw, start))
    return [by_error[error] for error in sorted(by_error)]


def scheduler_entries(problem: Problem, count: int, only: Sequence[str] | None) -> Iterable[tuple[str, Draw, float]]:
    for entry in schedulers.entries(problem.path):
        if only is not None and entry.name not in only:
            continue
        try:
            made = entry.at_most(count)
        except (ValueError, RuntimeError, IndexError):
            continue
        if made is not None:
            yield entry.name, _theirs(entry, problem, count), schedulers.start(entry, made, problem.path)


def _theirs(entry: schedulers.Scheduler, problem: Problem, count: int) -> Draw:
    return lambda z: schedulers.run(entry, entry.at_most(count), problem.data, z, problem.path)


def compare(problem: Problem, count: int, chosen_on: Noises, reported: Noises, **options: Any) -> BothSides:
    """Both sides at one number of evaluations; `only_theirs`, `only_ours`: names to try, `generations` of a search."""
    theirs = ranked(scheduler_entries(problem, count, options.get("only_theirs")), chosen_on)
    entries = list(solvers.entries(problem, count))
    if options.get("only_ours") is not None:
        entries = [entry for entry in entries if entry.name in options["only_ours"]]
    by_name = {entry.name: entry for entry in entries}
    ours = ranked(((entry.name, entry.draw, 1.0) for entry in entries), chosen_on)
    best = [by_name[row.name] for row, *_ in ours[:12]]
    exact = chosen_on.problem.exact(chosen_on.z)
    found = solvers.searched(problem, chosen_on.z, exact, best, generations=options.get("generations", 8))
    crossed = ranked(_crossed(problem, best), chosen_on)
    both = [*ranked([(found.name, found.draw, 1.0)], chosen_on), *ours[:SHOWN]]

    def reported_errors(rows: Sequence[tuple[SamplerError, Draw, float]]) -> list[SamplerError]:
        return [replace(row, error=reported.error(draw(reported.z), start)) for row, draw, start in rows]

    names = {"theirs": [row.name for row, *_ in theirs[:KEPT]], "ours": [row.name for row, *_ in ours[:KEPT]]}
    best_crossed = next(iter(reported_errors(crossed[:1])), None)
    return BothSides(reported_errors(theirs[:SHOWN]), reported_errors(both), best_crossed, names)


def _crossed(problem: Problem, best: Sequence[solvers.Sampler]) -> Iterable[tuple[str, Draw, float]]:
    """Their schedulers that take a list of levels, on our best grids: the solver's share without the grid's."""
    for entry in best[:SHOWN]:
        times = entry.schedule.times
        for scheduler in schedulers.on_times(problem.path, times):

            def draw(
                z: Tensor, scheduler: Any = scheduler, first: float = times[0], steps: int = len(times) - 1
            ) -> Tensor:
                x = solvers.scaled(problem, z, first)
                return schedulers.run(scheduler, scheduler.build(steps), problem.data, x, problem.path)

            yield f"{scheduler.name}, on our grid {entry.name.split(', ')[-1]}", draw, 1.0


def show(console: Console, problem: Problem, by_count: dict[int, BothSides]) -> None:
    for count, comparison in by_count.items():
        title = f"{problem.name}, {count} evaluations: {comparison.ratio:.2f} ({comparison.unsearched:.2f} unsearched)"
        grid = Grid(title=title, title_justify="left", expand=False)
        for heading in ("diffusers", "chosen on", "error", "stepwell", "chosen on", "error"):
            grid.add_column(heading, justify="left" if heading in ("diffusers", "stepwell") else "right")
        left = [*comparison.theirs, *([comparison.crossed] if comparison.crossed else [])]
        for place in range(max(len(left), len(comparison.ours))):
            cells = []
            for rows in (left, comparison.ours):
                row = rows[place] if place < len(rows) else None
                cells += ["", "", ""] if row is None else [row.name, f"{row.chosen_on:.4g}", f"{row.error:.4g}"]
            grid.add_row(*cells)
        console.print(grid)


def errors(
    console: Console, counts: Sequence[int] = COUNTS, sizes: tuple[int, int] = (128, 256), generations: int = 8
) -> dict[str, float]:
    """The ratios of errors, for each count that of the worse path; the network's are shown only."""
    ratios: dict[str, float] = {}
    names: dict[int, dict[str, list[str]]] = {}
    for problem in (mixture(Linear()), mixture(path("vp-linear")), digits()):
        noises = [Noises(problem, problem.noise(size, seed)) for size, seed in zip(sizes, (11, 12), strict=True)]
        by_count = {}
        for count in counts:
            network = problem.name.startswith("digits")
            tried = names.get(count, {}) if network else {}
            only = {"only_theirs": tried["theirs"], "only_ours": tried["ours"]} if tried else {}
            by_count[count] = compare(problem, count, *noises, generations=generations, **only)
            names.setdefault(count, by_count[count].names)
            if not network:
                key = f"error_{count}"
                ratios[key] = min(ratios.get(key, math.inf), by_count[count].ratio)
        show(console, problem, by_count)
    return ratios


def ratios_of_time(console: Console, repeats: int = 30) -> dict[str, float]:
    """The ratios of time: `overhead` is the geometric mean over solvers and shapes."""
    rows = costs.overhead(repeats=repeats)
    grid = Grid(title="microseconds a step, without the model", title_justify="left")
    for heading in ("solver", "what", "diffusers", "stepwell", "ratio"):
        grid.add_column(heading, justify="left" if heading in ("solver", "what") else "right")
    for solver, what, theirs, ours in rows:
        grid.add_row(solver, what, f"{1e6 * theirs:.0f}", f"{1e6 * ours:.0f}", f"{theirs / ours:.2f}")
    console.print(grid)
    ratios = {"overhead": math.exp(sum(math.log(theirs / ours) for *_, theirs, ours in rows) / len(rows))}
    for name, (before, after) in (("window", costs.window()), ("replay", costs.replay())):
        console.print(f"{name}: {1e3 * before:.1f} ms against {1e3 * after:.1f} ms")
        ratios[name] = before / after
    return ratios


def main(arguments: Sequence[str] = ()) -> None:
    import diffusers

    warnings.filterwarnings("ignore")
    diffusers.logging.set_verbosity_error()
    torch.set_num_threads(1)  # the matrices are small
    if "--docs" in arguments:
        import docs

        docs.write()
        return
    console = Console(width=150)
    ratios = errors(console) | ratios_of_time(console)
    print(json.dumps({name: round(value, 2) for name, value in ratios.items()}))


if __name__ == "__main__":
    main(sys.argv[1:])
