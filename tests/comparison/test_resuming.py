"""A comparison that was interrupted goes on, and ends as if it had not been."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import time

import pytest
import torch

from stepwell.comparison.report.runs import report_runs
from stepwell.comparison.results import Comparison
from stepwell.comparison.resuming import ENDS
from stepwell.comparison.run import compare
from stepwell.errors import CheckpointError, InputError
from stepwell.writing import LOCK, held

REQUEST = {"methods": "grpo,rloo", "budget": "3-steps", "seeds": 2, "progress": False}


def results(folder):
    """The content of comparison.json without the times in it."""
    content = json.loads((folder / "comparison.json").read_text())
    content.pop("made")

    def timeless(value):
        if isinstance(value, dict):
            return {name: timeless(entry) for name, entry in value.items() if "wall_time" not in name}
        return [timeless(entry) for entry in value] if isinstance(value, list) else value

    return timeless(content)


class Stops:
    """The task's process, which is interrupted as it is made for the given time."""

    def __init__(self, process, after):
        self.process, self.left = process, after

    def __call__(self):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        return self.process()


def figure(start, ends):
    return f"<svg>{'|'.join(f'{label}:{len(values)}' for label, values in ends.items())}</svg>"


@pytest.fixture
def drawn(tiny):
    """The task with a figure of tensors, which a resumed comparison has to draw of all methods too."""
    show = dataclasses.replace(tiny, figure=figure)
    made = show.process

    def process():
        model = made()
        model.finish = lambda states, of=model.finish: _as_tensors(of(states))
        return model

    return dataclasses.replace(show, process=process)


def _as_tensors(samples):
    return dataclasses.replace(samples, values=[torch.tensor(value) for value in samples.values])


@pytest.mark.parametrize("after", range(2, 8))
def test_a_resumed_comparison_equals_one_without_an_interruption(tiny, after, tmp_path):
    """Wherever it was interrupted: processes are made for the warm-up, for judging, and for each of four runs."""
    compare(tiny, out=tmp_path / "whole", **REQUEST)
    stopping = dataclasses.replace(tiny, process=Stops(tiny.process, after))
    with pytest.raises(KeyboardInterrupt):
        compare(stopping, out=tmp_path / "cut", **REQUEST)
    before = results(tmp_path / "cut") if (tmp_path / "cut" / "comparison.json").exists() else {"entries": []}
    compare(tiny, out=tmp_path / "cut", resume=True, **REQUEST)
    assert results(tmp_path / "cut") == results(tmp_path / "whole")
    for kept, entry in zip(before["entries"], results(tmp_path / "cut")["entries"], strict=False):
        assert entry["trials"][: len(kept["trials"])] == kept["trials"]


def test_what_is_done_is_not_done_again(tiny, tmp_path):
    compare(tiny, out=tmp_path, **REQUEST)
    before = results(tmp_path)
    once = dataclasses.replace(tiny, process=Stops(tiny.process, 2))  # made once, to look at its kind
    compare(once, out=tmp_path, resume=True, **REQUEST)
    assert results(tmp_path) == before


def test_the_figure_of_a_resumed_comparison_shows_every_method(drawn, tmp_path):
    compare(drawn, out=tmp_path / "whole", **REQUEST)
    with pytest.raises(KeyboardInterrupt):
        compare(dataclasses.replace(drawn, process=Stops(drawn.process, 4)), out=tmp_path / "cut", **REQUEST)
    assert (tmp_path / "cut" / ENDS).exists()
    compare(drawn, out=tmp_path / "cut", resume=True, **REQUEST)
    assert results(tmp_path / "cut") == results(tmp_path / "whole")
    assert "grpo:" in results(tmp_path / "cut")["figure"]
    assert not (tmp_path / "cut" / ENDS).exists()


