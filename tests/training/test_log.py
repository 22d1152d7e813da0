"""The log is exact and whole: what is written is what was measured, and a resumed run's files are those of one run."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import sys
import types
from pathlib import Path

import pytest
from rich.console import Console
from rich.text import Text

from stepwell.errors import CheckpointError, InputError, UnknownName
from stepwell.meter import Budget
from stepwell.training.log import RunLog, read_lines
from stepwell.training.progress import Pace, Progress, make_progress, sparkline
from stepwell.training.settings import Settings
from stepwell.writing import append_line, append_lines, json_text, writable_folder, write_whole


def entry(step: int) -> tuple[dict, dict, list[dict]]:
    metrics = {"step": step, "reward": step / 3, "kl": float("nan") if step == 2 else 0.1 * step}
    return (
        metrics,
        {"seconds": {"rollout": 0.5}},
        [{"step": step, "prompt": "p", "completion": f"c{step}", "reward": 1}],
    )


def write_steps(log: RunLog, first: int, last: int) -> None:
    for step in range(first, last + 1):
        log.step(*entry(step))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


# files


def test_numbers_come_back_exactly_and_what_is_not_finite_is_null():
    values = [0.1, 1e-300, math.pi, 2**53 + 1, -0.0, 1 / 3]
    assert json.loads(json_text(values)) == values
    assert json.loads(json_text({"a": float("nan"), "b": [math.inf, -math.inf], "c": True})) == {
        "a": None,
        "b": [None, None],
        "c": True,
    }


def test_tensors_and_strange_text_can_be_written(tmp_path):
    import torch

    text = json_text({"loss": torch.tensor(0.25), "rows": torch.tensor([1, 2]), "said": "ä\ud800\u2028\n"})
    append_line(tmp_path / "a.jsonl", text)
    (found,) = read_lines(tmp_path / "a.jsonl")
    assert found == {"loss": 0.25, "rows": [1, 2], "said": "ä\ud800\u2028\n"}


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_whole(path, "old")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    for function in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, function, full)
            with pytest.raises(InputError, match=r"no space left to write '.*a\.json'; free some"):
                write_whole(path, "new")
        assert contents(tmp_path) == {"a.json": b"old"}
    write_whole(path, b"new")
    assert contents(tmp_path) == {"a.json": b"new"}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no device that is always full")
def test_a_full_disk_is_said_in_one_sentence():
    with pytest.raises(InputError, match="no space left to write '/dev/full'"):
        append_line("/dev/full", "{}")


def test_lines_are_added_all_or_none(tmp_path, monkeypatch):
    """The second write fails after the first has written a part: the part is taken back."""
    path = tmp_path / "a.jsonl"
    append_lines(path, ["1", "2"])

    class Torn:
        def __init__(self, file):
            self.file, self.calls = file, 0

        def write(self, data):
            self.calls += 1
            if self.calls == 2:
                raise OSError(errno.ENOSPC, "full")
            return self.file.write(data[:2])

        def __getattr__(self, name):
            return getattr(self.file, name)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

    monkeypatch.setattr(
        "stepwell.writing.open", lambda *a, **k: Torn(Path.open(Path(a[0]), *a[1:], **k)), raising=False
    )
    with pytest.raises(InputError, match="no space left"):
        append_lines(path, ["3", "4"])
    assert path.read_bytes() == b"1\n2\n"


def test_a_folder_is_proven_writable_before_anything_is_done(tmp_path):
    assert writable_folder(tmp_path / "a" / "b").is_dir()
    assert list((tmp_path / "a" / "b").iterdir()) == []
    (tmp_path / "file").write_text("x")
    for place in ("file", "file/a", "file/a/b"):
        with pytest.raises(InputError, match=r"'.*file' is a file where a folder is needed; remove it or choose"):
            writable_folder(tmp_path / place)
    assert (tmp_path / "file").read_text() == "x"


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.EACCES, "may not be written; change its permissions"),
        (errno.EROFS, "read-only file system"),
        (errno.EDQUOT, "no space left"),
        (errno.ENAMETOOLONG, "cannot be written: File name too long"),
    ],
)
def test_every_refusal_of_the_file_system_names_the_path_and_the_mend(tmp_path, monkeypatch, number, said):
    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(InputError, match=said) as caught:
        writable_folder(tmp_path / "out")
    assert str(tmp_path / "out") in str(caught.value)
    assert str(caught.value).count("\n") == 0


# the log of a run


def test_a_line_is_written_for_every_step_and_completion(tmp_path):
    log = RunLog(tmp_path / "run", config={"method": "grpo", "options": {"clip": 0.2}})
    write_steps(log, 1, 3)
    log.close()
    assert [line["step"] for line in read_lines(tmp_path / "run/metrics.jsonl")] == [1, 2, 3]
    assert read_lines(tmp_path / "run/metrics.jsonl")[1]["kl"] is None
    assert read_lines(tmp_path / "run/clock.jsonl")[0] == {"step": 1, "seconds": {"rollout": 0.5}}
    assert [line["completion"] for line in read_lines(tmp_path / "run/completions.jsonl")] == ["c1", "c2", "c3"]
    about = json.loads((tmp_path / "run/run.json").read_text())
    assert about["method"] == "grpo"
    assert about["options"] == {"clip": 0.2}
    assert set(about["versions"]) >= {"stepwell", "torch", "transformers"}


@pytest.mark.parametrize("torn", [b"", b'{"step": 5, "rew', b'{"step": 5}'])
def test_a_resumed_log_is_byte_for_byte_that_of_one_run(tmp_path, torn):
    """The run was killed after step 4, perhaps within a line; its checkpoint is of step 2."""
    whole = RunLog(tmp_path / "whole", name="run")
    write_steps(whole, 1, 5)
    first = RunLog(tmp_path / "parts", name="run")
    write_steps(first, 1, 4)
    for name in ("metrics", "completions", "clock"):
        with open(tmp_path / f"parts/{name}.jsonl", "ab") as file:
            file.write(torn)
    second = RunLog(tmp_path / "parts", name="run")
    second.keep_until(2)
    assert [line["step"] for line in read_lines(tmp_path / "parts/completions.jsonl")] == [1, 2]
    write_steps(second, 3, 5)
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_nothing_is_kept_of_a_run_that_goes_on_from_its_start(tmp_path):
    write_steps(RunLog(tmp_path), 1, 2)
    log = RunLog(tmp_path)
    log.keep_until(0)
    assert all((tmp_path / f"{name}.jsonl").read_bytes() == b"" for name in ("metrics", "clock", "completions"))


def test_metrics_that_are_shorter_than_the_checkpoint_are_an_error(tmp_path):
    write_steps(RunLog(tmp_path), 1, 2)
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl' holds 2 whole steps where the checkpoint has 3"):
        RunLog(tmp_path).keep_until(3)


def test_an_earlier_run_is_neither_mixed_with_another_nor_relabelled(tmp_path):
    write_steps(RunLog(tmp_path, config={"method": "grpo"}), 1, 2)
    before = contents(tmp_path)
    log = RunLog(tmp_path, config={"method": "ppo"})
    with pytest.raises(InputError, match="holds a run already; resume it or choose another folder"):
        write_steps(log, 1, 1)
    assert contents(tmp_path) == before


def test_a_log_without_a_folder_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    log = RunLog(None)
    write_steps(log, 1, 1)
    log.keep_until(1)
    log.close()
    assert list(tmp_path.iterdir()) == []


# trackers


def test_an_unknown_tracker_is_an_error_with_the_nearest_name(tmp_path):
    with pytest.raises(UnknownName, match="did you mean 'tensorboard'"):
        RunLog(tmp_path, ["tensorbord"])


@pytest.mark.parametrize(
    ("tracker", "module", "package"),
    [
        ("tensorboard", "torch.utils.tensorboard", "'stepwell[tracking]'"),
        ("wandb", "wandb", "wandb"),
        ("trackio", "trackio", "trackio"),
    ],
)
def test_a_tracker_that_is_not_installed_says_what_to_install(tmp_path, monkeypatch, tracker, module, package):
    monkeypatch.setitem(sys.modules, module, None)  # an import of it fails
    with pytest.raises(InputError) as caught:
        RunLog(tmp_path, [tracker])
    assert f"pip install {package}" in str(caught.value)


def test_tensorboard_gets_every_number(tmp_path):
    """A resumed run's steps take the place of those that were lost."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = RunLog(tmp_path, ["tensorboard"])
    write_steps(log, 1, 3)
    log.close()
    log = RunLog(tmp_path, ["tensorboard"])
    log.keep_until(1)
    write_steps(log, 2, 2)
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"step", "reward", "kl", "clock/seconds/rollout"}
    assert [event.step for event in events.Scalars("reward")] == [1, 2]


