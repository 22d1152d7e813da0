"""The terminal, or whatever takes its place: a view of the work, which never decides whether the work goes on."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO


def printable(text: str) -> str:
    """The text without characters that steer a terminal: escapes, controls, changes of direction, half pairs.

    New lines and tabs stay; every other character that does not print becomes a space.

    Example:
        >>> printable("a\\x1b[31mb\\u202ec\\n")
        'a [31mb c\\n'
    """
    return "".join(letter if letter.isprintable() or letter in "\n\t" else " " for letter in text)


def one_line(text: str, most: int = 0) -> str:
    """The text on one line, printable, and cut to at most `most` characters where that is given.

    Example:
        >>> one_line("a long\\n  story", 9)
        'a long...'
    """
    line = " ".join(printable(text).split())
    return line if not most or len(line) <= most else line[: most - 3] + "..."


class Screen(io.TextIOBase):
    """A text stream that goes on when the one behind it fails: its reader is gone, its disk is full, it is closed.

    From the first failure on it takes everything and shows nothing; `failure` says why, and is None while it works.
    Characters that the stream's encoding lacks are replaced. `stream` may be None, as `sys.stdout` is where a program
    was started without one.
    """

    def __init__(self, stream: TextIO | None):
        self.stream = stream
        self.failure: Exception | None = OSError("there is no stream") if stream is None else None

    def write(self, text: str) -> int:
        if self.stream is not None and self.failure is None:
            try:
                try:
                    self.stream.write(text)
                except UnicodeEncodeError:
                    encoding = self.stream.encoding or "ascii"
                    self.stream.write(text.encode(encoding, "replace").decode(encoding))
            except (OSError, ValueError) as error:  # ValueError: the stream is closed
                self.failure = error
        return len(text)

    def flush(self) -> None:
        if self.stream is not None and self.failure is None:
            try:
                self.stream.flush()
            except (OSError, ValueError) as error:
                self.failure = error

    def close(self) -> None:
        """Flush; the stream behind is its owner's to close."""
        self.flush()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return getattr(self.stream, "encoding", None) or "utf-8"

    @property
    def buffer(self) -> Any:
        return getattr(self.stream, "buffer", None)

    def isatty(self) -> bool:
        try:
            return self.stream is not None and self.failure is None and self.stream.isatty()
        except ValueError:
            return False

    def fileno(self) -> int:
        if self.stream is None:
            raise io.UnsupportedOperation("fileno")
        return self.stream.fileno()

    def writable(self) -> bool:
        return True


def screen(stream: Any) -> Screen:
    """The stream as one that never fails; itself where it is one already."""
    return stream if isinstance(stream, Screen) else Screen(stream)


@contextlib.contextmanager
def on_screen() -> Iterator[tuple[Screen, Screen]]:
    """Put screens in the place of standard output and standard error, and give them back at the end.

    What is left in the buffer of a stream that failed goes nowhere, so that Python does not stumble over it as it ends.
    """
    hold_standard_streams()
    before = sys.stdout, sys.stderr
    out, error = screen(sys.stdout), screen(sys.stderr)
    sys.stdout, sys.stderr = out, error  # type: ignore[assignment]
    try:
        yield out, error
    finally:
        sys.stdout, sys.stderr = before
        for each in (out, error):
            each.flush()
            if each.failure is not None:
                _discard(each)


def hold_standard_streams() -> None:
    """Keep the numbers of the three standard streams taken: a file that was opened under one of them would receive
    what is printed."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            place = os.open(os.devnull, os.O_RDWR)
            if place != number:
                os.dup2(place, number)
                os.close(place)


def _discard(failed: Screen) -> None:
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, failed.fileno())
        os.close(nowhere)
