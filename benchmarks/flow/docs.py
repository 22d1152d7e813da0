"""Write docs/solvers_measured.md: the errors of every table on models whose answer is known; no timing in it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path as FilePath

import solvers
from models import Problem, mixture
from torch import Tensor

from stepwell import Rng
from stepwell.solver import grid, integrate
from stepwell.solver.path import Linear, path
from stepwell.solver.schedule import Schedule
from stepwell.solver.search.scores import gaussian_distance
from stepwell.solver.table import TABLES, Table

FILE = FilePath(__file__).parents[2] / "docs" / "solvers_measured.md"
COUNTS = (5, 8, 10, 20)
START, END = 0.9, 0.1
MEAN, VARIANCE = (0.5, -0.5), (0.1, 1.0)

HEAD = """## Measured

Written by `python benchmarks/flow/run.py --docs`. Errors are root mean squares over samples and dimensions, of the
distance to the exact end of the probability-flow ODE from the same noise, at a number of evaluations of the model: an
exact denoiser of a mixture of 8 Gaussians in 16 dimensions, with data of variance one. Each error is that on the best
of the grids named (`shift k`; `log` and `karras` with their least and largest sigma / alpha), chosen on 128 other
noises. `order` is the slope from 80 to 160 steps between t = 0.9 and 0.1, equally spaced in lambda, from a cold start;
multistep solvers of order 3 and 4 without a corrector begin with a step of order one, whose error is of order two.
Names that are not in the list are its tables with other entries: `adams-k` predicts velocity with order k, `corrected`
has `corrector=True`, `to the end` has `lower_final=False`, and `exact` has `weights="exact"`.
"""

RANDOM = """### Solvers that draw noise

Their samples cannot be compared with an ODE one by one, so the distance is between distributions: the exact
2-Wasserstein distance, without sampling, of n steps on the uniform grid of the linear path to Gaussian data with means
(0.5, -0.5) and variances (0.1, 1). `order` is the slope from 160 to 320 steps. `cps` goes to another distribution than
the data's, and stochastic Euler to the data's slowly, and not evenly in n.
"""


def rms(left: Tensor, right: Tensor) -> float:
    return float((left.double() - right).square().mean().sqrt())


def order(problem: Problem, table: Table, counts: tuple[int, int] = (80, 160)) -> float:
    """The slope of the error at END, from an exact state at START."""
    on = problem.path
    x = math.hypot(on.alpha(START), on.sigma(START)) * Rng(5).normal(32, problem.dimension).double()
    exact, found = problem.between(x, START, END, 800), []
    for count in counts:
        first, last = on.log_snr(START), on.log_snr(END)
        times = [on.time(first + (last - first) * step / count) for step in range(count + 1)]
        solver = table.replace(lower_final=False)
        settings = {"output": "data", "partial": True}
        found.append(rms(integrate.sample(problem.data, x, on, times, solver, Rng(0), **settings).final, exact))
    return math.log2(found[0] / found[1])


def deterministic(problem: Problem, counts: Sequence[int], sizes: tuple[int, int]) -> Iterator[list[str]]:
    """A line for each table: its name, its order, and its error with the grid it was found on."""
    noises = [problem.noise(size, seed) for size, seed in zip(sizes, (11, 12), strict=True)]
    exact = [problem.exact(noise) for noise in noises]
    cells: dict[str, list[str]] = {table.name: [] for table in solvers.tables()}
    for count in counts:
        best: dict[str, tuple[float, str, solvers.Sampler]] = {}
        for entry in solvers.entries(problem, count):
            solver, name = entry.name.split(", ")
            error = rms(entry.draw(noises[0]), exact[0])
            if error < best.get(solver, (math.inf, "", entry))[0]:
                best[solver] = (error, name, entry)
        for solver, (_, name, entry) in best.items():
            cells[solver].append(f"{rms(entry.draw(noises[1]), exact[1]):.2g} ({name})")
    for table in solvers.tables():
        yield [f"`{table.name}`", f"{order(problem, table):.1f}", *cells[table.name]]


def stochastic(counts: Sequence[int], slope: tuple[int, int] = (160, 320)) -> Iterator[list[str]]:
    score = gaussian_distance(Linear(), MEAN, VARIANCE)
    for table in TABLES.values():
        if table.stochastic:
            found = {n: score(Schedule.of(grid.uniform(n, Linear()), table)) for n in {*counts, *slope}}
            rate = math.log2(found[slope[0]] / found[slope[1]])
            yield [f"`{table.name}`", f"{rate:.1f}", *(f"{found[n]:.2g}" for n in counts)]


def as_table(heads: Sequence[str], lines: Iterator[list[str]]) -> str:
    rows = [list(heads), ["---"] * len(heads), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def text(counts: Sequence[int] = COUNTS, sizes: tuple[int, int] = (128, 256)) -> str:
    heads = ["solver", "order", *(f"{count} evaluations" for count in counts)]
    parts = [HEAD]
    for problem, title in (
        (mixture(Linear()), "linear"),
        (mixture(path("vp-linear")), "variance-preserving (0.1, 20)"),
    ):
        parts += [f"### On the {title} path\n", as_table(heads, deterministic(problem, counts, sizes)), ""]
    steps = ["solver", "order", *(f"{count} steps" for count in counts)]
    return "\n".join([*parts, RANDOM, as_table(steps, stochastic(counts))]) + "\n"


def write() -> None:
    FILE.write_text(text())
