"""Prompts from the user's data: a file, a data set, or a list."""

from __future__ import annotations

import array
import csv
import difflib
import functools
import itertools
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from stepwell.data.columns import check_columns
from stepwell.data.rows import PackedPrompts, PackedRows, Survey, size_of
from stepwell.errors import InputError
from stepwell.guarded import reason_of, said_of
from stepwell.paths import usable
from stepwell.process.language.chat import Chat, message_fault
from stepwell.ranges import checked
from stepwell.sampling.request import Prompt


@checked("source")
def load_prompts(source: Any, column: str = "prompt", *, anything: bool = False) -> Sequence[Prompt]:
    """The rows of `source` as prompts, numbered from 0 in their order. Those of a file are kept as a few bytes each.

    `source` is the path of a .jsonl, .json (a list of rows), .csv or .parquet file, a folder written by
    `Dataset.save_to_disk`, a Hugging Face `Dataset`, a list of dictionaries, or a list of texts. The column
    `column` holds the prompt: a text, or chat messages (a list of {"role": ..., "content": ...}; not in a .csv), or a
    whole number, for processes that start from a class. A chat of a row with a column `tools` is told of these tools.
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
    name, table = _read(source)
    if not len(table):
        raise InputError(f"{name} holds no rows; at least one prompt is needed.")
    survey = table.survey if isinstance(table, PackedRows) else Survey(table)
    names = survey.names
    if anything and not survey.mappings:
        return _made(table, Prompt)
    place = functools.partial(_place, name, table)
    if survey.texts == len(table):
        sizes = _sizes(_checked(value, place, number) for number, value in enumerate(table))
        return _made(table, Prompt, (), sizes)
    if survey.odd is not None:
        raise InputError(
            f"{place(survey.odd)} is of type {type(table[survey.odd]).__name__}; "
            f"a row is an object with the column '{column}'."
        )
    unnamed = [key for key in names if not isinstance(key, str)]
    if unnamed:
        raise InputError(f"{name} has a column named {unnamed[0]!r}; the name of a column has to be text.")
    misspelt = difflib.get_close_matches(column, [key.lower() for key in names], n=1, cutoff=0.85)  # not prompt_id
    bare = anything and column == "prompt" and not misspelt
    if column not in names and not bare:
        near = difflib.get_close_matches(column, names, n=1, cutoff=0.5)
        hint = f"did you mean column='{near[0]}'?" if near else "name the one that holds the prompts with column=..."
        listed = "its columns are " + ", ".join(f"'{key}'" for key in names) if names else "it has none"
        raise InputError(f"{name} has no column '{column}' ({listed:.400}); {hint}")
    others = [key for key in names if key != column]
    check_columns(others, name)

    def value_of(number: int, row: Mapping[str, Any]) -> Any:
        value = row.get(column)
        if anything:
            return value
        value, tools = _checked(value, place, number, column), row.get("tools")
        return value if tools is None else _told_of(value, tools, place(number))

    def prompt_of(number: int, row: Mapping[str, Any]) -> Prompt:
        return Prompt(number, value_of(number, row), {key: row.get(key) for key in others})

    sizes = _sizes(map(value_of, itertools.count(), table))  # all of them are looked at before the first is used
    return _made(table, prompt_of, others, sizes)


def _sizes(values: Iterable[Any]) -> array.array[int]:
    return array.array("Q", map(size_of, values))


def _made(
    table: Sequence[Any],
    make: Callable[[int, Any], Prompt],
    columns: Sequence[str] = (),
    sizes: array.array[int] | None = None,
) -> list[Prompt] | PackedPrompts:
    """The prompts of a table, made when they are asked for where it is packed."""
    if isinstance(table, PackedRows):
        return PackedPrompts(table, make, columns, sizes)
    return [make(number, value) for number, value in enumerate(table)]


def _place(name: str, table: Sequence[Any], number: int, column: str | None = None) -> str:
    """The words that name a row in a message, or the value of one of its columns."""
    lines = table.lines if isinstance(table, PackedRows) else ()
    line = f" (line {lines[number]})" if len(lines) else ""
    return f"{name}, row {number}{line}" + ("" if column is None else f", column '{column}'")


def _checked(prompt: Any, place: Callable[..., str], *row: Any) -> Any:
    """The prompt, if it is text, chat messages or a whole number (a class), and not empty."""
    if type(prompt) is str and prompt and not prompt.isspace():
        return prompt
    if prompt is None or prompt in ([], ()) or (isinstance(prompt, str) and not prompt.strip()):
        raise InputError(f"{place(*row)} holds no prompt; give it one or remove the row.")
    if isinstance(prompt, str) or (isinstance(prompt, int) and not isinstance(prompt, bool)):
        return prompt
    if not isinstance(prompt, list | tuple):
        raise InputError(
            f"{place(*row)} holds a value of type {type(prompt).__name__}; "
            "a prompt is text, or a list of chat messages with role and content."
        )
    for number, message in enumerate(prompt):
        if fault := message_fault(message):
            raise InputError(
                f"{place(*row)} holds a list whose entry {number} is no chat message but one {fault}; "
                'each has to be {"role": "user", "content": "..."}.'
            )
    return list(prompt)


def _told_of(prompt: Any, tools: Any, place: str) -> Any:
    """A chat with the tools of its row, JSON schemas or names; any other prompt as it is."""
    if tools is None or not isinstance(prompt, list):
        return prompt
    if isinstance(tools, str):  # as tables hold them whose cells have no lists of different things
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError):
            tools = [tools]
    if not isinstance(tools, list | tuple) or not all(isinstance(tool, str | Mapping) for tool in tools):
        raise InputError(
            f"{place}, column 'tools' must hold a list of JSON schemas or of names of tools, got {tools!r:.60}; "
            "rename the column if it holds something else."
        )
    return Chat(prompt, [_filled(tool) for tool in tools])


def _filled(value: Any) -> Any:
    """A JSON value without the empty entries that columns of structures have where other rows have entries."""
    if isinstance(value, Mapping):
        return {name: _filled(entry) for name, entry in value.items() if entry is not None}
    return [_filled(entry) for entry in value] if isinstance(value, list | tuple) else value


def _read(source: Any) -> tuple[str, Sequence[Any]]:
    """The rows of any source, and the words that name the source in messages."""
    if isinstance(source, str | Path):
        return _read_path(source)
    if isinstance(source, list | tuple):
        return "The list of prompts", source
    datasets = sys.modules.get("datasets")  # whoever holds one of its objects has imported it
    if datasets is not None and isinstance(source, datasets.Dataset):
        return "The data set", PackedRows(source)
    if datasets is not None and isinstance(source, datasets.DatasetDict):
        raise _splits("The data set", source)
    raise InputError(
        f"Prompts must be a path, a Hugging Face Dataset or a list of rows, got an object of type "
        f"{type(source).__name__}."
    )


def _splits(name: str, source: Mapping[str, Any]) -> InputError:
    return InputError(
        f"{name} has the splits {', '.join(source)}; choose one of them, such as its '{next(iter(source))}'."
    )


def _read_path(source: str | Path) -> tuple[str, PackedRows]:
    path = usable(source, "The path of the prompts")
    if path.is_dir():
        return str(source), _read_folder(path)
    if not path.exists():
        siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, siblings, n=1)
        hint = f"did you mean '{path.with_name(near[0])}'?" if near else "check the path; texts go in a list."
        raise InputError(f"There is no file '{source}'; {hint}")
    readers: dict[str, Callable[[Path], PackedRows]] = {
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


def _json(text: str) -> Any:
    """A JSON value; raises `ValueError` for none, for a name that stands twice in an object, and for endless depth."""
    try:
        return json.loads(text, object_pairs_hook=_object)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for place, name in enumerate(names) if name in names[:place])
        raise ValueError(f"'{twice}' stands twice in an object")
    return made


def _read_json_lines(path: Path) -> PackedRows:
    rows = PackedRows()
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    rows.add(_json(line.strip()), number)
                except ValueError as error:
                    raise InputError(
                        f"{path}, line {number} is no JSON ({_reason(error)}); each line has to hold one object."
                    ) from error
    return rows


def _read_json(path: Path) -> PackedRows:
    try:
        value = _json(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError:
        raise
    except ValueError as error:
        line = f", line {error.lineno}," if isinstance(error, json.JSONDecodeError) else ""
        raise InputError(
            f"{path}{line} is no JSON ({_reason(error)}); if each of its lines is a row, name the file .jsonl."
        ) from error
    if not isinstance(value, list):
        raise InputError(f"{path} must hold a list of rows, got one value of type {type(value).__name__}.")
    return PackedRows(value)


def _reason(error: ValueError) -> str:
    """The JSON reader's message, without its own count of lines."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    return reason_of(error)


