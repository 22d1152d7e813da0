"""From words on a command line to a command's dataclass, with one clear sentence for whatever is wrong in them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import fields, is_dataclass
from functools import reduce
from operator import or_
from typing import Annotated, Any, TypeVar

import tyro

from stepwell.errors import InputError, UnknownName

C = TypeVar("C")


def parse(words: Sequence[str], commands: Mapping[str, type[C]], program: str, about: str) -> C:
    """The command (a dataclass) that the first word names, with the rest as its arguments.

    `--help` prints and raises SystemExit. Raises `InputError` for words that make no sense.
    """
    first, rest = words[0], list(words[1:])
    if first in commands:
        settings: tuple[Any, ...] = (tyro.conf.FlagCreatePairsOff,)
        if not {"-h", "--help"} & set(rest):
            settings += (tyro.conf.HelptextFromCommentsOff,)  # reading the comments takes longer than all else
        with _one_sentence(f"{program} {first}", argument_names(commands[first])):
            return tyro.cli(commands[first], prog=f"{program} {first}", args=rest, config=settings)
    if first not in ("-h", "--help"):
        flag = first.startswith("-")
        raise UnknownName("argument" if flag else "command", first, ["--help", "--version"] if flag else commands)
    whole: Any = reduce(or_, (Annotated[kind, tyro.conf.subcommand(name)] for name, kind in commands.items()))
    tyro.cli(whole, prog=program, description=about, args=["--help"])
    raise SystemExit(0)


def argument_names(command: type) -> list[str]:
    """The names of a command's arguments, those of a group of them (a dataclass in its place) included."""
    names: list[str] = []
    for entry in fields(command):
        group = entry.default_factory
        names += argument_names(group) if isinstance(group, type) and is_dataclass(group) else [entry.name]
    return names


@contextmanager
def _one_sentence(program: str, known: Sequence[str]) -> Iterator[None]:
    """Have tyro raise an InputError of one sentence instead of drawing a box, in versions that can be told so."""
    on_parse_error = getattr(getattr(tyro, "_errors", None), "on_parse_error", None)

    def refuse(event: Any) -> None:
        raise _refusal(event, program, known)

    with on_parse_error(refuse) if on_parse_error is not None else nullcontext():
        yield


def _refusal(event: Any, program: str, known: Sequence[str]) -> InputError:
    """One sentence for whatever tyro found wrong; the kinds of its events may grow."""
    mend = f"see `{program} --help`."
    argument = getattr(event, "argument", None)
    name = "an argument" if argument is None else argument.lowered.name_or_flags[0]
    unknown = list(getattr(event, "tokens", ()) or getattr(event, "unrecognized_tokens", ()))
    flags = [word.partition("=")[0] for word in unknown if word.startswith("-")]
    if flags:
        return UnknownName("argument", flags[0], [f"--{field.replace('_', '-')}" for field in known])
    missing = [entry.arg for entry in getattr(event, "missing_arguments", ())]
    if missing:
        needed = [each.display_name() if each.is_positional() else each.lowered.name_or_flags[0] for each in missing]
        return InputError(f"`{program}` needs {' and '.join(needed)}; {mend}")
    if unknown:
        return InputError(f"`{program}` does not know what to do with '{unknown[0]}'; {mend}")
    if hasattr(event, "choices"):
        return InputError(f"{name} is '{event.value}'; {', '.join(event.choices)} are right.")
    if hasattr(event, "reason"):
        return InputError(f"{name} has too few values; {mend}")
    said = str(getattr(event, "message", "it cannot be read")).strip().splitlines()[-1]
    said = re.sub(r"^[- ]*(<class '\w+'>: )?", "", said)
    return InputError(f"{name} has a value that does not fit ({said}); {mend}")
