"""Prompts from the user's data: a file, a data set, or a list."""

from __future__ import annotations

import csv
import difflib
import json
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from stepwell.data.columns import check_columns
from stepwell.errors import InputError
from stepwell.sampling.request import Prompt


class _Row(NamedTuple):
    """A row as it was read, and the words that name it in a message."""

    place: str
    value: Any


def load_prompts(source: Any, column: str = "prompt", *, anything: bool = False) -> list[Prompt]:
    """The rows of `source` as prompts, numbered from 0 in their order.

    `source` is the path of a .jsonl, .json (a list of rows), .csv or .parquet file, a folder written by
    `Dataset.save_to_disk`, a Hugging Face `Dataset`, a list of dictionaries, or a list of texts. The column
    `column` holds the prompt: a text, or chat messages (a list of {"role": ..., "content": ...}; not in a .csv), or a
    whole number, for processes that start from a class.
    All other columns go to `Prompt.columns`; a column that only some rows have is None in the others. The cells of a
    .csv stay text. Blank lines are skipped.

    With `anything`, for processes that are not conditioned on texts, a prompt may be any value, None included; a list
    may hold such values themselves in place of rows, and rows need no column `prompt`: theirs are None then.

    Raises `InputError`, naming file, row (counted from 0), column and the mend, for a file that is not there, cannot
    be read or has an unknown suffix, for data without rows or without the prompt's column, for a column whose name is
    taken (`columns.RESERVED`), and for a row that is broken, has no prompt, or has one that is neither text nor chat
    messages.

    Example:
        >>> load_prompts([{"prompt": "1 + 1 =", "answer": "2"}])
        [Prompt(id=0, value='1 + 1 =', columns={'answer': '2'})]
        >>> [prompt.value for prompt in load_prompts([3, None], anything=True)]
        [3, None]
    """
    name, rows = _read(source)
    if not rows:
        raise InputError(f"{name} holds no rows; at least one prompt is needed.")
    if anything and not any(isinstance(row.value, Mapping) for row in rows):
        return [Prompt(number, row.value) for number, row in enumerate(rows)]
    if all(isinstance(row.value, str) for row in rows):
        return [Prompt(number, _checked(row.value, f"{name}, {row.place}")) for number, row in enumerate(rows)]
    for row in rows:
        if not isinstance(row.value, Mapping):
            raise InputError(
                f"{name}, {row.place} is of type {type(row.value).__name__}; "
                f"a row is an object with the column '{column}'."
            )
    names = list(dict.fromkeys(key for row in rows for key in row.value))
    unnamed = [key for key in names if not isinstance(key, str)]
    if unnamed:
        raise InputError(f"{name} has a column named {unnamed[0]!r}; the name of a column has to be text.")
    misspelt = difflib.get_close_matches(column, [key.lower() for key in names], n=1, cutoff=0.85)  # not prompt_id
    bare = anything and column == "prompt" and not misspelt
    if column not in names and not bare:
        near = difflib.get_close_matches(column, names, n=1, cutoff=0.5)
        hint = f"did you mean column='{near[0]}'?" if near else "name the one that holds the prompts with column=..."
        listed = "its columns are " + ", ".join(f"'{key}'" for key in names) if names else "it has none"
        raise InputError(f"{name} has no column '{column}' ({listed}); {hint}")
    others = [key for key in names if key != column]
    check_columns(others, name)
    return [
        Prompt(
            number,
            row.value.get(column)
            if anything
            else _checked(row.value.get(column), f"{name}, {row.place}, column '{column}'"),
            {key: row.value.get(key) for key in others},
        )
        for number, row in enumerate(rows)
    ]


def _checked(prompt: Any, place: str) -> Any:
    """The prompt, if it is text, chat messages or a whole number (a class), and not empty."""
    if prompt is None or prompt in ([], ()) or (isinstance(prompt, str) and not prompt.strip()):
        raise InputError(f"{place} holds no prompt; give it one or remove the row.")
    if isinstance(prompt, str) or (isinstance(prompt, int) and not isinstance(prompt, bool)):
        return prompt
    if not isinstance(prompt, list | tuple):
        raise InputError(
            f"{place} holds a value of type {type(prompt).__name__}; "
            "a prompt is text, or a list of chat messages with role and content."
        )
    for number, message in enumerate(prompt):
        whole = (
            isinstance(message, Mapping)
            and isinstance(message.get("role"), str)
            and isinstance(message.get("content"), str | list | type(None))
            and "content" in message
        )
        if not whole:
            raise InputError(
                f"{place} holds a list whose entry {number} is no chat message; "
                'each has to be {"role": "user", "content": "..."}.'
            )
    return list(prompt)


