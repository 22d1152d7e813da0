"""Evolution of solvers: a population of schedules, over times and over the table of each step, under any score."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from stepwell.errors import InputError
from stepwell.rng import Rng
from stepwell.solver.grid import check_order
from stepwell.solver.schedule import Schedule
from stepwell.solver.search.scores import Score, Searched
from stepwell.solver.table import Table

LARGEST = 100_000
"""The most schedules that `exhaust` scores."""


@dataclass(frozen=True)
class Genes:
    """A member of a space: the times between the first and the last, and the table of each step, by their places."""

    places: tuple[int, ...]
    rows: tuple[int, ...]


@dataclass(frozen=True)
class Space:
    """All schedules of `steps` steps through some of `times`, first and last included, with some of `tables`.

    `per_step`: a table for each step (USF's space, arXiv 2312.07243); else one for all of them.

    Example:
        >>> from stepwell.solver.table import table
        >>> Space((1.0, 0.7, 0.5, 0.2, 0.0), 3, (table("euler"), table("ddim"))).size
        24
    """

    times: tuple[float, ...]
    steps: int
    tables: tuple[Table, ...]
    per_step: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "times", tuple(float(time) for time in self.times))
        object.__setattr__(self, "tables", tuple(self.tables))
        check_order(self.times)
        if not 1 <= self.steps <= len(self.times) - 1 or not self.tables:
            raise InputError(
                f"steps must be 1 to {len(self.times) - 1}, and tables at least 1; got {self.steps} and "
                f"{len(self.tables)}."
            )

    @property
    def genes(self) -> int:
        """The number of tables that a member chooses."""
        return self.steps if self.per_step else 1

    @property
    def size(self) -> int:
        return math.comb(len(self.times) - 2, self.steps - 1) * len(self.tables) ** self.genes

    def schedule(self, genes: Genes, name: str = "searched") -> Schedule:
        times = (self.times[0], *(self.times[place] for place in genes.places), self.times[-1])
        rows = genes.rows if self.per_step else genes.rows * self.steps
        return Schedule(name, times, tuple(self.tables[row] for row in rows))

    def find(self, schedule: Schedule) -> Genes:
        """The genes of a schedule. Raises `InputError` where it is no member of the space."""
        try:
            ends = schedule.times[0] == self.times[0] and schedule.times[-1] == self.times[-1]
            rows = tuple(self.tables.index(table) for table in schedule.tables)
            if ends and schedule.steps == self.steps and (self.per_step or len(set(rows)) == 1):
                places = tuple(self.times.index(time) for time in schedule.times[1:-1])
                return Genes(places, rows if self.per_step else rows[:1])
        except ValueError:
            pass
        raise InputError(f"Schedule '{schedule.name}' is not a member of the space that is searched.")

    def __iter__(self) -> Iterator[Genes]:
        for places in itertools.combinations(range(1, len(self.times) - 1), self.steps - 1):
            for rows in itertools.product(range(len(self.tables)), repeat=self.genes):
                yield Genes(places, rows)


def combinations(**choices: Sequence[Any]) -> tuple[Table, ...]:
    """A table for each combination of entries that does not contradict itself, named after them.

    Example:
        >>> [row.name for row in combinations(order=(1, 2), predicts=("data",), corrector=(False, True))]
        ['1 data', '1 data corrector', '2 data', '2 data corrector']
    """
    tables = []
    for values in itertools.product(*choices.values()):
        entries = dict(zip(choices, values, strict=True))
        words = [key if value is True else str(value) for key, value in entries.items() if value not in (False, None)]
        try:
            tables.append(Table(" ".join(words), **entries))
        except InputError:
            continue
    return tuple(tables)


def exhaust(space: Space, score: Score) -> Searched:
    """The best of all schedules of a space, by scoring each. Raises `InputError` for more than 100,000."""
    if space.size > LARGEST:
        raise InputError(
            f"space must have at most {LARGEST:,} schedules to score each, got {space.size:,}; evolve() tries some."
        )
    best = min(((score(space.schedule(genes)), index, genes) for index, genes in enumerate(space)), key=_by_score)
    return Searched(space.schedule(best[2]), best[0], space.size)


def _by_score(entry: tuple[float, int, Genes]) -> tuple[float, int]:
    """The order of members; a score that is not a number comes last."""
    return (entry[0] if entry[0] == entry[0] else math.inf, entry[1])


def evolve(
    space: Space,
    score: Score,
    rng: Rng,
    *,
    generations: int = 10,
    population: int = 50,
    parents: int = 10,
    mutated: int = 25,
    crossed: int = 10,
    mutation: float = 0.1,
    start: Sequence[Schedule] = (),
) -> Searched:
    """The best schedule that an evolution meets; no schedule is scored twice.

    AutoDiffusion's search (Li et al. 2023, arXiv 2309.10438), whose published settings these are: each generation has
    `mutated` children of the `parents` best so far, in which each time and table is replaced with probability
    `mutation`, `crossed` children that have each gene from either of two of the best, and new random members up to
    `population`. The first generation is `start`, and random members. USF's search (arXiv 2312.07243) is over the
    same space by the same moves; its learned predictor of the score is not included, and may be given as the score.
    The search ends early when the space is used up. Scores that are not numbers count as infinite.
    """
    if not (parents >= 1 and mutated + crossed <= population and 0.0 <= mutation <= 1.0 and generations >= 1):
        raise InputError(
            "generations and parents must be at least 1, mutation in [0, 1], and population at least mutated + crossed."
        )
    scores: dict[Genes, tuple[float, int, Genes]] = {}

    def meet(genes: Genes) -> None:
        if genes not in scores:
            scores[genes] = (float(score(space.schedule(genes))), len(scores), genes)

    def breed(child: Callable[[], Genes | None], count: int, tries: int) -> None:
        """Score up to `count` members that were not met before."""
        wanted = min(len(scores) + count, space.size)
        for _ in range(tries):
            if len(scores) >= wanted:
                return
            genes = child()
            if genes is not None:
                meet(genes)

    for schedule in start:
        meet(space.find(schedule))
    for generation in range(generations):
        begun = len(scores)
        if generation:
            best = [genes for *_, genes in sorted(scores.values(), key=_by_score)[:parents]]
            one = partial(_one, best, rng)
            breed(partial(_mutated, space, one, mutation, rng), mutated, 10 * mutated)
            breed(partial(_crossed, one, rng), crossed, 10 * crossed)
            wanted = population - (len(scores) - begun)
        else:
            wanted = population - len(scores)
        breed(partial(_drawn, space, rng), wanted, 10 * population)
    best_met = min(scores.values(), key=_by_score)
    return Searched(space.schedule(best_met[2]), best_met[0], len(scores))


def _one(members: Sequence[Genes], rng: Rng) -> Genes:
    return members[int(rng.categorical(torch.ones(1, len(members))))]


def _drawn(space: Space, rng: Rng) -> Genes:
    """A member of the space, all equally likely."""
    places = (rng.permutation(len(space.times) - 2)[: space.steps - 1] + 1).sort().values.tolist()
    rows = rng.categorical(torch.ones(space.genes, len(space.tables))).tolist()
    return Genes(tuple(places), tuple(rows))


def _mutated(space: Space, one: Callable[[], Genes], probability: float, rng: Rng) -> Genes:
    genes = one()
    places, rows = list(genes.places), list(genes.rows)
    for index, changes in enumerate(rng.bernoulli(torch.full((len(places),), probability)).tolist()):
        free = [place for place in range(1, len(space.times) - 1) if place not in places]
        if changes and free:
            places[index] = free[int(rng.categorical(torch.ones(1, len(free))))]
    for index, changes in enumerate(rng.bernoulli(torch.full((len(rows),), probability)).tolist()):
        if changes:
            rows[index] = int(rng.categorical(torch.ones(1, len(space.tables))))
    return Genes(tuple(sorted(places)), tuple(rows))


def _crossed(one: Callable[[], Genes], rng: Rng) -> Genes | None:
    """A child with each gene from either of two; None where it has a time twice."""
    left, right = one(), one()

    def mixed(these: tuple[int, ...], those: tuple[int, ...]) -> tuple[int, ...]:
        coins = rng.bernoulli(torch.full((len(these),), 0.5)).tolist()
        return tuple(a if coin else b for a, b, coin in zip(these, those, coins, strict=True))

    places = tuple(sorted(mixed(left.places, right.places)))
    return Genes(places, mixed(left.rows, right.rows)) if len(set(places)) == len(places) else None
