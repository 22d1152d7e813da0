"""From words on a command line to a command's dataclass, with one clear sentence for any mistake in them."""

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
from stepwell.foreign.names import argument_hint

C = TypeVar("C")
_WORDS = {"INT": "a whole number", "FLOAT": "a number", "INT ...": "whole numbers", "FLOAT ...": "numbers"}
"""The values of an argument in words, by its metavar."""


def parse(words: Sequence[str], commands: Mapping[str, type[C]], program: str, about: str) -> C:
    """The command (a dataclass) that the first word names, with the rest as its arguments.

    `--help` prints and raises SystemExit. Raises `InputError` for unknown words and for values that do not fit.
    """
    first, rest = words[0], list(words[1:])
    if first in commands:
        settings: tuple[Any, ...] = (tyro.conf.FlagCreatePairsOff,)
        if not {"-h", "--help"} & set(rest):
            settings += (tyro.conf.HelptextFromCommentsOff,)  # reading the comments takes longer than anything else
        usual = [flag for flag in usual_arguments(commands[first]) if not any(word.startswith(flag) for word in rest)]
        with _one_sentence(f"{program} {first}", flag_names(commands[first]), usual):
            return tyro.cli(commands[first], prog=f"{program} {first}", args=rest, config=settings)
    if first not in ("-h", "--help"):
        flag = first.startswith("-")
        raise UnknownName("argument" if flag else "command", first, ["--help", "--version"] if flag else commands)
    whole: Any = reduce(or_, (Annotated[kind, tyro.conf.subcommand(name)] for name, kind in commands.items()))
    tyro.cli(whole, prog=program, description=about, args=["--help"])
    raise SystemExit(0)


def argument_names(command: type) -> list[str]:
    """The names of a command's arguments, with those of its groups (dataclasses among the fields)."""
    names: list[str] = []
    for entry in fields(command):
        group = entry.default_factory
        names += argument_names(group) if isinstance(group, type) and is_dataclass(group) else [entry.name]
    return names


def flag_names(command: type) -> list[str]:
    """The arguments as they are typed: --no-name for a switch that is on by itself."""
    flags: list[str] = []
    for entry in fields(command):
        group = entry.default_factory
        if isinstance(group, type) and is_dataclass(group):
            flags += flag_names(group)
        else:
            flags.append(f"--{'no-' * (entry.default is True)}{entry.name.replace('_', '-')}")
    return flags


def usual_arguments(command: type) -> Sequence[str]:
    """Arguments that nearly every use of a command needs, such as --data; named where a required one is missing."""
    return getattr(command, "usual", ())


@contextmanager
def _one_sentence(program: str, known: Sequence[str], usual: Sequence[str] = ()) -> Iterator[None]:
    """Have tyro raise an `InputError` of one sentence instead of drawing a box, in versions that offer a hook."""
    on_parse_error = getattr(getattr(tyro, "_errors", None), "on_parse_error", None)

    def refuse(event: Any) -> None:
        raise _refusal(event, program, known, usual)

    with on_parse_error(refuse) if on_parse_error is not None else nullcontext():
        yield


def _refusal(event: Any, program: str, known: Sequence[str], usual: Sequence[str]) -> InputError:
    """One sentence for a mistake that tyro found; its later versions may have further kinds of events."""
    mend = f"see `{program} --help`."
    argument = getattr(event, "argument", None)
    name = "an argument" if argument is None else argument.lowered.name_or_flags[0]
    unknown = list(getattr(event, "tokens", ()) or getattr(event, "unrecognized_tokens", ()))
    flags = [word.partition("=")[0] for word in unknown if word.startswith("-")]
    if flags:
        return UnknownName("argument", flags[0], known, hint=argument_hint(flags[0], known))
    missing = [entry.arg for entry in getattr(event, "missing_arguments", ())]
    if missing:
        needed = [each.lowered.metavar if each.is_positional() else each.lowered.name_or_flags[0] for each in missing]
        return InputError(f"`{program}` needs {' and '.join([*needed, *usual])}; {mend}")
    if unknown:
        return InputError(f"`{program}` does not know what to do with '{unknown[0]}'; {mend}")
    if hasattr(event, "choices"):
        choices = ", ".join(sorted(choice for choice in event.choices if choice != "None"))
        return InputError(f"{name} must be one of {choices}, got '{event.value}'.")
    if hasattr(event, "reason"):
        return InputError(f"{name} must be followed by a value; {mend}")
    reason = str(getattr(event, "message", "it cannot be read")).strip().splitlines()[-1]
    reason = re.sub(r"^[- ]*(<class '\w+'>: )?", "", reason)
    right = None if argument is None else _WORDS.get(str(argument.lowered.metavar))
    value = re.search(r"'([^']*)'\]?$", reason)
    if right and value:
        return InputError(f"{name} must be {right}, got '{value[1]}'.")
    return InputError(f"{name} has a value that does not fit ({reason}); {mend}")
