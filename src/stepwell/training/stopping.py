"""Ctrl-C, the scheduler's signal and a terminal that hangs up end a run between two updates, not inside one."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any, Self

from stepwell.errors import Interrupted
from stepwell.guarded import SIGNALS


class StopRequested:
    """True once SIGINT, SIGTERM or SIGHUP came; a second SIGINT, a person's, stops at once.

    A signal that is ignored stays so, as `nohup` and shells in the background have it. Outside the main thread it is
    never true.
    """

    def __init__(self) -> None:
        self._asked: set[int] = set()
        self._before: dict[int, Any] = {}

    def __bool__(self) -> bool:
        return bool(self._asked)

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            heeded = [name for name in SIGNALS if signal.getsignal(name) is not signal.SIG_IGN]
            self._before = {name: signal.signal(name, self._ask) for name in heeded}
        return self

    def __exit__(self, *_: object) -> None:
        for name, handler in self._before.items():
            signal.signal(name, signal.SIG_DFL if handler is None else handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and number in self._asked:
            raise Interrupted
        self._asked.add(number)
