"""Evolution of solvers: against the exhaustive answer where there is one."""

from __future__ import annotations

import functools
import itertools
import math

import pytest
import torch

from stepwell.errors import InputError
from stepwell.rng import Rng
from stepwell.solver import grid
from stepwell.solver.path import Linear, path
from stepwell.solver.schedule import Schedule
from stepwell.solver.search.align import (
    align_on,
    gaussian_cost,
)
from stepwell.solver.search.evolution import Space, combinations, evolve, exhaust
from stepwell.solver.search.scores import (
    gaussian_distance,
)
from stepwell.solver.table import Table, table

ON = Linear()

VP = path("vp-linear")  # where Euler and DDIM differ
TABLES = combinations(predicts=("data", "velocity"), order=(1, 2))


@functools.cache
def known(schedule: Schedule) -> float:
    return gaussian_distance(VP, (0.7, 0.0), (0.3, 2.0))(schedule)


def tiny(per_step: bool = True) -> Space:
    return Space((1.0, 0.85, 0.7, 0.5, 0.35, 0.2, 0.08, 0.0), 3, TABLES, per_step)


def test_combinations_are_the_tables_that_make_sense():
    rows = combinations(predicts=("data", "noise"), order=(1, 2), weights=("exact", "half"), corrector=(False, True))
    assert len(rows) == len(set(rows)) == 8 + 2  # neither halves nor a corrector go with noise
    assert Table("noise 2 exact", predicts="noise", order=2) in rows
    with pytest.raises(TypeError):
        combinations(orders=(1, 2))


@pytest.mark.parametrize("per_step", [pytest.param(True, marks=pytest.mark.slow), False])
def test_evolution_finds_the_best_of_a_tiny_space_with_a_part_of_the_work(per_step: bool):
    space = tiny(per_step)
    best = exhaust(space, known)
    assert best.spent == space.size == len(set(space)) == 15 * 4 ** (3 if per_step else 1)
    assert best.score == min(known(space.schedule(genes)) for genes in space)
    for seed in range(5):
        settings = {} if per_step else {"population": 10, "parents": 4, "mutated": 5, "crossed": 3}
        found = evolve(space, known, Rng(seed), generations=5, **settings)
        assert found.score == known(found.schedule) == best.score
        assert found.spent < 0.9 * space.size


@pytest.mark.slow
def test_in_a_space_of_fifteen_millions_evolution_nears_the_optimum_that_is_known():
    """The bound of Align your steps adds up over steps, so that dynamic programming knows the best grid."""
    times = tuple(0.001 ** (place / 40) for place in range(41))
    cost, costs = gaussian_cost([0.25]), torch.full((41, 41), math.inf, dtype=torch.float64)
    for i, j in itertools.combinations(range(41), 2):
        costs[i, j] = cost(20.0 * times[i], 20.0 * times[j])
    best = align_on(costs, times, 8)
    places = {time: place for place, time in enumerate(times)}
    space = Space(times, 8, (table("euler"),), per_step=False)

    def score(schedule: Schedule) -> float:
        return sum(float(costs[places[above], places[below]]) for above, below in itertools.pairwise(schedule.times))

    bred = [evolve(space, score, Rng(seed)) for seed in range(4)]
    blind = [evolve(space, score, Rng(seed), mutated=0, crossed=0) for seed in range(4)]  # planted: no inheritance
    assert {found.spent for found in bred + blind} == {500}
    assert space.size == math.comb(39, 7)
    assert best.bound <= min(found.score for found in bred)
    assert max(found.score for found in bred) < 1.1 * best.bound
    assert max(found.score for found in bred) < min(found.score for found in blind)
    assert score(Schedule.of(best.ratios, table("euler"))) == pytest.approx(best.bound)


def test_evolution_repeats_itself_starts_where_it_is_asked_to_and_counts_no_number_as_worst():
    space = tiny()
    one, other = (evolve(space, known, Rng(3), generations=2) for _ in range(2))
    assert one == other
    start = exhaust(space, known).schedule
    few = {"generations": 1, "population": 5, "mutated": 3, "crossed": 2}
    assert evolve(space, known, Rng(0), start=[start], **few).score == known(start)
    assert evolve(space, known, Rng(0), **few).score > known(start)
    seen = []

    def broken(schedule: Schedule) -> float:
        seen.append(space.find(schedule))
        return math.nan if schedule.times[1] < 0.6 else known(schedule)

    found = evolve(space, broken, Rng(1), generations=3)
    assert found.schedule.times[1] > 0.6
    assert len(seen) == len(set(seen)) == found.spent
    with pytest.raises(InputError, match="not a member of the space"):
        space.find(Schedule.of((1.0, 0.5, 0.0), table("euler")))
    with pytest.raises(InputError, match="at most 100,000 schedules"):
        exhaust(Space(grid.uniform(40, ON), 10, TABLES), known)
    with pytest.raises(InputError, match=r"population at least mutated \+ crossed"):
        evolve(space, known, Rng(0), population=3)
    whole = Space((1.0, 0.5, 0.2, 0.0), 2, TABLES[:2], False)
    assert evolve(whole, known, Rng(0)).spent == whole.size == 4
