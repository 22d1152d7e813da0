"""Mistakes that several tests plant."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from stepwell.planning.measured import Vines


@dataclass
class LateVines(Vines):
    """The mistake of vines that start after the first step of the segment."""

    def plan(self, step, so_far, prompts):
        if so_far is None:
            return super().plan(step, so_far, prompts)
        return [
            dataclasses.replace(r, start=(r.start.row, r.start.step + 1)) for r in super().plan(step, so_far, prompts)
        ]