def _read_csv(path: Path) -> PackedRows:
    rows = PackedRows()
    limit = csv.field_size_limit(2**31 - 1)  # the reader's own is shorter than some texts
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            try:
                header = next(reader, [])
                twice = [name for place, name in enumerate(header) if name in header[:place]]
                if twice:
                    raise InputError(f"{path} has two columns named '{twice[0]}'; rename one of them.")
                for cells in reader:
                    if len(cells) > len(header):
                        raise InputError(
                            f"{path}, row {len(rows)} (line {reader.line_num}) has {len(cells)} cells for "
                            f"{len(header)} columns; put cells that hold a comma in double quotes."
                        )
                    if cells:
                        rows.add(dict.fromkeys(header) | dict(zip(header, cells, strict=False)), reader.line_num)
            except csv.Error as error:
                raise InputError(f"{path}, line {reader.line_num} is no CSV ({error}); mend its quotes.") from error
    finally:
        csv.field_size_limit(limit)
    return rows


def _read_parquet(path: Path) -> PackedRows:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise InputError(f"Reading {path} needs pyarrow; install it with `pip install 'stepwell[data]'`.") from error
    rows = PackedRows()
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            twice = [name for place, name in enumerate(names) if name in names[:place]]
            if twice:
                raise InputError(f"{path} has two columns named '{twice[0]}'; rename one of them.")
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    rows.add(row)
    except InputError:
        raise
    except pyarrow.ArrowInvalid as error:
        raise InputError(f"{path} is no parquet file ({reason_of(error)}); write it again.") from error
    except Exception as error:  # values that have no counterpart in Python, and whatever a broken file provokes
        raise InputError(f"{path} cannot be read ({said_of(error)}); write it again with plain columns.") from error
    return rows


def _read_folder(path: Path) -> PackedRows:
    try:
        import datasets
    except ImportError as error:
        raise InputError(
            f"Reading the folder {path} needs datasets; install it with `pip install 'stepwell[data]'`."
        ) from error
    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:  # whatever a folder provokes that is none of its own, or is broken
        raise InputError(
            f"The folder {path} was not written by Dataset.save_to_disk, or is broken ({said_of(error)}); name a file "
            "in it, or a folder that was."
        ) from error
    if isinstance(loaded, datasets.DatasetDict):
        raise _splits(f"The folder {path}", loaded)
    try:
        return PackedRows(loaded)
    except Exception as error:
        raise InputError(f"The folder {path} cannot be read ({said_of(error)}); write it again.") from error
