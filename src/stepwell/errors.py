"""What Stepwell says when the input is wrong: one sentence, raised where the mistake was made."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class StepwellError(Exception):
    """A mistake a user can mend; the command line prints it on one line and exits with code 2."""


class InputError(StepwellError):
    """A file, a column, an option or a folder is not what it has to be."""


class UnknownName(InputError):
    """A name that is not known, with the nearest one that is."""

    def __init__(self, kind: str, name: str, known: Iterable[str]):
        known = sorted(known)
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(known) or 'none'}."
        super().__init__(f"There is no {kind} '{name}'; {hint}")
        self.name, self.known = name, known


class RewardError(StepwellError):
    """A reward function failed or returned something that is not one number a row."""


class CheckpointError(StepwellError):
    """A checkpoint is damaged, or belongs to another run."""


class CannotFork(StepwellError):
    """A process whose partial samples cannot be copied was asked to copy them."""


class MissingAbility(StepwellError):
    """A method asked a process for something it does not offer."""


class Unenumerable(StepwellError):
    """A program uses randomness in a way that cannot be enumerated exactly."""


class LawBroken(StepwellError):
    """A check found that a process, a method or a sampler breaks one of its laws."""
