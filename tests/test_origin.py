"""Where a user's code comes from: its file, the neighbours that it imports, and what it was made with."""

from __future__ import annotations

import copy
import re

import pytest
import torch

from stepwell.origin import is_own, origin
from stepwell.reward.loading import load_function
from stepwell.reward.verifiers import exact_match, regular_expression


def written(folder, **files):
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)


def digest(folder, name="reward"):
    return origin(load_function(f"{folder / 'mine.py'}:{name}"))


MINE = "import words\nfrom deep import inner\n\ndef reward(completions):\n    return [words.score('a')]\n"
OTHERS = {"words": "def score(text):\n    return 1.0\n", "deep": "import deeper\ninner = 1\n", "deeper": "X = 1\n"}


@pytest.mark.parametrize("edited", ["mine", "words", "deep", "deeper"])
def test_a_file_and_all_neighbours_that_it_imports_count(tmp_path, edited):
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
        written(folder, mine=MINE, unused="Y = 1\n", **OTHERS)
    assert digest(one) == digest(two)
    (two / "unused.py").write_text("Y = 2\n")
    assert digest(one) == digest(two), "a neighbour that is not imported decides nothing"
    with open(two / f"{edited}.py", "a") as file:
        file.write("# changed\n")
    load_two = origin(load_function(f"{two / 'mine.py'}:reward"))
    assert digest(one)[1] != load_two[1]


def made(target):
    def reward(completions):
        return [target for _ in completions]

    return reward


def counting():
    calls, seen = 0, []

    def reward(completions):
        nonlocal calls
        calls += 1
        seen.append(calls)
        return [0.0 for _ in completions]

    return reward


class Close:
    """A reward that is an object."""

    def __init__(self, target):
        self.target, self.calls = target, 0

    def __call__(self, completions):
        self.calls += 1
        return [self.target for _ in completions]


def test_what_code_was_made_with_counts_and_what_it_changes_does_not():
    assert origin(made(1)) == origin(made(1)) != origin(made(2))
    assert origin(Close(1)) == origin(Close(1)) != origin(Close(2))
    assert origin(regular_expression("a+")) != origin(regular_expression("b+"))
    for reward in (counting(), Close(1)):
        before = origin(reward)
        reward(["a"])
        assert origin(reward) == before


def test_code_of_libraries_is_not_a_users_own():
    assert is_own(made(1))
    assert is_own(Close(1))
    assert not any(map(is_own, (exact_match, re.compile, pytest.raises, dict, len)))


class Judge:
    """A reward that is a method of an object."""

    def __init__(self, limit):
        self.limit = limit

    def near(self, completions, **columns):
        return [float(each < self.limit) for each in completions]


def test_the_object_of_a_method_and_the_model_in_a_closure_count():
    def of(model):
        return lambda completions: model(completions)

    one, two = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    assert origin(Judge(1).near) == origin(Judge(1).near) != origin(Judge(2).near)
    assert origin(of(one)) == origin(of(copy.deepcopy(one))) != origin(of(two))
    assert origin(one) == origin(copy.deepcopy(one)) != origin(two)
    assert origin(of(torch.zeros(9000))) != origin(of(torch.zeros(9000).index_fill(0, torch.tensor([4500]), 1.0)))
