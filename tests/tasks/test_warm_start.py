"""A warm start is made once, whole or not at all, and is the same every time."""

import json
import threading

import pytest
import torch

from stepwell.errors import InputError
from stepwell.tasks.cache import cache_root, cached_folder
from stepwell.tasks.countdown import countdown
from stepwell.tasks.warm_start import character_tokenizer, threads


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("STEPWELL_CACHE", str(tmp_path / "cache"))


def writing(text, calls):
    def make(folder):
        calls.append(text)
        (folder / "weights").write_text(text)

    return make


def test_a_folder_is_made_once_for_each_key():
    calls = []
    first = cached_folder("thing", {"size": 1}, writing("a", calls))
    assert cached_folder("thing", {"size": 1}, writing("b", calls)) == first
    assert cached_folder("thing", {"size": 2}, writing("c", calls)) != first
    assert calls == ["a", "c"]
    assert (first / "weights").read_text() == "a"


def test_what_a_killed_run_left_behind_is_never_used():
    def dies(folder):
        (folder / "weights").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached_folder("thing", {}, dies)
    assert list(cache_root().iterdir()) == []
    assert (cached_folder("thing", {}, writing("whole", [])) / "weights").read_text() == "whole"


@pytest.mark.parametrize("damage", ["cut", "lost", "unsealed", "torn"])
def test_a_damaged_folder_is_made_anew(damage):
    folder = cached_folder("thing", {}, writing("whole", []))
    if damage == "cut":
        (folder / "weights").write_text("wh")
    elif damage == "lost":
        (folder / "weights").unlink()
    elif damage == "unsealed":
        (folder / "stepwell.json").unlink()
    else:
        (folder / "stepwell.json").write_text('{"key": ')
    assert (cached_folder("thing", {}, writing("again", [])) / "weights").read_text() == "again"
    assert json.loads((folder / "stepwell.json").read_text())["files"] == {"weights": 5}


def test_runs_that_make_it_at_the_same_time_do_not_disturb_each_other():
    barrier, found = threading.Barrier(4), []

    def make(folder):
        (folder / "weights").write_text("same")
        barrier.wait(timeout=20)

    def run():
        found.append(cached_folder("thing", {}, make))

    runs = [threading.Thread(target=run) for _ in range(4)]
    for each in runs:
        each.start()
    for each in runs:
        each.join()
    assert len(set(found)) == 1
    assert [path.name for path in cache_root().iterdir()] == [found[0].name]


def test_a_cache_that_cannot_be_written_names_its_variable(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("STEPWELL_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError, match="STEPWELL_CACHE"):
        cached_folder("thing", {}, writing("a", []))


def test_the_tokenizer_gives_back_every_character(tmp_path):
    from transformers import AutoTokenizer

    character_tokenizer("0123456789+-* =:").save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    ids = loaded("2 5 9=47:")["input_ids"]
    assert len(ids) == 9
    assert loaded.decode(ids) == "2 5 9=47:"
    assert loaded.unk_token_id not in ids


def test_the_same_settings_give_the_same_start(tmp_path, monkeypatch):
    """The global generator is left alone."""
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first = countdown(warm_steps=2).process()
    assert torch.equal(before, torch.random.get_rng_state())
    monkeypatch.setenv("STEPWELL_CACHE", str(tmp_path / "other"))
    second = countdown(warm_steps=2).process()
    for one, other in zip(first.module.parameters(), second.module.parameters(), strict=True):
        assert torch.equal(one, other)
    third = countdown(warm_steps=2).process()
    assert third.module is not second.module


def test_threads_are_given_back():
    before = torch.get_num_threads()
    with threads(1):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before
