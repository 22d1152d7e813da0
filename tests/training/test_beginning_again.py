"""A run that was killed early begins again; one whose newest files are damaged goes on from the checkpoint before."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch

import stepwell as sw
from stepwell.errors import CheckpointError, InputError, RewardError
from stepwell.training import checkpoint
from stepwell.training.log import COMPLETIONS, METRICS, RunLog, read_lines
from stepwell.training.loop import Trainer
from stepwell.writing import held


def longer(completions, **columns):
    return [float(len(text)) + 0.1 * text.count(2) for text in completions]


def go(out, resume=False, reward=longer, **settings):
    model = sw.exact.markov(symbols=3, length=4, prompts=5, seed=3)
    given = {"steps": 3, "learning_rate": 0.1, "prompts_per_step": 2, "group_size": 3, "checkpoint_every": 1, "keep": 9}
    return sw.train(model, [{"prompt": i} for i in range(5)], reward, out=out, resume=resume, **{**given, **settings})


def same(one, two):
    pairs = zip(one.process.module.parameters(), two.process.module.parameters(), strict=True)
    return all(torch.equal(*pair) for pair in pairs)


class Killed(BaseException):
    """Stands for SIGKILL."""


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_anew(tmp_path, monkeypatch):
    whole = go(tmp_path / "whole")

    def kill(*_):
        raise Killed

    monkeypatch.setattr(checkpoint, "write", kill)
    with pytest.raises(Killed):
        go(tmp_path / "run")
    monkeypatch.undo()
    assert not list((tmp_path / "run").glob("checkpoints/update-*"))
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    with pytest.warns(UserWarning, match="no checkpoint in .* yet, so the run begins anew"):
        again = go(tmp_path / "run", resume=True)
    assert same(whole, again)
    assert same(whole, go(tmp_path / "other")), "it can be started, too"
    assert (tmp_path / "run" / METRICS).read_bytes() == (tmp_path / "whole" / METRICS).read_bytes()


def test_the_beginning_is_a_checkpoint_and_another_run_may_take_its_place(tmp_path, monkeypatch):
    def kill(self):
        raise Killed

    monkeypatch.setattr(Trainer, "collect", kill)
    with pytest.raises(Killed):
        go(tmp_path / "run")
    monkeypatch.undo()
    assert checkpoint.newest(tmp_path / "run" / "checkpoints").name == checkpoint.FIRST
    run = go(tmp_path / "run", seed=5)  # another one: nothing was lost
    assert same(run, go(tmp_path / "other", seed=5))
    with pytest.raises(InputError, match="holds a run already"):
        go(tmp_path / "run")


def test_a_run_that_fails_before_its_first_update_leaves_no_checkpoint(tmp_path):
    def fails(completions, **columns):
        raise ValueError("not yet")

    with pytest.raises(RewardError, match="not yet"):
        go(tmp_path / "run", reward=fails)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_checkpoints_are_made_by_time(tmp_path):
    go(tmp_path / "often", checkpoint_every=0, checkpoint_seconds=1e-9)
    assert len(checkpoint.complete(tmp_path / "often" / "checkpoints")) == 1 + 3
    go(tmp_path / "never", checkpoint_every=0, checkpoint_seconds=0.0)
    names = [path.name for path in checkpoint.complete(tmp_path / "never" / "checkpoints")]
    assert names == ["update-00000003", checkpoint.FIRST]


DAMAGES = ("a file of the newest", "a line of the log", "the log's first line", "the newest twice")


@pytest.mark.parametrize("damage", DAMAGES)
def test_an_older_checkpoint_is_gone_on_from(damage, tmp_path):
    whole = go(tmp_path / "whole")
    go(tmp_path / "run", steps=2)
    folder = tmp_path / "run"
    lines = (folder / METRICS).read_bytes().splitlines(keepends=True)
    found = checkpoint.complete(folder / "checkpoints")
    if damage == "a line of the log":
        (folder / METRICS).write_bytes(lines[0] + lines[1][:9])
    elif damage == "the log's first line":
        (folder / METRICS).write_bytes(b"\0\0\0" + lines[0] + lines[1])
    else:
        for path in found[: 2 if "twice" in damage else 1]:
            (path / "parameters.safetensors").write_bytes(b"")
    with pytest.warns(UserWarning, match="The run goes on from the checkpoint before it"):
        again = go(folder, resume=True)
    assert same(whole, again)
    for name in (METRICS, COMPLETIONS):
        assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_damaged_newest_checkpoint_of_another_run_is_still_refused(tmp_path):
    go(tmp_path / "run")
    newest = checkpoint.newest(tmp_path / "run" / "checkpoints")
    (newest / "state.json").write_text("{")
    with pytest.raises(CheckpointError, match="seed=0, not 4"), pytest.warns(UserWarning, match="before it"):
        go(tmp_path / "run", resume=True, seed=4)


def test_a_broken_line_of_completions_takes_no_other_with_it(tmp_path):
    log = RunLog(tmp_path)
    for step in (1, 2, 3):
        log.step({"step": step}, {}, [{"step": step, "completion": "a"}, {"step": step, "completion": "b"}])
    lines = (tmp_path / COMPLETIONS).read_bytes().splitlines(keepends=True)
    (tmp_path / COMPLETIONS).write_bytes(b"\0broken\n" + b"".join(lines[1:3]) + lines[3][:7] + b"".join(lines[4:]))
    RunLog(tmp_path).keep_until(2)
    kept = [(entry["step"], entry["completion"]) for entry in read_lines(tmp_path / COMPLETIONS)]
    assert kept == [(1, "b"), (2, "a")]


def test_what_a_checkpoint_counts_on_is_on_the_disk_before_it(tmp_path, monkeypatch):
    synced, write = [], checkpoint.write
    plain = os.fsync

    def fsync(handle):
        synced.append(os.readlink(f"/proc/self/fd/{handle}"))
        plain(handle)

    def after(folder, state, tensors):
        done = state["position"]["step"]
        if done:
            assert {str(tmp_path / "run" / name) for name in (METRICS, COMPLETIONS)} <= set(synced)
        synced.clear()
        write(folder, state, tensors)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(checkpoint, "write", after)
    go(tmp_path / "run")


def test_a_folder_that_is_written_is_not_written_by_another(tmp_path):
    (tmp_path / "run").mkdir()
    with held(tmp_path / "run"), pytest.raises(InputError, match="is being written by"):
        go(tmp_path / "run")


def test_a_run_that_another_process_finished_meanwhile_is_not_lost(tmp_path, monkeypatch):
    """The folder is looked at again once it is held: another process may have written into it until then."""
    from stepwell.training import loop

    plain = loop.begin

    def begin(*arguments):
        monkeypatch.setattr(loop, "begin", plain)
        go(tmp_path / "run")
        return plain(*arguments)

    monkeypatch.setattr(loop, "begin", begin)
    with pytest.raises(InputError, match="holds a run already"):
        go(tmp_path / "run", seed=5)
    assert len(read_lines(tmp_path / "run" / METRICS)) == 3
    assert len(checkpoint.complete(tmp_path / "run" / "checkpoints")) == 1 + 3


def test_the_names_of_new_folders_are_on_the_disk(tmp_path, monkeypatch):
    synced, plain = set(), os.fsync

    def fsync(handle):
        synced.add(os.readlink(f"/proc/self/fd/{handle}"))
        plain(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    go(tmp_path / "one" / "two" / "run", steps=1)
    run = tmp_path / "one" / "two" / "run"
    assert {str(path) for path in (tmp_path, run.parent.parent, run.parent, run, run / "checkpoints")} <= synced


def test_a_reward_that_changes_the_working_folder_moves_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    go("run", on_step=lambda metrics: os.chdir(tmp_path / "elsewhere"))
    assert {"run", "elsewhere"} == {path.name for path in tmp_path.iterdir()}
    assert len((tmp_path / "run" / METRICS).read_text().splitlines()) == 3
    assert (tmp_path / "run" / "model.safetensors").exists()
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_whatever_ends_a_run_from_outside_leaves_a_checkpoint(error, tmp_path):
    whole = go(tmp_path / "whole")

    def stop(metrics):
        if metrics["step"] == 2:
            raise error

    model = sw.exact.markov(symbols=3, length=4, prompts=5, seed=3)
    settings = {"steps": 3, "learning_rate": 0.1, "prompts_per_step": 2, "group_size": 3}
    prompts = [{"prompt": i} for i in range(5)]
    with pytest.raises(error):
        sw.train(model, prompts, longer, out=tmp_path / "run", on_step=stop, **settings)
    assert checkpoint.newest(tmp_path / "run" / "checkpoints").name == "update-00000002"
    assert same(whole, go(tmp_path / "run", resume=True))


def test_a_fingerprint_guards_settings_that_are_not_named_free(tmp_path):
    go(tmp_path / "run")
    state = json.loads((checkpoint.newest(tmp_path / "run" / "checkpoints") / "state.json").read_text())
    guarded = set(state["fingerprint"]["settings"])
    assert {"rows_at_once", "seed", "precision", "shuffle", "learning_rate"} <= guarded
    assert not guarded & {"steps", "keep", "checkpoint_seconds"}
    with pytest.raises(CheckpointError, match="rows_at_once=None, not 2"):
        go(tmp_path / "run", resume=True, rows_at_once=2)
