"""Planners and cuts take time in proportion to the rows, also in a step of very many prompts."""

from __future__ import annotations

import itertools
import time

import pytest
import torch

from stepwell.planning.groups import WeightedPrompts
from stepwell.planning.measured import MEASURE, WithGreedy
from stepwell.planning.queue import Queue
from stepwell.process.exact.table import markov
from stepwell.training.update import cut
from stepwell.trajectories import make, to_tensors

SECONDS = 10.0
"""Processor time that is ten times what each takes, and a tenth of what its square would."""


def rows_of(prompt, **fields):
    count = len(prompt)
    zeros = torch.zeros(count, 2)
    return make(zeros.long(), zeros, torch.ones(count, 2).bool(), prompt=prompt, **fields)


def within(seconds, run):
    begin = time.process_time()
    result = run()
    assert time.process_time() - begin < seconds
    return result


def test_success_rates_are_means_of_each_prompt_and_linear_in_the_rows():
    prompts, size = 65_536, 4
    prompt = torch.arange(prompts * size) % prompts
    reward = (torch.arange(prompts * size) % 3 == 0).float()
    planner = WeightedPrompts(decay=0.5)
    within(SECONDS, lambda: planner.learn(rows_of(prompt).replace(reward=reward), {}))
    for number in (0, 1, 17, prompts - 1):
        assert planner.rates[number] == pytest.approx(float(reward[prompt == number].mean()))
    assert len(planner.rates) == prompts


def test_each_row_is_noted_the_greedy_answer_to_its_own_prompt():
    prompts = 65_536
    prompt = torch.cat([torch.randperm(prompts, generator=torch.Generator().manual_seed(0)), torch.arange(prompts)])
    source = torch.cat([torch.zeros(prompts), torch.full((prompts,), MEASURE)]).long()
    rows = rows_of(prompt, source=source).replace(reward=torch.arange(2 * prompts).float())
    noted = within(SECONDS, lambda: WithGreedy().note(rows)["greedy"])
    assert noted.equal((prompt + prompts).float())


def test_pieces_of_whole_groups_are_cut_in_linear_time():
    prompts, size = 32_768, 4
    prompt = torch.randint(0, prompts, (prompts * size,), generator=torch.Generator().manual_seed(1))
    process = markov(symbols=2, length=2, prompts=1)
    pieces = within(SECONDS, lambda: cut(process, rows_of(prompt), "groups", 400))
    assert torch.cat(pieces).sort().values.equal(torch.arange(prompts * size))
    first = [set(prompt[piece].tolist()) for piece in pieces[:200]]
    assert all(not one & other for one, other in itertools.pairwise(first))


def test_a_queue_remembers_its_rows_as_tensors():
    queue = Queue()
    queue.waiting = rows_of(torch.arange(3))
    state = queue.state_dict()
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    other = Queue()
    other.load_state_dict(state)
    assert to_tensors(other.waiting).keys() == state.keys()
    assert all(to_tensors(other.waiting)[name].equal(value) for name, value in state.items())
    other.load_state_dict(Queue().state_dict())
    assert other.waiting is None
