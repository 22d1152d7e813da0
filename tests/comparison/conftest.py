"""A task that is learnt in milliseconds: strings from a table, rewarded for each symbol 1."""

import pytest

from stepwell.process.exact.table import markov
from stepwell.reward.mixing import Rewards
from stepwell.sampling.request import Prompt
from stepwell.tasks.registry import Task


def ones(completions):
    return [sum(symbol == 1 for symbol in text) / 3 for text in completions]


@pytest.fixture
def tiny():
    return Task(
        name="tiny",
        title="Tiny",
        description="Say 1 three times.",
        process=lambda: markov(symbols=3, length=3, prompts=6),
        prompts=[Prompt(i, i) for i in range(4)],
        evaluation=[Prompt(i, i) for i in (4, 5)],
        rewards=Rewards(ones),
        settings={"learning_rate": 0.1, "prompts_per_step": 2, "group_size": 4},
        unit="ones",
    )
