"""A user's own code inside a run: whatever it changes around itself is put back, it may not hang, and it fails in one
sentence."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Self

from stepwell.errors import Interrupted, StepwellError
from stepwell.tensors import torch
from stepwell.terminal import hold_standard_streams, one_line, screen

AGAIN = 0.25
"""Seconds after which code that swallowed the end of its time is ended again."""
SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class OutOfTime(BaseException):
    """The time of a guarded piece of code is over. No `Exception`, so that code which catches these lets it pass."""


class Guarded:
    """A piece of a user's code: `with Guarded(refusal, seconds): ...`.

    Put back at its end, as the run depends on them: torch's grad and inference modes, autocast, default dtype and
    device, number of threads and determinism; the working folder, the filters of warnings, the handlers of signals, the
    standard streams. The global random generators and the environment are the user's own and stay as they are left.

    `refusal` makes the error that takes the place of any exception but a `StepwellError` and a person's Ctrl-C; it is
    called with the exception, which is an `OutOfTime` where `seconds` went by. Without it, exceptions pass unchanged.

    `seconds` bound code that runs in Python, sleeps, waits or matches a regular expression. A library's own
    computation (one call of C that does not come back) ends first. In another thread than the main one, sleeping and
    matching end first as well.
    """

    def __init__(self, refusal: Callable[[BaseException], StepwellError] | None = None, seconds: float | None = None):
        self.refusal, self.seconds = refusal, seconds
        self._limit: _Limit | None = None

    def __enter__(self) -> Self:
        self._around = _Surroundings()
        if self.seconds is not None:
            self._limit = _Limit(self.seconds)
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._limit is not None:
            self._limit.end()
        self._around.restore()
        if error is None or self.refusal is None or isinstance(error, StepwellError) or _from_keyboard(error):
            return
        if isinstance(error, OutOfTime) and not (self._limit is not None and self._limit.raised(error)):
            return  # the time of a guard around this one
        raise self.refusal(error) from error


def reason_of(error: BaseException, most: int = 200) -> str:
    """The message of an exception on one line, without its full stop; empty where it has none or cannot say it."""
    try:
        text = str(error)
    except BaseException:
        return ""
    return one_line(text, most).rstrip(".")


def first_line_of(error: BaseException) -> str:
    """The first line of an exception's message, or else the name of its kind, without its full stop: libraries add
    pages of advice. The line after a colon belongs to it.

    Example:
        >>> first_line_of(ValueError("Wrong field 'size':\\n    it is a text.\\nSee our page."))
        "Wrong field 'size': it is a text"
    """
    try:
        lines = str(error).strip().splitlines()
    except BaseException:
        lines = []
    first = lines[0].strip() if lines else type(error).__name__
    if first.endswith(":") and len(lines) > 1:
        first = f"{first} {lines[1].strip()}"
    return first.rstrip(" .:")


def said_of(error: BaseException) -> str:
    """An exception as a message names it.

    Example:
        >>> said_of(KeyError("score")), said_of(ValueError())
        ("KeyError ('score')", 'ValueError')
    """
    reason = reason_of(error)
    return f"{type(error).__name__}{f' ({reason})' if reason else ''}"


def _from_keyboard(error: BaseException) -> bool:
    """True for Ctrl-C. While a run handles the signal itself, it says so by `Interrupted`, and any other
    `KeyboardInterrupt` was raised by the user's code."""
    if isinstance(error, Interrupted):
        return True
    return type(error) is KeyboardInterrupt and signal.getsignal(signal.SIGINT) is signal.default_int_handler


class _Surroundings:
    """The state of the interpreter and of torch that a run depends on."""

    def __init__(self) -> None:
        self.process = os.getpid()
        self.main = threading.current_thread() is threading.main_thread()
        self.handlers = {name: signal.getsignal(name) for name in SIGNALS} if self.main else {}
        self.filters = list(warnings.filters)
        self.streams = sys.stdout, sys.stderr
        sys.stdout, sys.stderr = screen(sys.stdout), screen(sys.stderr)
        self.folder: str | None = None
        with contextlib.suppress(OSError):
            self.folder = os.getcwd()
        self.mask = os.umask(0o22)
        os.umask(self.mask)
        self.settings = _torch_settings()
        self.grad, self.inference = torch.is_grad_enabled(), torch.inference_mode(torch.is_inference_mode_enabled())
        self.inference.__enter__()
        torch.set_grad_enabled(self.grad)  # which entering a mode of inference changes

    def restore(self) -> None:
        if os.getpid() != self.process:  # a copy of the run that the code forked and let return
            os._exit(0)
        self.inference.__exit__(None, None, None)
        torch.set_grad_enabled(self.grad)
        now = _torch_settings()
        for name, (value, put) in self.settings.items():
            if now[name][0] != value:
                put(value)
        sys.stdout, sys.stderr = self.streams
        hold_standard_streams()
        if warnings.filters != self.filters:
            warnings.resetwarnings()
            warnings.filters.extend(self.filters)  # type: ignore[attr-defined]
        os.umask(self.mask)
        with contextlib.suppress(OSError):
            if self.folder is not None and os.getcwd() != self.folder:
                os.chdir(self.folder)
        for name, handler in self.handlers.items():
            if handler is not None and signal.getsignal(name) is not handler:
                signal.signal(name, handler)


