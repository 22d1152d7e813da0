"""Errors: one sentence each, raised where the mistake was made."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping


class StepwellError(Exception):
    """A mistake a user can mend; the command line prints it on one line and exits with code 2."""


class Interrupted(KeyboardInterrupt):
    """A person's second Ctrl-C during a run, which stops at once."""


class InputError(StepwellError):
    """A file, a column, an option or a folder is not what it has to be."""


class UnknownName(InputError):
    """A name that is not known, with the nearest one that is.

    `also` has further spellings, each of a known name: aliases, titles. `hint` takes the place of the nearest name.
    """

    def __init__(
        self,
        kind: str,
        name: str,
        known: Iterable[str],
        also: Mapping[str, str] | None = None,
        hint: str | None = None,
    ):
        known, name = sorted(known), str(name)
        near = nearest(name, {**(also or {}), **{entry: entry for entry in known}})
        listed = ", ".join(known[:LISTED]) + (f" and {len(known) - LISTED} more" if len(known) > LISTED else "")
        otherwise = f"did you mean '{near}'?" if near else f"known: {listed or 'none'}."
        super().__init__(f"There is no {kind} '{name}'; {hint or otherwise}")
        self.name, self.known = name, known


class UnknownChoice(UnknownName):
    """A setting that is none of the values it may have, with the nearest of them."""

    def __init__(self, setting: str, value: str, right: str, known: Iterable[str]):
        super().__init__(setting, value, known)
        near = nearest(value, {entry: entry for entry in self.known})
        self.args = (f"{setting} must be {right}; got '{value}'{f', did you mean {near!r}?' if near else '.'}",)


LISTED = 40
"""Known names that a message lists at most."""


def folded(name: str) -> str:
    """A name without case, hyphens, underscores and spaces, which people type as they like.

    Example:
        >>> folded("Dr_GRPO") == folded("dr-grpo") == folded("drgrpo")
        True
    """
    return str(name).casefold().translate({ord(letter): None for letter in "-_ "})


def nearest(name: str, spellings: Mapping[str, str]) -> str | None:
    """The name whose spelling is nearest to what was typed; None where none is near."""
    names = {folded(spelling): known for spelling, known in spellings.items()}
    close = difflib.get_close_matches(folded(name), names, cutoff=0.5)
    return names[close[0]] if close else None


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
