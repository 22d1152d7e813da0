"""The benchmark of flows: its references are exact, its peers are run as they are meant to be, and it runs."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path as FilePath
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from stepwell.check.tolerance import rounding
from stepwell.process.exact.mixture import Mixture, flow_map
from stepwell.rng import Rng
from stepwell.solver import grid, integrate
from stepwell.solver.path import Linear, path
from stepwell.solver.table import table

diffusers = pytest.importorskip("diffusers", reason="the benchmark's peers are diffusers' schedulers")
FOLDER = str(FilePath(__file__).parents[2] / "benchmarks" / "flow")


pytestmark = pytest.mark.filterwarnings("ignore")  # those of the peers


@pytest.fixture(scope="module")
def bench() -> Iterator[Any]:
    """The benchmark's modules, as a script in their folder sees them."""
    sys.path.insert(0, FOLDER)
    try:
        import costs
        import models
        import run
        import schedulers
        import solvers

        import docs

        yield SimpleNamespace(main=run, costs=costs, docs=docs, models=models, schedulers=schedulers, solvers=solvers)
    finally:
        sys.path.remove(FOLDER)
        for name in ("costs", "docs", "models", "run", "schedulers", "solvers"):
            sys.modules.pop(name, None)


PATHS = [Linear(), path("vp-linear")]


@pytest.mark.parametrize("on", PATHS, ids=["linear", "vp"])
def test_the_denoiser_is_that_of_a_mixture_of_variance_one(bench: Any, on: Any):
    data = bench.models.mixture(on, dimension=3, components=2).data
    means, variances = bench.models.components_of(3, 2)
    mixture = Mixture(torch.full((2,), 0.5), means, torch.stack([row.diag() for row in variances]))
    x = Rng(0).normal(7, 3, dtype=torch.float64)
    for t in (0.999, 0.5, 0.05):
        assert torch.allclose(data(x, t), mixture.predict(x, t, on, "data"), atol=1e-10)
    assert float(mixture.covariance.trace()) / 3 == pytest.approx(1.0, rel=1e-12)


@pytest.mark.parametrize("on", PATHS, ids=["linear", "vp"])
def test_the_reference_is_the_map_of_gaussian_data(bench: Any, on: Any):
    mean, variance = torch.tensor([0.3, -0.4]).double(), torch.tensor([0.02, 1.5]).double()
    mixture = Mixture(torch.ones(1), mean[None], variance.diag()[None])

    def problem(of: Mixture) -> Any:
        return bench.models.Problem("gaussian", on, 2, lambda x, t: of.predict(x, t, on, "data"))

    x = Rng(1).normal(5, 2, dtype=torch.float64)
    matrix, shift = flow_map(mixture, on, 1.0, 0.0)
    exact = x @ matrix.mT + shift
    residual = 10 * math.exp(-bench.models.NEARLY_CLEAN)  # the noise that is left, at most, on these rows
    assert float((problem(mixture).exact(x) - exact).abs().max()) < residual
    wrong = Mixture(torch.ones(1), mean[None], 1.05 * variance.diag()[None])
    assert float((problem(wrong).exact(x) - exact).abs().max()) > 100 * residual


def test_their_euler_is_ours_on_their_times(bench: Any):
    problem = bench.models.mixture(Linear(), dimension=4, components=3)
    entry = next(e for e in bench.schedulers.entries(Linear()) if e.name == "FlowMatchEuler, shift 1.0")
    scheduler, z = entry.at_most(6), problem.noise(5, 0)
    times = [float(sigma) for sigma in scheduler.sigmas]
    ours = integrate.sample(problem.data, z, Linear(), times, table("euler"), Rng(0), output="data").final
    theirs = bench.schedulers.run(entry, scheduler, problem.data, z, Linear())
    assert float((theirs - ours).abs().max()) < rounding(torch.float32, 100)
    off = bench.schedulers.run(entry, entry.at_most(6), lambda x, t: problem.data(x, 0.9 * t), z, Linear())
    assert float((off - ours).abs().max()) > 1e-2


OTHERS = ["Heun, exponential", "KDPM2, exponential", "LMS, karras"]