def test_kept_runs_that_were_interrupted_begin_anew(tiny, tmp_path):
    compare(tiny, out=tmp_path / "whole", keep_runs=True, **REQUEST)
    stopping = dataclasses.replace(tiny, process=Stops(tiny.process, 5))
    with pytest.raises(KeyboardInterrupt):
        compare(stopping, out=tmp_path / "cut", keep_runs=True, **REQUEST)
    half = tmp_path / "cut" / "runs" / "rloo" / "seed-1"
    half.mkdir(parents=True, exist_ok=True)
    (half / "metrics.jsonl").write_text('{"step": 1}\n')
    compare(tiny, out=tmp_path / "cut", keep_runs=True, resume=True, **REQUEST)
    for name in ("rloo", "grpo"):
        for seed in ("seed-0", "seed-1"):
            kept = [
                (tmp_path / which / "runs" / name / seed / "metrics.jsonl").read_bytes() for which in ("cut", "whole")
            ]
            assert kept[0] == kept[1]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"budget": "4-steps"}, 'budget was "3 steps", now "4 steps"'),
        ({"methods": "grpo"}, "methods was"),
        ({"methods": "grpo:clip=0.1,rloo"}, "methods was"),
        ({"seeds": 3}, "seeds was"),
        ({"settings": {"learning_rate": 0.2}}, "settings's learning rate was 0.1, now 0.2"),
        ({"evaluation_samples": 2}, "evaluation's samples was 8, now 2"),
    ],
)
def test_another_comparison_is_refused(tiny, changes, said, tmp_path):
    compare(tiny, out=tmp_path, **REQUEST)
    before = (tmp_path / "comparison.json").read_bytes()
    with pytest.raises(CheckpointError, match="holds another comparison") as refused:
        compare(tiny, out=tmp_path, resume=True, **(REQUEST | changes))
    assert said in str(refused.value)
    assert (tmp_path / "comparison.json").read_bytes() == before


def test_other_prompts_or_rewards_are_another_comparison(tiny, tmp_path):
    compare(tiny, out=tmp_path, **REQUEST)
    with pytest.raises(CheckpointError, match="holds another comparison: task's data"):
        compare(dataclasses.replace(tiny, prompts=tiny.prompts[:3]), out=tmp_path, resume=True, **REQUEST)


def test_a_folder_with_a_comparison_is_not_written_over(tiny, tmp_path):
    compare(tiny, out=tmp_path, **REQUEST)
    before = (tmp_path / "comparison.json").read_bytes()
    with pytest.raises(InputError, match="holds a comparison already; go on with it by resume"):
        compare(tiny, out=tmp_path, **REQUEST)
    assert (tmp_path / "comparison.json").read_bytes() == before


def test_a_method_that_failed_is_tried_again(tiny, tmp_path):
    whole = compare(tiny, out=tmp_path, **REQUEST)
    failed = dataclasses.replace(whole.entries[0], trials=[], samples=[], error="seed 0: the judge is out")
    dataclasses.replace(whole, entries=[failed, whole.entries[1]]).save(tmp_path)
    again = compare(tiny, out=tmp_path, resume=True, **REQUEST)
    assert not again.errors
    assert [len(entry.trials) for entry in again.entries] == [2, 2]


def test_a_comparison_that_has_no_run_yet_is_reported_as_such(tiny, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        compare(dataclasses.replace(tiny, process=Stops(tiny.process, 3)), out=tmp_path, **REQUEST)
    assert Comparison.load(tmp_path).complete == []
    with pytest.raises(InputError, match="no finished run"):
        report_runs([tmp_path], tmp_path / "page.html")


COMMAND = ("compare", "mixture", "--methods", "flow-grpo", "--seeds", "2", "--evaluation-samples", "1", "--no-progress")


@pytest.mark.slow
def test_ctrl_c_says_what_is_kept_and_how_to_go_on(start, tmp_path):
    out = tmp_path / "compared"
    words = ("stepwell", *COMMAND, "--budget", "2-steps", "--out", str(out))
    program = start(*words)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (out.exists() and _done(out)):
        time.sleep(0.02)
    os.kill(program.process.pid, signal.SIGINT)
    assert program.wait().returncode == 130
    assert f"kept in {out}; the same command with --resume goes on from there." in program.stderr
    assert start(*words, "--resume").wait().returncode == 0
    assert start(*words[:-1], str(tmp_path / "whole")).wait().returncode == 0
    assert results(out) == results(tmp_path / "whole")


def _done(out):
    try:
        return sum(len(entry["trials"]) for entry in json.loads((out / "comparison.json").read_text())["entries"])
    except OSError:
        return 0


def test_resuming_needs_a_folder(refused):
    assert "--resume needs --out" in refused(*COMMAND, "--resume")


def test_a_folder_that_another_process_writes_is_refused(tiny, tmp_path):
    with held(tmp_path), pytest.raises(InputError, match="is being written by"):
        compare(tiny, out=tmp_path, **REQUEST)
    assert not (tmp_path / "comparison.json").exists()
    compare(tiny, out=tmp_path, **REQUEST)
    assert not (tmp_path / LOCK).exists()