def _read(source: Any) -> tuple[str, list[_Row]]:
    """The rows of any source, and the words that name the source in messages."""
    if isinstance(source, str | Path):
        return _read_path(source)
    if isinstance(source, list | tuple):
        return "The list of prompts", _numbered(source)
    datasets = sys.modules.get("datasets")  # whoever holds one of its objects has imported it
    if datasets is not None and isinstance(source, datasets.Dataset):
        return "The data set", _numbered(source)
    if datasets is not None and isinstance(source, datasets.DatasetDict):
        raise _splits("The data set", source)
    raise InputError(
        f"Prompts must be a path, a Hugging Face Dataset or a list of rows, got an object of type "
        f"{type(source).__name__}."
    )


def _numbered(values: Iterable[Any]) -> list[_Row]:
    return [_Row(f"row {number}", value) for number, value in enumerate(values)]


def _splits(name: str, source: Mapping[str, Any]) -> InputError:
    return InputError(
        f"{name} has the splits {', '.join(source)}; choose one of them, such as its '{next(iter(source))}'."
    )


def _read_path(source: str | Path) -> tuple[str, list[_Row]]:
    path = Path(source).expanduser()
    if path.is_dir():
        return str(source), _read_folder(path)
    if not path.exists():
        siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, siblings, n=1)
        hint = f"did you mean '{path.with_name(near[0])}'?" if near else "check the path; texts go in a list."
        raise InputError(f"There is no file '{source}'; {hint}")
    readers: dict[str, Callable[[Path], list[_Row]]] = {
        ".jsonl": _read_json_lines,
        ".json": _read_json,
        ".csv": _read_csv,
        ".parquet": _read_parquet,
    }
    if path.suffix.lower() not in readers:
        raise InputError(
            f"{source} has the unknown suffix '{path.suffix}'; prompts are read from {', '.join(readers)}."
        )
    try:
        return str(source), readers[path.suffix.lower()](path)
    except UnicodeDecodeError as error:
        raise InputError(
            f"{source} is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8."
        ) from error
    except OSError as error:
        raise InputError(f"{source} cannot be read: {error.strerror or error}.") from error


def _read_json_lines(path: Path) -> list[_Row]:
    rows: list[_Row] = []
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    value = json.loads(line.strip())
                except ValueError as error:
                    raise InputError(
                        f"{path}, line {number} is no JSON ({_reason(error)}); each line has to hold one object."
                    ) from error
                rows.append(_Row(f"row {len(rows)} (line {number})", value))
    return rows


def _read_json(path: Path) -> list[_Row]:
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError:
        raise
    except ValueError as error:
        line = f", line {error.lineno}," if isinstance(error, json.JSONDecodeError) else ""
        raise InputError(
            f"{path}{line} is no JSON ({_reason(error)}); if each of its lines is a row, name the file .jsonl."
        ) from error
    if not isinstance(value, list):
        raise InputError(f"{path} must hold a list of rows, got one value of type {type(value).__name__}.")
    return _numbered(value)


def _reason(error: ValueError) -> str:
    """The JSON reader's message, without its own count of lines."""
    return f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)


def _read_csv(path: Path) -> list[_Row]:
    rows: list[_Row] = []
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            header = next(reader, [])
            twice = [name for place, name in enumerate(header) if name in header[:place]]
            if twice:
                raise InputError(f"{path} has two columns named '{twice[0]}'; rename one of them.")
            for cells in reader:
                place = f"row {len(rows)} (line {reader.line_num})"
                if len(cells) > len(header):
                    raise InputError(
                        f"{path}, {place} has {len(cells)} cells for {len(header)} columns; "
                        "put cells that hold a comma in double quotes."
                    )
                if cells:
                    rows.append(_Row(place, dict.fromkeys(header) | dict(zip(header, cells, strict=False))))
        except csv.Error as error:
            raise InputError(f"{path}, line {reader.line_num} is no CSV ({error}); mend its quotes.") from error
    return rows


def _read_parquet(path: Path) -> list[_Row]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise InputError(f"Reading {path} needs pyarrow; install it with `pip install 'stepwell[data]'`.") from error
    try:
        return _numbered(parquet.read_table(path).to_pylist())
    except ValueError as error:  # pyarrow's own errors about content are ValueErrors
        raise InputError(f"{path} is no parquet file ({' '.join(str(error).split())}); write it again.") from error


def _read_folder(path: Path) -> list[_Row]:
    try:
        import datasets
    except ImportError as error:
        raise InputError(
            f"Reading the folder {path} needs datasets; install it with `pip install 'stepwell[data]'`."
        ) from error
    try:
        loaded = datasets.load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise InputError(
            f"The folder {path} was not written by Dataset.save_to_disk; name a file in it, or a folder that was."
        ) from error
    if isinstance(loaded, datasets.DatasetDict):
        raise _splits(f"The folder {path}", loaded)
    return _numbered(loaded)
