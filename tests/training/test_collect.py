"""A step's rows are those of all ranks, in the order of the ranks, and the failure of one is the failure of all."""

from __future__ import annotations

import pytest
import torch

import stepwell as sw
from stepwell.data.prompts import load_prompts
from stepwell.data.stream import PromptStream
from stepwell.errors import RewardError
from stepwell.planning.groups import Groups
from stepwell.reward.mixing import Rewards
from stepwell.rng import Rng
from stepwell.sampling.record import Drawn
from stepwell.training.collect import collect
from stepwell.training.distribute import World


class Pretended(World):
    """A rank of three, the answers of whose neighbours are known."""

    def __init__(self, *others):
        object.__setattr__(self, "others", others)
        super().__init__(1, 3)

    def gather(self, value):
        return [self.others[0], value, self.others[1]]


def length(completions, **columns):
    return [float(len(text)) for text in completions]


def gathered(world=None, prompts=3, reward=length):
    model = sw.exact.markov(symbols=3, length=3, prompts=3, seed=1)
    stream = PromptStream(load_prompts([{"prompt": i} for i in range(3)]), Rng(1), shuffle=False)
    return collect(model, Groups(prompts, 2), stream, Rewards(reward), Rng(0), 0, world=world)


def test_ranks_without_a_share_add_nothing():
    """Two prompts are one for the second rank, and none for the first."""
    found = gathered(Pretended((None, None), (None, None)), prompts=2)
    assert found.drawn.trajectories.prompt.tolist() == [0, 0]
    assert set(found.seconds) == {"rollout", "reward"}
    assert all(seconds > 0 for seconds in found.seconds.values())


def test_rows_and_seconds_of_all_ranks_are_put_together():
    alone = gathered()
    rest = type(alone)(alone.drawn, ("length",), {"rollout": 10.0, "reward": 20.0})
    found = gathered(Pretended((rest, None), (None, None)))
    assert len(found.drawn.trajectories) == len(alone.drawn.trajectories) + 2
    assert isinstance(found.drawn, Drawn)
    assert found.names == ("length",)
    assert 10.0 < found.seconds["rollout"] < 11.0
    assert 20.0 < found.seconds["reward"] < 21.0


def test_the_failure_of_another_rank_is_an_error_here():
    with pytest.raises(RewardError, match="no judge there"):
        gathered(Pretended((None, "no judge there"), (None, None)))


def test_nodes_of_other_ranks_are_other_nodes():
    first = gathered(World()).drawn.trajectories.node
    second = gathered(Pretended((None, None), (None, None))).drawn.trajectories.node
    assert not torch.isin(first[first >= 0], second).any()
    assert int(second[second >= 0].min()) >= 2**40