@pytest.mark.parametrize("name", ["Euler, karras", *(pytest.param(n, marks=pytest.mark.slow) for n in OTHERS)])
def test_their_schedulers_in_noise_levels_converge_to_the_reference(bench: Any, name: str):
    """With 4 times as many evaluations a solver of any order has less than half the error."""
    problem = bench.models.mixture(path("vp-linear"), dimension=4, components=3)
    entry = next(e for e in bench.schedulers.entries(problem.path) if e.name == name)
    z = problem.noise(16, 0)
    exact, found = problem.exact(z), []
    for count in (30, 120):
        samples = bench.schedulers.run(entry, entry.at_most(count), problem.data, z, problem.path)
        found.append(float((samples - exact).square().mean().sqrt()))
    assert found[1] < 0.5 * found[0] < 0.1


def test_entries_use_no_more_evaluations_than_they_may(bench: Any):
    for on in PATHS:
        calls: list[float] = []
        problem = bench.models.mixture(on, dimension=2, components=2)
        counted = bench.models.Problem("", on, 2, lambda x, t, p=problem, c=calls: c.append(t) or p.data(x, t))
        seen = set()
        for entry in bench.solvers.entries(counted, 7):
            solver = entry.name.split(", ")[0]
            if solver not in seen:
                seen.add(solver)
                calls.clear()
                entry.draw(problem.noise(2, 0))
                assert 5 <= len(calls) <= 7, entry.name
        assert seen == {row.name for row in bench.solvers.tables()}


def test_exponential_tables_are_the_same_on_every_path(bench: Any):
    """At the same noise levels, from the same state, the paths differ by a scale that such steps do not see."""
    ends = []
    for on in PATHS:
        problem, times = bench.models.mixture(on, 4, 3), grid.karras(8, on, 0.1, 20.0)
        x = bench.solvers.scaled(problem, problem.noise(6, 0), times[0])
        ends.append(integrate.sample(problem.data, x, on, times, table("unipc-3"), Rng(0), output="data").final)
    assert torch.allclose(ends[0], ends[1], atol=1e-4)


def test_a_small_run_ends_in_one_line_of_ratios(bench: Any, monkeypatch: Any, capsys: Any):
    schedulers, solvers, main = bench.schedulers, bench.solvers, bench.main
    every, ours = schedulers.entries, list(solvers.tables())
    monkeypatch.setattr(schedulers, "entries", lambda on: every(on)[::90])
    exact, named = bench.models.Problem.exact, solvers.grids
    monkeypatch.setattr(bench.models.Problem, "exact", lambda *given, **more: exact(*given, **{"steps": 20} | more))
    monkeypatch.setattr(solvers, "tables", lambda: ours[:4])
    monkeypatch.setattr(solvers, "grids", lambda on, steps: list(named(on, steps))[:3])
    monkeypatch.setattr(main, "mixture", lambda on: bench.models.mixture(on, 2, 2))
    monkeypatch.setattr(main, "digits", lambda: bench.models.digits(steps=3, width=8))
    quick = {"repeats": 1}
    overhead, window, replay = bench.costs.overhead, bench.costs.window, bench.costs.replay
    monkeypatch.setattr(bench.costs, "overhead", lambda repeats: overhead(steps=2, repeats=1))
    monkeypatch.setattr(bench.costs, "window", lambda: window(width=8, group=2, steps=1, **quick))
    monkeypatch.setattr(bench.costs, "replay", lambda: replay(width=8, rows=2, **quick))
    errors = main.errors
    monkeypatch.setattr(main, "errors", lambda console: errors(console, counts=(5,), sizes=(4, 4), generations=1))
    threads = torch.get_num_threads()
    try:
        main.main()
    finally:
        torch.set_num_threads(threads)
    ratios = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert set(ratios) == {"error_5", "overhead", "window", "replay"}
    assert all(value > 0 for value in ratios.values())


def test_the_written_table_has_a_line_for_every_table(bench: Any, monkeypatch: Any):
    docs, ours = bench.docs, list(bench.solvers.tables())
    written = FilePath(docs.FILE).read_text()
    for row in ours:
        assert written.count(f"| `{row.name}` |") == 2, f"{row.name}: run python benchmarks/flow/run.py --docs"
    assert written.startswith(docs.HEAD)
    assert "\n".join(docs.as_table([], iter(list(docs.stochastic((5, 8, 10, 20))))).splitlines()[2:]) in written
    assert docs.order(bench.models.mixture(Linear(), 2, 2), table("dpmpp-2m"), (20, 40)) == pytest.approx(2, abs=0.5)
