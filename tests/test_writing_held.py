"""A folder is held by one process at a time, and by none once that process has ended, however it ended."""

from __future__ import annotations

import os
import re
import signal

import pytest

from stepwell.errors import InputError
from stepwell.writing import LOCK, held


def child(folder, ready, done):
    """A process that holds the folder until `done` is closed; -1 in the parent's place is the child."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            with held(folder):
                os.write(ready, b"h")
                os.read(done, 1)
            code = 0
        finally:
            os._exit(code)
    return pid


def test_another_process_is_named_and_its_end_frees_the_folder(tmp_path):
    ready, told = os.pipe()
    wait, _ = os.pipe()
    pid = child(tmp_path, told, wait)
    assert os.read(ready, 1) == b"h"
    with pytest.raises(InputError, match=f"is being written by process {pid}; wait for its end"), held(tmp_path):
        pass
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert (tmp_path / LOCK).exists(), "the dead process could not remove it"
    with held(tmp_path):
        assert (tmp_path / LOCK).read_text() == str(os.getpid())
    assert not (tmp_path / LOCK).exists()


def test_the_same_process_cannot_hold_a_folder_twice(tmp_path):
    with held(tmp_path), pytest.raises(InputError, match=re.escape("by this very process")), held(tmp_path):
        pass
    with held(tmp_path):
        pass