class FakeService(types.ModuleType):
    """What wandb and trackio have in common."""

    def __init__(self, fail: bool = False):
        super().__init__("service")
        self.started, self.lines, self.finished, self.fail = {}, [], False, fail

    def init(self, **given):
        self.started = given

    def log(self, numbers, step):
        if self.fail:
            raise ConnectionError("no network")
        self.lines.append((step, numbers))

    def finish(self):
        self.finished = True


@pytest.mark.parametrize("tracker", ["wandb", "trackio"])
def test_a_service_gets_every_number_with_its_step(tmp_path, monkeypatch, tracker):
    service = FakeService()
    monkeypatch.setitem(sys.modules, tracker, service)
    log = RunLog(tmp_path / "a", [tracker], config={"options": {"clip": 0.2}})
    write_steps(log, 1, 1)
    log.close()
    assert service.started["name"] == "a"
    assert service.started["config"] == {"options": {"clip": 0.2}}
    assert service.lines == [(1, {"step": 1.0, "reward": 1 / 3, "kl": 0.1, "clock/seconds/rollout": 0.5})]
    assert service.finished


def test_a_service_that_fails_ends_no_run(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", FakeService(fail=True))
    log = RunLog(tmp_path, ["wandb"])
    with pytest.warns(UserWarning, match="wandb failed and is left out from now on: no network"):
        write_steps(log, 1, 2)
    assert len(read_lines(tmp_path / "metrics.jsonl")) == 2


# what a person sees


METRICS = {
    "step": 7,
    "reward": 0.25,
    "length": 12.5,
    "old_kl": 1e-5,
    "clip_fraction": 0.125,
    "gradient_norm": 1.5,
    "cost/forward": 15_000,
    "cost/reward_calls": 64,
}
TEXTS = [
    {"prompt": "long " * 40 + "what is 1 + 1?", "completion": "[bold]2[/bold]\x1b[2J\r\nand more " * 20, "reward": 1.0},
    {
        "prompt": [{"role": "user", "content": "hi"}],
        "completion": [{"role": "assistant", "content": "yo"}],
        "reward": 0,
    },
]


def drawn_at(width: int) -> str:
    console = Console(width=width, height=40, force_terminal=True, color_system=None, file=io.StringIO())
    progress = Progress(console)
    progress.start(Settings(steps=10, budget=Budget.parse("60s")), "gspo")
    progress.step(METRICS, {"wall_time": 75.0}, TEXTS, 0.7)
    progress.close()
    with console.capture() as capture:
        console.print(progress.view())
    return capture.get()


@pytest.mark.parametrize("width", [20, 40, 79, 80, 120, 200])
def test_the_view_fits_the_terminal_and_lets_no_text_steer_it(width):
    lines = drawn_at(width).splitlines()
    assert all(Text(line).cell_len <= width for line in lines)
    assert not any("\x1b" in line or "\r" in line for line in lines)


def test_the_view_shows_metrics_costs_and_completions():
    seen = drawn_at(120)
    for words in ("gspo", "10 steps or 60 seconds", "0.25", "12.5", "1.0e-05", "0.125", "15k", "64", "1m15s"):
        assert words in seen
    assert "what is 1 + 1?" in seen
    assert "[bold]2[/bold]" in seen
    assert "yo" in seen


def test_outside_a_terminal_there_is_one_line_a_step(capsys):
    progress = make_progress(True)
    progress.start(Settings(), "gspo")
    for step in (1, 2):
        progress.step({**METRICS, "step": step}, {"wall_time": 1.0}, TEXTS, step / 2)
    progress.close()
    shown = capsys.readouterr()
    assert [line.split("  ")[:2] for line in shown.out.splitlines()] == [["step 1", "50%"], ["step 2", "100%"]]
    assert shown.err == ""


def test_no_progress_shows_nothing(capsys):
    progress = make_progress(False)
    progress.start(Settings(), "gspo")
    progress.step(METRICS, {}, TEXTS, 0.5)
    progress.close()
    assert capsys.readouterr() == ("", "")


def test_the_time_left_goes_by_the_share_done_in_this_session():
    """A resumed run has 60 % behind it already; 10 % more took 10 seconds, so the last 30 % take 30."""
    pace = Pace(0.0)
    assert pace.remaining() is None
    pace.at(5.0, 0.6)
    pace.at(15.0, 0.7)
    assert pace.remaining() == pytest.approx(30.0)
    pace.at(45.0, 1.2)
    assert pace.remaining() == 0.0


def test_a_sparkline_is_the_course_of_the_means():
    assert sparkline([], 5) == ""
    assert sparkline([2.0, 2.0], 5) == "▁▁"
    assert sparkline([0, 0, 1, 1, float("nan")], 2) == "▁█"
    assert len(sparkline(list(range(1000)), 12)) == 12