def _torch_settings() -> dict[str, tuple[Any, Callable[[Any], Any]]]:
    """Each setting of torch with the function that puts it back."""

    def deterministic(value: tuple[bool, bool]) -> None:
        torch.use_deterministic_algorithms(value[0], warn_only=value[1])

    def device(value: Any) -> None:
        torch.set_default_device(None if value == torch.device("cpu") else value)

    settings: dict[str, tuple[Any, Callable[[Any], Any]]] = {
        "device": (torch.get_default_device(), device),
        "dtype": (torch.get_default_dtype(), torch.set_default_dtype),
        "threads": (torch.get_num_threads(), torch.set_num_threads),
        "precision": (torch.get_float32_matmul_precision(), torch.set_float32_matmul_precision),
        "deterministic": (
            (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()),
            deterministic,
        ),
    }
    for kind in ("cpu", "cuda"):
        put = functools.partial(torch.set_autocast_enabled, kind)
        settings[f"autocast on {kind}"] = (torch.is_autocast_enabled(kind), put)
    return settings


class _Limit:
    """The end of a piece of code's time, kept by a timer's signal in the main thread, elsewhere by a watching thread.

    A watcher is there in the main thread as well, since code that sets an alarm of its own takes the timer away.
    """

    running: list[_Limit] = []  # noqa: RUF012 those of the main thread, the outermost first
    before: Any = None
    timer: tuple[float, float] = (0.0, 0.0)

    def __init__(self, seconds: float):
        self.deadline = time.monotonic() + seconds
        self.thread = threading.get_ident()
        self.main = threading.current_thread() is threading.main_thread() and hasattr(signal, "setitimer")
        self.ended, self.lock, self.over = False, threading.Lock(), threading.Event()
        if self.main and not _Limit.running:
            _Limit.before = signal.signal(signal.SIGALRM, _ring)
            _Limit.timer = signal.setitimer(signal.ITIMER_REAL, 0.0)
        threading.Thread(target=self._watch, name="stepwell-limit", daemon=True).start()
        if self.main:
            _Limit.running.append(self)
            _wind()

    def end(self) -> None:
        """The code is done; no exception of this limit comes from here on."""
        self.ended = True
        while not self.over.is_set():
            with contextlib.suppress(OutOfTime), self.lock:  # in another thread it may come here, too
                self.over.set()
        if not self.main:
            take_in(OutOfTime)
            return
        _Limit.running.remove(self)
        signal.signal(signal.SIGALRM, _ring)
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        if _Limit.running:
            _wind()
        elif callable(_Limit.before):  # else ours stays, which does nothing: the default one would end the program
            signal.signal(signal.SIGALRM, _Limit.before)
            signal.setitimer(signal.ITIMER_REAL, *_Limit.timer)

    def raised(self, error: OutOfTime) -> bool:
        """True for an exception in this limit's own name."""
        return not self.main or error.args == (self,)

    def _watch(self) -> None:
        wait = self.deadline - time.monotonic()
        while not self.over.wait(max(wait, 0.0)):
            with self.lock:
                if self.over.is_set():
                    return
                if self.main:
                    signal.pthread_kill(self.thread, signal.SIGALRM)
                else:
                    raise_in(self.thread, OutOfTime)
            wait = AGAIN


def _wind() -> None:
    """Set the timer to the earliest end, and to repeat, for code that swallows the first ring."""
    first = min(limit.deadline for limit in _Limit.running)
    signal.setitimer(signal.ITIMER_REAL, max(first - time.monotonic(), 1e-3), AGAIN)


def _ring(number: int, frame: FrameType | None) -> None:
    """End the code, but not this file's own lines around it, in the name of the outermost limit that is reached."""
    if frame is not None and frame.f_code.co_filename == __file__:
        return
    now = time.monotonic()
    for limit in _Limit.running:
        if limit.deadline <= now and not limit.ended:
            raise OutOfTime(limit)


def raise_in(thread: int, kind: type[BaseException]) -> None:
    """Raise an exception in a thread at its next line of Python, in place of one that is not raised yet."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(kind))


def take_in(kind: type[BaseException]) -> None:
    """Let an exception end here that another thread may have sent on its way to this one: a last one takes its place.

    Taking it back instead would leave the interpreter looking for it, for ever in a tracer.
    """
    with contextlib.suppress(kind):
        raise_in(threading.get_ident(), kind)
        while True:
            pass
