"""Planners of groups: numbers, prompts, and the exact distribution of the groups that dynamic sampling keeps."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stepwell.check import law
from stepwell.data.stream import PromptStream
from stepwell.planning.base import Planner
from stepwell.planning.groups import DynamicSampling, Groups, WeightedPrompts
from stepwell.process.exact.table import TabularLanguage
from stepwell.rng import Rng
from stepwell.sampling.request import Prompt
from stepwell.sampling.rollout import rollout
from stepwell.trajectories import concatenate, make


def stream(number, seed=None):
    """Prompts in their own order, or shuffled."""
    return PromptStream([Prompt(i, i) for i in range(number)], Rng(seed or 0), shuffle=seed is not None)


def answered(requests, rewards):
    """One row for every sample asked for, with the next of the rewards."""
    prompts = [request.prompt.id for request in requests for _ in range(request.count)]
    number = len(prompts)
    given = torch.tensor([float(next(rewards)) for _ in prompts])
    columns = torch.zeros(number, 1).long(), torch.zeros(number, 1), torch.ones(number, 1).bool()
    return make(*columns, prompt=torch.tensor(prompts), reward=given)


def played(planner, prompts, rewards):
    """All parts of one step: what was asked for in each, and all rows."""
    asked, so_far = [], None
    while requests := planner.plan(0, so_far, prompts):
        asked.append([(request.prompt.id, request.count) for request in requests])
        rows = answered(requests, rewards)
        so_far = rows if so_far is None else concatenate([so_far, rows], renumber=True)
    return asked, so_far


@pytest.mark.parametrize("planner", [Groups(3, 2), DynamicSampling(3, 2), WeightedPrompts(3, 2)])
def test_every_planner_asks_for_groups_of_its_size_and_is_a_planner(planner):
    assert isinstance(planner, Planner)
    first = planner.plan(0, None, stream(5, seed=1))
    assert [request.count for request in first] == [2, 2, 2]
    assert len({request.prompt.id for request in first}) == 3


def test_fixed_groups_are_asked_for_once_and_all_are_kept():
    planner, prompts = Groups(2, 3), stream(5)
    asked, rows = played(planner, prompts, itertools.repeat(0))
    assert asked == [[(0, 3), (1, 3)]]
    assert planner.keep(rows).tolist() == list(range(6))
    assert played(planner, prompts, itertools.repeat(0))[0] == [[(2, 3), (3, 3)]]
    assert planner.state_dict() == {}


def test_dynamic_sampling_asks_only_for_what_is_missing():
    dead, live = [1, 1], [0, 1]
    rewards = iter([*live, *dead, *dead, *live, *dead, *live])
    planner = DynamicSampling(3, 2, limit=4.0)
    asked, rows = played(planner, stream(20), rewards)
    assert [len(part) for part in asked] == [3, 2, 1]  # two dead, then one dead, then none
    assert rows.prompt[planner.keep(rows)].tolist() == [0, 0, 3, 3, 5, 5]


@given(st.data(), st.integers(1, 4), st.integers(2, 3), st.floats(1.0, 4.0))
@settings(deadline=None, max_examples=60)
def test_dynamic_sampling_keeps_the_wanted_number_of_differing_groups(data, wanted, size, limit):
    """It keeps all that there are where these are fewer."""
    planner = DynamicSampling(wanted, size, limit)
    script = data.draw(st.lists(st.integers(0, 1), min_size=200, max_size=200))
    asked, rows = played(planner, stream(100), iter(script))
    tried = sum(len(part) for part in asked)
    differing = [p for p in rows.prompt.unique().tolist() if len(set(rows.reward[rows.prompt == p].tolist())) == 2]
    assert tried <= max(wanted, math.floor(limit * wanted))
    assert len(differing) >= wanted or tried == max(wanted, math.floor(limit * wanted))
    kept = Counter(rows.prompt[planner.keep(rows)].tolist())
    if differing:
        assert kept == dict.fromkeys(differing[:wanted], size)
    else:
        assert sum(kept.values()) == wanted * size  # what there is


def coins(*rates):
    """A tabular model whose answer to prompt i is one symbol, 1 with probability rates[i]."""
    table = torch.tensor([[[1 - rate, rate]] * 3 for rate in rates], dtype=torch.float64).log()
    return TabularLanguage(table, length=1, end=False)


def kept_groups(planner, process):
    """A program: one step of a planner on the model, reward the symbol itself; the kept (prompt, rewards)."""

    def program(rng):
        so_far, prompts, part = None, stream(process.prompts), 0
        while requests := planner.plan(0, so_far, prompts):
            first = 0 if so_far is None else int(so_far.node.max()) + 1
            rows = rollout(process, requests, rng.split("part", part), first_node=first).trajectories
            rows = rows.replace(reward=rows.action[:, 0].double())
            so_far, part = rows if so_far is None else concatenate([so_far, rows]), part + 1
        kept = so_far[planner.keep(so_far)]
        return tuple(zip(kept.prompt.tolist(), kept.reward.tolist(), strict=True))

    return law(program)


RATES = (0.1, 0.5, 0.8)


def by_hand(size, tries):
    """The distribution of the first group that differs, or of the first group drawn where none does."""
    answer, dead = Counter(), Counter({(): 1.0})
    for prompt in range(tries):
        following = Counter()
        for rewards in itertools.product((0.0, 1.0), repeat=size):
            probability = math.prod(RATES[prompt] if reward else 1 - RATES[prompt] for reward in rewards)
            group = tuple((prompt, reward) for reward in rewards)
            for first, mass in dead.items():
                if len(set(rewards)) > 1:
                    answer[group] += mass * probability
                else:
                    following[first or group] += mass * probability
        dead = following
    return answer + dead


def same_distribution(found, expected):
    return found.keys() == expected.keys() and all(abs(found[key] - expected[key]) < 1e-12 for key in expected)


@pytest.mark.parametrize(("size", "tries"), [(2, 1), (2, 3), (3, 2)])
def test_the_distribution_of_the_groups_that_dynamic_sampling_keeps(size, tries):
    found = kept_groups(DynamicSampling(1, size, limit=float(tries)), coins(*RATES))
    assert same_distribution(found, by_hand(size, tries))


def test_a_group_that_is_kept_is_one_given_that_it_differs():
    """Given that the first prompt's group is kept, its probabilities are divided by 1 - p^G - q^G."""
    found = kept_groups(DynamicSampling(1, 3, limit=1.0), coins(0.1))
    differs = 1 - 0.1**3 - 0.9**3
    given_kept = {group: mass / differs for group, mass in found.items() if len({r for _, r in group}) > 1}
    assert sum(given_kept.values()) == pytest.approx(1, abs=1e-12)
    assert given_kept[((0, 0.0), (0, 0.0), (0, 1.0))] == pytest.approx(0.9**2 * 0.1 / differs, abs=1e-12)


