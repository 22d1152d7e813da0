"""The command line: `stepwell methods`, `solvers`, `sample`, `train`, `compare`, `report`, `check` and `tasks`.

Arguments are plain dataclasses, and heavy modules are imported inside a command, so that help comes at once.
"""

from __future__ import annotations

import os
import sys
import traceback as traces
from collections.abc import Sequence
from pathlib import Path

import stepwell
from stepwell.cli.arguments import parse
from stepwell.cli.command import Command
from stepwell.cli.compare import Check, Compare, ReportRuns
from stepwell.cli.lists import Methods, Solvers, Tasks
from stepwell.cli.sample import Sample
from stepwell.cli.train import Train, reward_named
from stepwell.errors import StepwellError

__all__ = ["COMMANDS", "Train", "main", "reward_named"]

ABOUT = f"""{stepwell.__doc__}

`stepwell COMMAND --help` lists the arguments of a command, `stepwell --version` prints the version."""

COMMANDS: dict[str, type[Command]] = {
    "methods": Methods,
    "solvers": Solvers,
    "sample": Sample,
    "train": Train,
    "compare": Compare,
    "report": ReportRuns,
    "check": Check,
    "tasks": Tasks,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 2 for a mistake that the user can mend, 130 after Ctrl-C."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["--version"]:
        print(f"stepwell {stepwell.__version__}")
        return 0
    try:
        parse(words or ["--help"], COMMANDS, "stepwell", ABOUT).run()
        sys.stdout.flush()
    except StepwellError as error:
        if "--traceback" in words:
            traces.print_exc()
        sentence = " ".join(str(error).split())
        print(f"stepwell: {sentence}{'' if sentence.endswith(('.', '?')) else '.'}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        hint = "; the same command with --resume continues from there" if _has_checkpoint(words) else ""
        print(f"stepwell: interrupted{hint}.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of the output, such as `head`, has stopped
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except SystemExit as end:  # tyro printed the help
        return end.code if isinstance(end.code, int) else 0
    return 0


def _has_checkpoint(words: Sequence[str]) -> bool:
    """True where the run that these words began has left something to resume."""
    after = [words[place + 1] for place, word in enumerate(words[:-1]) if word == "--out"]
    after += [word.removeprefix("--out=") for word in words if word.startswith("--out=")]
    return "train" in words[:1] and any(any(Path(out).glob("checkpoints/update-*")) for out in after)
