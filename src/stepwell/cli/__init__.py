"""The command line: `stepwell methods`, `solvers`, `sample`, `train`, `export`, `compare`, `report`, `check`, `tasks`.

Arguments are plain dataclasses, and heavy modules are imported inside a command, so that help comes at once.
"""

from __future__ import annotations

import os
import sys
import traceback as traces
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import stepwell
from stepwell.cli.arguments import parse
from stepwell.cli.command import Command
from stepwell.cli.compare import Check, Compare, ReportRuns
from stepwell.cli.export import Export
from stepwell.cli.lists import Methods, Solvers, Tasks
from stepwell.cli.sample import Sample
from stepwell.cli.train import Train, reward_named
from stepwell.errors import StepwellError
from stepwell.guarded import reason_of, said_of
from stepwell.terminal import on_screen, one_line, printable
from stepwell.writing import append_lines

__all__ = ["COMMANDS", "Train", "main", "reward_named"]

LAST_WORDS = "log.txt"
"""The file for what a command said last, in its folder, where it could not be said on the terminal."""

ABOUT = f"""{stepwell.__doc__}

`stepwell COMMAND --help` lists the arguments of a command, `stepwell --version` prints the version."""

COMMANDS: dict[str, type[Command]] = {
    "methods": Methods,
    "solvers": Solvers,
    "sample": Sample,
    "train": Train,
    "export": Export,
    "compare": Compare,
    "report": ReportRuns,
    "check": Check,
    "tasks": Tasks,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    0: done; 1: a fault of Stepwell's own; 2: a mistake that the user can mend; 130: stopped by Ctrl-C or a signal. A
    terminal that is gone ends nothing: a run goes on without it, and the last words of a command, which may be those
    that tell of an error, go to the log in its folder and to standard error, if that is still there.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    with on_screen() as (out, error), _warnings_in_sentences():
        command, folder, code, sentence = None, None, 0, ""
        try:
            if words[:1] == ["--version"]:
                print(f"stepwell {stepwell.__version__}")
            else:
                command = parse(words or ["--help"], COMMANDS, "stepwell", ABOUT)
                command.check_paths()
                folder = command.folder()
                command.run()
        except SystemExit as end:  # tyro printed the help
            code = end.code if isinstance(end.code, int) else 0
        except KeyboardInterrupt:
            code, sentence = 130, "interrupted" if command is None else command.interrupted()
        except Exception as failure:
            code, sentence = _told(failure)
            if "--traceback" in words:
                print(printable(traces.format_exc()), file=error)
        out.flush()
        prints = command is None or command.prints
        if prints and out.stream is not None and out.failure is not None and not _reader_left(out.failure) and not code:
            code, sentence = 2, f"The output cannot be written: {reason_of(out.failure)}"
        last = [one_line(words) for words in (command.last_words if command is not None and not prints else [])]
        told = f"stepwell: {sentence}{'' if sentence.endswith(('.', '?')) else '.'}" if sentence else ""
        for line in (*(last if out.failure is not None else []), *([told] if told else [])):
            print(line, file=error)
        error.flush()
        if (out.failure is not None or error.failure is not None) and folder is not None and folder.is_dir():
            with suppress(StepwellError):
                append_lines(folder / LAST_WORDS, [*last, *([told] if told else [])])
    return code


@contextmanager
def _warnings_in_sentences() -> Iterator[None]:
    """Print Stepwell's own warnings as it prints errors; those of libraries stay as Python has them."""
    plain, own = warnings.formatwarning, os.path.dirname(stepwell.__file__)

    def format(message: Any, category: Any, filename: str, lineno: int, line: str | None = None) -> str:
        if category is UserWarning and filename.startswith(own):
            return f"stepwell: {one_line(str(message))}\n"
        return plain(message, category, filename, lineno, line)

    warnings.formatwarning = format
    try:
        yield
    finally:
        warnings.formatwarning = plain


def _told(failure: Exception) -> tuple[int, str]:
    """The exit code for an exception, and the sentence that is said of it."""
    if isinstance(failure, StepwellError):
        return 2, one_line(str(failure))
    reason = reason_of(failure)
    if isinstance(failure, OSError) and failure.filename is not None:
        return 2, f"'{one_line(os.fsdecode(failure.filename), 80)}' cannot be used: {failure.strerror}"
    if isinstance(failure, MemoryError) or "out of memory" in reason or "can't allocate memory" in reason:
        return 2, f"There is not enough memory ({reason or 'MemoryError'}); use a smaller model or fewer rows at once."
    place = traces.extract_tb(failure.__traceback__)[-1]
    return 1, (
        f"{said_of(failure)} at {os.path.basename(place.filename)}, line {place.lineno}; a fault of Stepwell unless "
        "the code is your own, and --traceback shows the way to it."
    )


def _reader_left(failure: Exception) -> bool:
    """True where the output was not read to its end, as `head` does: nothing went wrong."""
    return isinstance(failure, BrokenPipeError)