@dataclass
class RedrawsTheSame(DynamicSampling):
    """The mistake of starting over: the best of two tries is kept, so that good luck is drawn again."""

    def keep(self, so_far):
        means = [float(so_far.reward[so_far.prompt == p].mean()) for p in so_far.prompt.unique()]
        best = so_far.prompt.unique()[int(torch.tensor(means).argmax())]
        return (so_far.prompt == best).nonzero()[:, 0]


def test_a_planted_choice_among_groups_has_another_distribution():
    found = kept_groups(RedrawsTheSame(1, 2, limit=3.0), coins(*RATES))
    assert not same_distribution(found, by_hand(2, 3))


def taught(planner, **rates):
    """Let a planner learn that the prompts succeed at these rates, one row a tenth."""
    prompts = [int(name[1:]) for name in rates for _ in range(10)]
    rewards = [float(i < 10 * rate) for rate in rates.values() for i in range(10)]
    columns = torch.zeros(len(prompts), 1).long(), torch.zeros(len(prompts), 1), torch.ones(len(prompts), 1).bool()
    planner.learn(make(*columns, prompt=torch.tensor(prompts), reward=torch.tensor(rewards)), {})
    return planner


def first_prompt(planner, number):
    return law(lambda rng: planner.plan(0, None, PromptStream([Prompt(i, i) for i in range(number)], rng))[0].prompt.id)


def test_weighted_prompts_favour_those_whose_outcome_is_uncertain():
    planner = taught(WeightedPrompts(1, 2, floor=0.1), p0=0.0, p1=0.5, p2=0.9)
    weights = [0.1 + 4 * p * (1 - p) for p in (0.0, 0.5, 0.9, 0.5)]  # the last is unseen
    found = first_prompt(planner, 4)
    assert all(found[i] == pytest.approx(weight / sum(weights), abs=1e-12) for i, weight in enumerate(weights))
    assert found[1] > found[2] > found[0] > 0


def test_rates_are_remembered_with_decay():
    """Rewards are mapped to the unit interval."""
    planner = taught(taught(WeightedPrompts(decay=0.75), p0=0.2, p1=1.0), p0=0.6)
    assert planner.rates == pytest.approx({0: 0.75 * 0.2 + 0.25 * 0.6, 1: 1.0})
    signed = taught(WeightedPrompts(low=-1.0, high=3.0), p0=0.4)
    assert signed.rates == pytest.approx({0: 1.4 / 4})
    assert taught(WeightedPrompts(low=0.5, high=1.0), p0=0.1).rates == {0: 0.0}


def test_what_weighted_prompts_remember_survives_a_checkpoint():
    planner = taught(WeightedPrompts(1, 2), p0=0.3, p2=1.0)
    resumed = WeightedPrompts(1, 2)
    resumed.load_state_dict(planner.state_dict())
    assert resumed.rates == planner.rates
    assert first_prompt(resumed, 3) == first_prompt(planner, 3)
    assert all(isinstance(name, str) for name in planner.state_dict()["rates"])  # as JSON keeps it
