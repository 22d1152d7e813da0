"""Mistakes that several tests plant."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

from stepwell import methods
from stepwell.planning.measured import Vines
from stepwell.process.exact.table import TabularLanguage


def planted(name, change):
    """The card of a method with a mistake in every recipe that it builds."""
    real = methods.get(name)

    @functools.wraps(real.build)
    def build(**options):
        return change(real.build(**options))

    return dataclasses.replace(real, build=build)


def parts(**changes):
    """Other parts of the first term."""
    return lambda recipe: recipe.replace(**changes)


@dataclass
class LateVines(Vines):
    """The mistake of vines that start after the first step of the segment."""

    def plan(self, step, so_far, prompts):
        if so_far is None:
            return super().plan(step, so_far, prompts)
        return [
            dataclasses.replace(r, start=(r.start.row, r.start.step + 1)) for r in super().plan(step, so_far, prompts)
        ]


class GoesOnWriting(TabularLanguage):
    """Rows that are done take on further symbols, as a tabular language's once did."""

    def advance(self, state, action, rng):
        following = super().advance(state, action, rng)
        text, place = state.text.clone(), min(state.position, self.length - 1)
        text[:, place] = action
        return dataclasses.replace(following, text=text)
