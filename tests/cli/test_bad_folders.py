"""A folder that cannot be written to, resumed from, or read is refused in one line, and stays as it was."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from stepwell.cli import main


def test_a_run_that_is_stopped_before_it_began_leaves_nothing(bench, capsys, monkeypatch):
    """Nor does it promise that --resume continues it."""

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("stepwell.process.language.build.language", stop)
    capsys.readouterr()  # what saving the small model printed
    assert main(bench.words()) == 130
    assert capsys.readouterr().err == "stepwell: interrupted.\n"
    assert not bench.out.exists()


def test_the_model_s_own_folder_is_not_written_over(bench):
    before = sorted(path.name for path in bench.model.iterdir())
    assert "which would be overwritten." in bench.refused(*bench.words("--out", str(bench.model)))
    assert sorted(path.name for path in bench.model.iterdir()) == before


def test_a_file_in_the_place_of_the_folder(bench):
    bench.write("run", "mine")
    for place in ("run", "run/a"):
        line = bench.refused(*bench.words("--out", place))
        assert "'run' is a file where a folder is needed; remove it or choose another folder" in line
    assert bench.out.read_text() == "mine\n"


def test_a_disk_that_is_full_from_the_start(bench, monkeypatch):
    """Root may write anywhere, so the refusal of the file system is played."""

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    assert "There is no space left to write 'run'; free some or choose another" in bench.refused(*bench.words())
    assert not bench.out.exists()


def test_a_disk_that_fills_up_during_the_run(bench, monkeypatch):
    """Files are put in their place by `os.replace`; the third time there is no space left."""
    replace, calls = os.replace, []

    def full(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) >= 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        line = bench.refused(*bench.words("--checkpoint-every", "1"))
    assert "o space left" in line
    assert str(bench.out.name) in line
    bench.whole()


def test_an_earlier_run_is_not_overwritten(bench):
    assert main(bench.words()) == 0
    before = (bench.out / "metrics.jsonl").read_bytes()
    assert "'run' holds a run already; resume it with --resume or choose" in bench.refused(*bench.words())
    assert (bench.out / "metrics.jsonl").read_bytes() == before


def test_nothing_to_resume(bench):
    assert "no run to resume in 'run'; start it without --resume" in bench.refused(*bench.words("--resume"))
    words = [word for word in bench.words("--resume") if word not in ("--out", "run")]
    assert "resume needs the folder of the run to go on with; name it with out." in bench.refused(*words)
    assert not bench.out.exists()


def test_a_checkpoint_of_another_model_or_method(bench, model_folder):
    assert main(bench.words()) == 0
    before = {path: path.read_bytes() for path in bench.out.rglob("*") if path.is_file()}
    other = str(model_folder("qwen2", hidden_size=48))
    line = bench.refused(*bench.words("--resume", "--steps", "3", "--model", other))
    assert "update-00000002' is of another model; resume with the model it was started with" in line
    line = bench.refused(*bench.words("--resume", "--steps", "3", "--method", "gspo"))
    assert "is of another method; resume with the method and options it was started with" in line
    line = bench.refused(*bench.words("--resume", "--steps", "3", "--compile"))
    assert "update-00000002' is of another process (compiled was false, now true); resume with the process" in line
    assert {path: path.read_bytes() for path in bench.out.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("name", ["parameters.safetensors", "state.json", "manifest.json"])
def test_a_truncated_checkpoint(bench, name):
    assert main(bench.words("--keep", "1")) == 0
    (newest,) = [path for path in bench.out.rglob(name) if "update-00000002" in str(path)]
    newest.write_bytes(newest.read_bytes()[:-9])
    line = bench.refused(*bench.words("--resume", "--steps", "3"))
    assert name in line
    assert "update-00000002" in line
    assert "to resume from an earlier" in line


# as a program of its own


def test_a_process_of_its_own_says_the_same(bench, start):
    bench.write("data.jsonl", '{"prompt": "a"')
    done = start("stepwell", *bench.words(), folder=bench.folder).wait()
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "data.jsonl, line 1 is no JSON" in done.stderr
    done = start("stepwell", *bench.words(), "--traceback", folder=bench.folder).wait()
    assert done.returncode == 2
    assert "Traceback" in done.stderr
    assert "data.jsonl, line 1 is no JSON" in done.stderr.splitlines()[-1]


def test_a_failing_reward_writes_one_line_on_standard_error_of_a_process(bench, start):
    words = bench.words("--reward", "rewards.py:raises_later")
    words = [word for word in words if word != "--no-progress"]
    done = start("stepwell", *words, "--steps", "4", folder=bench.folder).wait()
    assert done.returncode == 2
    assert len(done.stdout.splitlines()) == 2  # the two steps that were made
    assert done.stderr.count("\n") == 1
