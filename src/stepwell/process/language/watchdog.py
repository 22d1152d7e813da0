"""A limit on the time that Python code of others may take, such as a chat template that loops."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from stepwell.guarded import raise_in, take_in

T = TypeVar("T")


class TookTooLong(Exception):
    """Code was interrupted at the end of its time."""


class Watchdog:
    """Interrupts Python code that runs longer than it may, in whatever thread it runs.

    One thread of its own waits for the earliest deadline and raises `TookTooLong` inside the late code, which gets it
    with its next instruction; a single call into C cannot be interrupted. A call that ends in time costs microseconds.
    """

    def __init__(self) -> None:
        self._change = threading.Condition()
        self._deadlines: dict[int, float] = {}  # of the threads that run such code, by their identity
        self._thread: threading.Thread | None = None
        self._wakes = 0.0  # the time at which it looks at them next

    def run(self, function: Callable[[], T], seconds: float) -> T:
        """The function's value; raises `TookTooLong` where it takes more than `seconds`."""
        own = threading.get_ident()
        if own in self._deadlines:  # called by code that has a deadline already
            return function()
        with self._change:
            if self._thread is None or not self._thread.is_alive():  # none survives a fork
                self._thread = threading.Thread(target=self._watch, name="stepwell-watchdog", daemon=True)
                self._thread.start()
            self._deadlines[own] = time.monotonic() + seconds
            if self._deadlines[own] < self._wakes:
                self._change.notify()
        late = False
        try:
            return function()
        finally:
            with self._change:
                late = self._deadlines.pop(own, None) is None
            if late:  # it may have ended on its own just then: the interruption counts all the same
                take_in(TookTooLong)
                raise TookTooLong(f"It was interrupted after {seconds:g} seconds.")

    def _watch(self) -> None:
        with self._change:
            while True:
                now = time.monotonic()
                for thread, deadline in list(self._deadlines.items()):
                    if deadline <= now:
                        del self._deadlines[thread]
                        raise_in(thread, TookTooLong)
                self._wakes = min(self._deadlines.values(), default=math.inf)
                self._change.wait(self._wakes - now if self._deadlines else None)


WATCHDOG = Watchdog()
