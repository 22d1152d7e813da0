"""Numbers of each step travel with the rows: observations come back to `score`, segments and rewards to credit."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from stepwell.distributions import Categorical
from stepwell.errors import InputError
from stepwell.meter import Meter
from stepwell.process.base import Process, Samples, Scores, Steps
from stepwell.rng import Rng
from stepwell.sampling.record import Record
from stepwell.sampling.request import Prompt, Request, Snapshot
from stepwell.sampling.rollout import rollout
from stepwell.trajectories import concatenate, from_tensors, make, pad_steps, to_tensors

FIRST, SECOND = Prompt(0, 3), Prompt(1, 5)


@dataclass(frozen=True)
class Places:
    """N walkers at `place` (N,) with `left` (N,) steps to go, and everything that each of them saw and earned."""

    place: torch.Tensor
    left: torch.Tensor
    seen: torch.Tensor
    earned: torch.Tensor

    @property
    def done(self):
        return self.left == 0

    def __len__(self):
        return len(self.place)

    def __getitem__(self, index):
        return Places(self.place[index], self.left[index], self.seen[index], self.earned[index])


class Fog(Process):
    """Walkers to the left or right who see where they are through noise of the environment's own.

    Actions do not determine the observations: without them nobody can score a row.
    """

    def __init__(self, noise=1.0):
        self.module, self.meter, self.noise = nn.Linear(2, 2).double(), Meter(), noise

    def start(self, prompts, rng):
        place = torch.tensor(prompts, dtype=torch.float64)
        left = torch.tensor(prompts, dtype=torch.long)  # a prompt is the number of steps, too
        return Places(place, left, self._look(place, rng)[:, None], torch.zeros(len(place), 0, dtype=torch.float64))

    def _look(self, place, rng):
        seen = place + self.noise * rng.normal(len(place), dtype=torch.float64)
        return torch.stack([seen, torch.ones_like(place)], 1)

    def propose(self, state):
        return Categorical(self.module(state.seen[:, -1]))

    def advance(self, state, action, rng):
        place = state.place + 2 * action - 1
        seen = torch.cat([state.seen, self._look(place, rng)[:, None]], 1)
        return Places(place, state.left - 1, seen, torch.cat([state.earned, place[:, None]], 1))

    def finish(self, state):
        steps = state.earned.shape[1]
        seen, earned = list(state.seen[:, :steps]), list(state.earned)
        turns = [torch.arange(steps) // 2 for _ in range(len(state))]
        last = list(state.seen[:, steps])
        return Samples(state.place.tolist(), steps=Steps(earned, turns, seen, last))

    def score(self, trajectories, needs=(), context=None, reference=None):
        log_prob = self.module(trajectories.observed).log_softmax(-1)
        log_prob = log_prob.gather(-1, trajectories.action[..., None])[..., 0]
        return Scores(log_prob.masked_fill(~trajectories.mask, 0.0))


def foggy(noise=1.0):
    process = Fog(noise)
    for parameter in process.module.parameters():
        parameter.data.copy_(Rng(7).normal(*parameter.shape, dtype=torch.float64))
    return process


@pytest.fixture
def fog():
    return foggy()


def assert_scores(process, rows):
    with torch.no_grad():
        assert torch.equal(process.score(rows).log_prob, rows.log_prob)


@pytest.mark.parametrize("rows_at_once", [None, 3])
def test_observations_come_back_to_score_exactly(fog, rows_at_once):
    rows = rollout(fog, [Request(SECOND, 3), Request(FIRST, 3)], Rng(0), rows_at_once=rows_at_once).trajectories
    assert rows.observed.shape == (6, 5, 2)
    assert rows.length.tolist() == [5] * 3 + [3] * 3
    assert not rows.observed[3:, 3:].any(), "nothing was seen after the end"
    assert_scores(fog, rows)
    shuffled = rows.observed[torch.tensor([1, 0, 2, 3, 4, 5])]
    with torch.no_grad():
        assert not torch.equal(fog.score(rows.replace(observed=shuffled)).log_prob, rows.log_prob)


def test_observations_survive_padding_forking_and_concatenation(fog):
    first = rollout(fog, [Request(FIRST, 3)], Rng(0)).trajectories
    second = rollout(fog, [Request(SECOND, 2)], Rng(1), first_node=100).trajectories
    whole = concatenate([first, second])
    assert_scores(fog, whole)
    assert_scores(fog, pad_steps(whole, 9))
    assert_scores(fog, whole[torch.tensor([4, 0, 0, 2])])
    assert_scores(fog, from_tensors(to_tensors(whole)))


def test_branches_of_an_environment_without_noise_see_their_beginning_again():
    clear = foggy(noise=0.0)
    trunk = rollout(clear, [Request(SECOND, 2)], Rng(0)).trajectories
    rows = rollout(clear, [Request(SECOND, 3, start=(1, 2))], Rng(1), so_far=trunk).trajectories
    assert torch.equal(rows.observed[:, :2], trunk.observed[1:, :2].expand(3, 2, 2))
    assert_scores(clear, rows)


def test_branches_of_a_random_environment_are_refused_and_snapshots_are_not(fog):
    """Gone through again the row would see other things, and its log-probabilities would be those of neither."""
    trunk = rollout(fog, [Request(SECOND, 2)], Rng(0)).trajectories
    with pytest.raises(InputError, match=r"a row's first 2 steps must be the same .* Continue a Snapshot instead"):
        rollout(fog, [Request(SECOND, 3, start=(1, 2))], Rng(1), so_far=trunk)
    with pytest.raises(InputError, match="a row's first 5 steps must be the same"):
        rollout(fog, [Request(SECOND, 1, start=trunk[:1])], Rng(1))
    rng = Rng(4)
    state = fog.start([5], rng)
    with torch.no_grad():
        distribution = fog.propose(state)
        action = distribution.sample(rng)
        row = make(action[:, None], distribution.log_prob(action)[:, None], torch.ones(1, 1), observed=state.seen)
        state = fog.advance(state, action, rng)
    rows = rollout(fog, [Request(SECOND, 3, start=Snapshot(state, row))], Rng(1)).trajectories
    assert torch.equal(rows.observed[:, :1], row.observed.expand(3, 1, 2))
    assert len(rows.observed[:, 2].unique(dim=0)) == 3
    assert_scores(fog, rows)


def test_rewards_and_segments_of_steps_reach_the_rows(fog):
    drawn = rollout(fog, [Request(SECOND, 2), Request(FIRST, 2)], Rng(0))
    rows = drawn.trajectories
    assert rows.segment.tolist() == [[0, 0, 1, 1, 2]] * 2 + [[0, 0, 1, 0, 0]] * 2
    walk = torch.tensor([5.0, 5, 3, 3], dtype=torch.float64)[:, None] + (2 * rows.action - 1).cumsum(1)
    expected = walk.masked_fill(rows.node < 0, 0.0)
    assert torch.equal(rows.step_reward, expected)
    assert drawn.samples.steps == Steps(), "the trajectories hold them"


@pytest.mark.parametrize("field", ["reward", "segment", "observation"])
@pytest.mark.parametrize("change", [-1, 1])
def test_numbers_of_steps_are_one_a_step(fog, field, change):
    finish = Fog.finish

    def wrong(state):
        steps = vars(finish(fog, state).steps)
        lists = {
            name: [torch.zeros(len(row) + change * (name == field), *row.shape[1:]) for row in rows]
            for name, rows in steps.items()
        }
        return Samples(state.place.tolist(), steps=Steps(**lists))

    fog.finish = wrong
    said = rf"Samples.steps.{field} must have an entry for each of the 3 steps of row 0, got {3 + change}\."
    with pytest.raises(InputError, match=said):
        rollout(fog, [Request(FIRST, 1)], Rng(0))


def test_rows_that_were_not_judged_keep_what_the_others_say_of_themselves(fog):
    """Whoever draws rows may end some of them only: the others are None, and cut where their drawing was cut."""
    record = Record([Request(FIRST, 3)], torch.zeros(3, dtype=torch.long))
    for step in range(2):
        record.add(torch.arange(3), step, torch.tensor([0, 1, 1]), torch.zeros(3).double(), torch.ones(3).bool())
    record.truncated[0] = True
    reward, seen = torch.tensor([1.0, 2.0]).double(), torch.tensor([[1.0, 1], [2, 2]]).double()
    samples = Samples(["b", "a"], {"mark": [2, 1]}, [False, True], Steps([reward, -reward], None, [seen, -seen]))
    record.end(torch.tensor([2, 1]), samples)
    drawn = record.drawn(fog)
    assert drawn.samples.values == [None, "a", "b"]
    assert drawn.samples.columns == {"mark": [None, 1, 2]}
    assert drawn.trajectories.truncated.tolist() == [True, True, False]
    assert drawn.trajectories.step_reward.tolist() == [[0.0, 0.0], [-1.0, -2.0], [1.0, 2.0]]
    assert drawn.trajectories.observed[:, 1, 0].tolist() == [0.0, -2.0, 2.0]


def test_the_observation_after_the_last_step_travels_with_rows_of_every_length():
    fog = foggy(noise=0.0)
    drawn = rollout(fog, [Request(SECOND, 3), Request(FIRST, 3), Request(SECOND, 2, horizon=2)], Rng(0))
    rows = drawn.trajectories
    assert rows.last_observed.shape == (8, 2)
    assert rows.last_observed[:, 0].tolist() == drawn.samples.values
    assert rows.truncated.tolist() == [False] * 6 + [True] * 2
    order = torch.tensor([7, 0, 3])
    assert torch.equal(rows[order].last_observed, rows.last_observed[order])
    assert torch.equal(from_tensors(to_tensors(rows)).last_observed, rows.last_observed)
