"""The columns that reward functions are called with: those that every sample has, and those of the data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from stepwell.errors import InputError
from stepwell.sampling.request import Prompt


@dataclass(frozen=True)
class Given:
    """The columns that there are whatever the data, one entry a row; `completion_ids` only where actions are tokens.

    Example:
        >>> given = Given(prompts=["1 + 1 ="], completions=["2"], truncated=[False])
        >>> given.with_data([Prompt(0, "1 + 1 =", {"answer": 2})])
        {'prompts': ['1 + 1 ='], 'completions': ['2'], 'truncated': [False], 'answer': [2]}
    """

    prompts: list[Any]
    completions: list[Any]
    truncated: list[bool]
    completion_ids: list[Any] | None = None

    def with_data(self, rows: Sequence[Prompt], samples: Mapping[str, list[Any]] | None = None) -> dict[str, list[Any]]:
        """These columns, those of the `samples`, which replace them, and those of each row's prompt, None where it has
        no such column.

        Raises `InputError` where the data have a column of a name that is taken.
        """
        columns = {name: column for name, column in vars(self).items() if column is not None} | dict(samples or {})
        names = dict.fromkeys(name for prompt in rows for name in prompt.columns)
        _refuse([name for name in names if name in columns], "A prompt")
        return columns | {name: [prompt.columns.get(name) for prompt in rows] for name in names}


RESERVED = tuple(entry.name for entry in fields(Given))
"""The names of those columns; no column of the data may have one of them."""


def check_columns(names: Sequence[str], owner: str) -> None:
    """Raise `InputError` for a column of the data that has the name of another that reward functions are given."""
    _refuse([name for name in names if name in RESERVED], owner)


def _refuse(taken: Sequence[str], owner: str) -> None:
    if taken:
        raise InputError(
            f"{owner} has a column '{taken[0]}', and reward functions are given something else under that name; "
            "rename the column."
        )
