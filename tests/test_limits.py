"""Limits of time end a user's code under a tracer, too, such as a debugger or one that measures coverage."""

from __future__ import annotations

import sys
import threading

import pytest

from stepwell.errors import RewardError
from stepwell.guarded import Guarded, OutOfTime
from stepwell.process.language.watchdog import TookTooLong, Watchdog


def loops():
    while True:
        pass


def guarded():
    with pytest.raises(RewardError, match="late"), Guarded(lambda error: RewardError("late"), 0.05):
        loops()
    return "gone on"


def watched():
    with pytest.raises(TookTooLong, match=r"after 0\.05 seconds"):
        Watchdog().run(loops, 0.05)
    return "gone on"


@pytest.mark.parametrize("code", [guarded, watched])
def test_code_that_was_interrupted_in_a_traced_thread_goes_on(code):
    """The interpreter is not left looking for an exception that was taken back."""
    said = []

    def run():
        sys.settrace(lambda frame, event, argument: None)
        said.append(code())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(20)
    assert said == ["gone on"]


def test_the_end_of_a_limit_is_no_exception_of_its_own():
    """Code that is done before its time ends without one, in another thread as well."""
    said = []

    def run():
        try:
            with Guarded(None, 60.0):
                said.append("done")
        except OutOfTime:
            said.append("late")

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(20)
    assert said == ["done"]
