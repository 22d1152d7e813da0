"""Arguments of another kind than they should be are refused by name in one sentence; numpy's numbers are numbers."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

import stepwell as sw
from stepwell.errors import InputError
from stepwell.ranges import checked
from stepwell.training.settings import Settings

ROWS = [{"prompt": 0}]


def reward(completions, **columns):
    return [float(len(text)) for text in completions]


def model():
    return sw.exact.markov(symbols=3, length=3, prompts=2)


PROMPT = sw.Prompt(0, 0)
WRONG = {
    "Budget.amount must be a finite number above 0, got 'a'": lambda: sw.Budget("a", "steps"),
    "Budget.unit must be one of evaluations": lambda: sw.Budget(1.0, "apples"),
    "A budget must be like 60s": lambda: sw.Budget.parse(3),
    "Settings.shuffle must be True or False, got 'no'": lambda: Settings(shuffle="no"),
    "Settings.steps must be a whole number": lambda: sw.train(model(), ROWS, reward, steps="3"),
    "resume must be True or False, got 'yes'": lambda: sw.train(model(), ROWS, reward, resume="yes"),
    "out must be a text, or a Path, or None, got 3": lambda: sw.train(model(), ROWS, reward, out=3),
    "options must be a dictionary, or None, got [1]": lambda: sw.train(model(), ROWS, reward, options=[1]),
    "options must be named by texts, got 3": lambda: sw.train(model(), ROWS, reward, options={3: 1}),
    "on_step must be a function, or None, got 3": lambda: sw.train(model(), ROWS, reward, on_step=3),
    "The list of prompts, row 0: A prompt must be a whole number from 0 to 1, got 7": lambda: sw.train(
        model(), [{"prompt": 7}], reward
    ),
    "A prompt must be a whole number from 0 to 1, got 'a'": lambda: sw.sample(model(), ["a"]),
    "n must be a whole number of at least 1, got True": lambda: sw.sample(model(), [0], n=True),
    "temperature must be a finite number, got '0.7'": lambda: sw.language("m", temperature="0.7"),
    "temperature must be a finite number, got True": lambda: sw.language("m", temperature=True),
    "top_k must be a whole number, got 1.5": lambda: sw.language("m", top_k=1.5),
    "max_new_tokens must be a whole number, got '8'": lambda: sw.language("m", max_new_tokens="8"),
    "lora must be a dictionary, or None, got 8": lambda: sw.language("m", lora=8),
    "compile must be True or False, got 1": lambda: sw.language("m", compile=1),
    "task must be a Task, or a text, got 3": lambda: sw.compare(3, "grpo"),
    "methods must be a text, or a list, got 5": lambda: sw.compare("countdown", 5),
    "methods must be written as texts": lambda: sw.compare("countdown", [3]),
    "budget must be a Budget, or a text, got 5": lambda: sw.compare("countdown", "grpo", budget=5),
    "seeds must be a whole number, or a list, got True": lambda: sw.compare("countdown", "grpo", seeds=True),
    "seeds must be whole numbers, got 1.5": lambda: sw.compare("countdown", "grpo", seeds=[1.5]),
    "column must be a text, got 3": lambda: sw.load_prompts(ROWS, column=3),
    "Prompts must be a path": lambda: sw.load_prompts(b"data.jsonl"),
    "Reward weights must be a list of finite numbers, got '1'": lambda: sw.Rewards([len], weights="1"),
    "Reward weights must be finite numbers, got [True]": lambda: sw.Rewards([len], weights=[True]),
    "Request.count must be a whole number, got '5'": lambda: sw.Request(PROMPT, "5"),
    "Request.count must be a whole number, got True": lambda: sw.Request(PROMPT, True),
    "Request.prompt must be a Prompt, got 3": lambda: sw.Request(3),
    "Request.window must be (begin, end)": lambda: sw.Request(PROMPT, window=("a", "b")),
    "Request.window must be": lambda: sw.Request(PROMPT, window=3),
    "Request.sampler must be a dictionary, or None, got 3": lambda: sw.Request(PROMPT, sampler=3),
    "requests must be a list, got 3": lambda: sw.rollout(model(), 3, sw.Rng(0)),
    "Rng.seed must be a whole number, got 'x'": lambda: sw.Rng("x"),
    "Columns must be made of a dictionary of tensors": lambda: sw.Columns(3),
    "Columns['a'] must be a tensor with a row each": lambda: sw.Columns({"a": torch.tensor(1)}),
    "symbols must be a whole number": lambda: sw.exact.markov("3"),
}


@pytest.mark.parametrize(("said", "act"), WRONG.items(), ids=map(str, WRONG))
def test_a_value_of_another_kind_is_refused_by_name(said, act):
    with pytest.raises(InputError) as refused:
        act()
    assert said in str(refused.value)


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint8, int])
def test_whole_numbers_of_numpy_are_whole_numbers(kind):
    assert sw.Request(PROMPT, kind(3)).count == 3
    run = sw.train(model(), ROWS, reward, steps=kind(1), group_size=kind(2), prompts_per_step=kind(1))
    assert run.steps == 1


@pytest.mark.parametrize("kind", [np.float32, np.float64, float])
def test_numbers_of_numpy_are_numbers(kind):
    assert sw.exact.markov(symbols=3, length=3, temperature=kind(0.5)).horizon == 3
    assert Settings(learning_rate=kind(0.5)).learning_rate == 0.5


def test_a_checked_function_takes_what_its_annotations_say():
    @checked("free")
    def function(number: float, texts: list[str] | None = None, flag: bool = False, free: int = 0) -> tuple:
        return number, texts, flag, free

    assert function(np.float32(0.5), ["a"], flag=True, free="b") == (0.5, ["a"], True, "b")
    assert type(function(np.float64(2))[0]) is float
    for wrong, said in (
        ({"number": "1"}, "number must be a finite number, got '1'"),
        ({"number": float("nan")}, "number must be a finite number, got nan"),
        ({"number": 1, "texts": "ab"}, "texts must be a list, or None, got 'ab'"),
        ({"number": 1, "flag": 1}, "flag must be True or False, got 1"),
    ):
        with pytest.raises(InputError, match=re.escape(said)):
            function(**wrong)
    with pytest.raises(TypeError):
        function()
