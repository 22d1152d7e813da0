"""The places of windows, by hand, for every schedule; tails; rows that branch off earlier and earlier."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from stepwell.check import law
from stepwell.data.stream import PromptStream
from stepwell.errors import InputError, UnknownName
from stepwell.planning.base import Planner
from stepwell.planning.windows import Backward, Tail, Windows
from stepwell.process.flow.build import flow
from stepwell.process.flow.process import Flow
from stepwell.reward.mixing import Rewards
from stepwell.rng import Rng
from stepwell.sampling.request import Prompt
from stepwell.training.collect import collect


def nearness(completions):
    return [-float((point - 1.0).square().sum()) for point in completions]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 1, dtype=torch.float64)
        for place, parameter in enumerate(self.parameters()):
            parameter.data.copy_(Rng(1).split(place).normal(*parameter.shape, dtype=torch.float64))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.linear(torch.cat([x, time[:, None]], 1))


def small(steps=6, solver="sde-flow") -> Flow:
    return flow(Net(), (1,), solver=solver, steps=steps)


def stream(number=2, seed=0):
    return PromptStream([Prompt(i, i) for i in range(number)], Rng(seed), shuffle=False)


def drawn(planner, process=None, step=0, seed=0):
    """All rows that a step's rollout keeps."""
    return collect(process or small(), planner, stream(), Rewards(nearness), Rng(seed), step).drawn


def positions(rollouts=12, seed=0, **settings):
    planner = Windows(**settings)
    return [planner.window(rollout, Rng(seed))[0] for rollout in range(rollouts)]


def test_windows_are_planners_with_nothing_to_remember():
    for planner in (Windows(), Tail(), Backward()):
        assert isinstance(planner, Planner)
        assert planner.state_dict() == {}


def test_a_fixed_window_stays():
    assert positions(steps=6, width=2, begin=3) == [3] * 12


def test_a_progressive_window_moves_by_its_stride_and_rolls_back():
    assert positions(steps=6, width=3, schedule="progressive", hold=2) == [0, 0, 1, 1, 2, 2, 3, 3, 0, 0, 1, 1]
    assert positions(steps=6, width=3, schedule="progressive", hold=1, stride=2)[:6] == [0, 2, 0, 2, 0, 2]
    assert positions(steps=6, width=3, begin=2, schedule="progressive", hold=1)[:5] == [2, 3, 2, 3, 2]


def test_a_progressive_window_may_stay_at_the_last_place():
    found = positions(steps=6, width=3, schedule="progressive", hold=2, roll_back=False)
    assert found == [0, 0, 1, 1, 2, 2, 3, 3, 3, 3, 3, 3]
    found = positions(steps=6, width=3, schedule="progressive", hold=1, stride=2, roll_back=False)
    assert found[:4] == [0, 2, 3, 3], "the last place is reached, whatever the stride leaves over"


def test_the_published_roll_back_walks_out_of_the_last_step_first():
    planner = Windows(steps=6, width=3, schedule="progressive", hold=1, variant="published")
    found = [planner.window(rollout, Rng(0)) for rollout in range(8)]
    assert found == [(0, 3), (1, 4), (2, 5), (3, 6), (4, 6), (5, 6), (6, 6), (0, 3)]


def test_the_published_window_trains_as_few_steps_as_its_docstring_says():
    planner = Windows(steps=25, width=4, hold=25, schedule="progressive", variant="published")
    widths = [end - begin for begin, end in (planner.window(rollout, Rng(0)) for rollout in range(650))]
    assert sum(0 < width < 4 for width in widths) == 75
    assert sum(width == 0 for width in widths) == 25
    assert planner.window(650, Rng(0)) == planner.window(0, Rng(0))


def test_a_random_window_is_uniform_over_its_places():
    """It is the same for the same rollout."""
    planner = Windows(steps=6, width=3, schedule="random")
    found = law(lambda rng: planner.window(0, rng))
    assert found == pytest.approx({(begin, begin + 3): 0.25 for begin in range(4)}, abs=1e-14)
    assert positions(steps=6, width=3, schedule="random") == positions(steps=6, width=3, schedule="random")
    assert len(set(positions(steps=6, width=3, schedule="random", rollouts=40))) == 4


def test_a_random_window_does_not_move_the_stream_of_prompts():
    planner, prompts = Windows(prompts=1, steps=6, width=3, schedule="random"), stream(5)
    taken = [planner.plan(step, None, prompts)[0].prompt.id for step in range(5)]
    assert taken == [0, 1, 2, 3, 4]


def test_a_decaying_hold_falls_linearly_to_a_quarter():
    """hold 8 at place 0, ceil(8 - 6 p / 6) at place p of 6 steps."""
    found = positions(steps=6, width=4, schedule="decay", hold=8, rollouts=22)
    assert found == [0] * 8 + [1] * 7 + [2] * 6 + [0]
    assert positions(steps=6, width=4, schedule="decay", hold=1)[:4] == [0, 1, 2, 0], "a hold is one at least"


def test_a_decaying_hold_ends_near_a_quarter_of_the_first():
    """A hold of 40 at place 0 falls by 30 p / 10 to 13 at the last place; towards 1 it would be 5."""
    found = positions(steps=10, width=1, schedule="decay", hold=40, rollouts=270)
    assert [found[:265].count(place) for place in range(10)] == [40, 37, 34, 31, 28, 25, 22, 19, 16, 13]
    assert found[265:] == [0] * 5


def test_an_exponentially_decaying_hold_falls_after_the_free_places():
    """hold 10 up to place 1, then 10 exp(-0.5 (p - 1)), rounded up: 7, 4."""
    found = positions(
        steps=6, width=3, schedule="exponential-decay", hold=10, rate=0.5, free=1, rollouts=32, roll_back=False
    )
    holds = [10, 10, math.ceil(10 * math.exp(-0.5)), math.ceil(10 * math.exp(-1.0))]
    assert holds == [10, 10, 7, 4]
    assert found == [0] * 10 + [1] * 10 + [2] * 7 + [3] * 5


def test_windows_are_counted_from_the_first_step_that_can_be_random():
    for first in (0, 1, 2):
        request = Windows(steps=6, width=2, begin=3, first=first, prompts=1).plan(0, None, stream())[0]
        assert request.window == (3 + first, 5 + first)
        assert request.count == 8


def test_the_rows_of_a_window_train_its_steps_and_no_others():
    rows = drawn(Windows(2, 3, steps=5, width=2, begin=1)).trajectories
    assert rows.mask.tolist() == [[False, False, True, True, False, False, False]] * 6
    assert rows.prompt.tolist() == [0, 0, 0, 1, 1, 1]


def test_rows_of_the_same_noise_share_their_start_and_no_other_step():
    """Node and state alike."""
    rows = drawn(Windows(2, 4, steps=5, width=5, same_noise=True)).trajectories
    assert len(rows) == 8
    for prompt in (0, 1):
        mine = rows[(rows.prompt == prompt).nonzero()[:, 0]]
        assert len(mine) == 4
        assert len(mine.node[:, 0].unique()) == 1
        assert (mine.action[:, 0] == mine.action[0, 0]).all()
        assert len(mine.node[:, 1:].unique()) == 4 * 6
        assert len(mine.action[:, 1].unique()) == 4, "they part at once"
    assert rows.node[0, 0] != rows.node[1, 0], "prompts have noise of their own"
    alone = drawn(Windows(2, 4, steps=5, width=5)).trajectories
    assert len(alone.node.unique()) == alone.node.numel()


def test_rows_of_the_same_noise_evaluate_the_network_as_often_as_others():
    """Their noise costs nothing, so sharing it saves nothing."""
    costs = []
    for same in (True, False):
        process = small()
        drawn(Windows(2, 4, steps=5, width=5, same_noise=same), process)
        costs.append(process.meter.spent.model_evaluations)
    assert costs == [8 * 6] * 2


def test_a_group_of_one_with_the_same_noise_is_one_row():
    assert len(drawn(Windows(2, 1, steps=5, width=5, same_noise=True))) == 2


def test_a_tail_finishes_rows_in_fewer_steps():
    planner = Tail(2, 3, steps=5, width=2, begin=0, ratio=0.4)
    request = planner.plan(0, None, stream())[0]
    assert request.sampler == {"tail": (2, "dpmpp-2m", 1)}  # of four that were left
    process = small()
    rows = drawn(planner, process).trajectories
    assert rows.length.tolist() == [1 + 2 + 1] * 6
    assert process.meter.spent.model_evaluations == 6 * 3
    assert rows.mask.tolist() == [[False, True, True, False]] * 6
    with torch.no_grad():
        assert float((process.score(rows).log_prob - rows.log_prob).abs().max()) < 1e-12


@pytest.mark.parametrize(("left", "steps"), [(2, 1), (3, 1), (5, 2), (8, 3), (10, 4)])
def test_a_tails_length_is_a_share_of_the_steps_left_and_one_at_least(left, steps):
    request = Tail(steps=left + 1, width=2, ratio=0.4).plan(0, None, stream())[0]
    assert request.sampler == {"tail": (2, "dpmpp-2m", steps)}


def test_a_window_at_the_end_leaves_nothing_for_a_tail():
    request = Tail(steps=5, width=2, begin=3).plan(0, None, stream())[0]
    assert request.sampler is None, "one step is left, the last, which draws no noise"
    assert request.window == (4, 6)
    assert Tail(steps=5, width=2, begin=3, after=2).plan(0, None, stream())[0].sampler == {"tail": (5, "dpmpp-2m", 1)}


def test_a_tail_of_rows_with_the_same_noise_has_both():
    rows = drawn(Tail(2, 3, steps=5, width=2, same_noise=True)).trajectories
    assert rows.length.tolist() == [4] * 6
    assert len(rows.node[:, 0].unique()) == 2


def test_backward_rows_do_not_train_their_shared_beginning():
    planner = Backward(2, 3, trunks=2, steps=6, least=2)
    process = small()
    rows = drawn(planner, process).trajectories
    assert len(rows) == 2 * 2 * 3, "the trunks themselves are not kept"
    split = 1 + 4
    assert rows.mask.tolist() == [[False] * split + [True] + [False]] * 12, "the last step to t = 0 draws no noise"
    branches = rows.node[:, split - 1].reshape(4, 3)
    assert (branches == branches[:, :1]).all()
    assert len(branches[:, 0].unique()) == 4
    assert rows.prompt.tolist() == [0] * 6 + [1] * 6
    assert process.meter.spent.reward_calls == 12, "trunks are not judged"
    with torch.no_grad():
        assert float((process.score(rows).log_prob - rows.log_prob).abs().max()) < 1e-12


def test_the_part_that_backward_rows_train_grows_by_a_step_each_hold():
    """In the end it is all of the row."""
    planner = Backward(1, 2, trunks=1, steps=6, least=2, hold=3)
    found = []
    for step in range(18):
        rows = drawn(planner, step=step).trajectories
        found.append(int(rows.mask[0].sum()))
        assert not rows.mask[:, -1].any()
    assert found == [1] * 3 + [2] * 3 + [3] * 3 + [4] * 3 + [5] * 6


def test_the_trunk_of_backward_rows_is_drawn_with_its_noise():
    rows = drawn(Backward(1, 2, trunks=8, steps=6, least=2)).trajectories
    ode = small().with_sampler(solver="ddim")
    state = ode.start([0] * len(rows), Rng(0))
    for step in range(2):
        if step:
            assert (ode.propose(state).value - rows.action[:, step]).abs().max() > 1e-3
        state = ode.advance(state, rows.action[:, step], Rng(0))


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"width": 0}, InputError, ".width must be from 1 to 10, got 0"),
        ({"width": 11}, InputError, ".width must be from 1 to 10, got 11"),
        ({"begin": 7}, InputError, ".begin must be from 0 to 6 for 4 of 10 steps, got 7"),
        ({"begin": -1}, InputError, ".begin must be from 0 to 6 for 4 of 10 steps, got -1"),
        ({"stride": 0}, InputError, ".stride must be a whole number, at least 1, got 0"),
        ({"hold": 0}, InputError, ".hold must be a whole number, at least 1, got 0"),
        ({"schedule": "progresive"}, UnknownName, "progressive"),
        ({"variant": "public"}, UnknownName, "published"),
    ],
)
def test_windows_that_contradict_themselves_are_refused(settings, error, message):
    for planner in (Windows, Tail):
        with pytest.raises(error, match=message) as caught:
            planner(**settings)
        assert str(caught.value).startswith(planner.__name__)


def test_a_planted_window_that_forgets_to_hold_stands_elsewhere():
    class Hasty(Windows):
        def _hold(self, position):
            return 1

    settings = {"steps": 6, "width": 3, "schedule": "progressive", "hold": 2}
    assert [Hasty(**settings).window(r, Rng(0))[0] for r in range(12)] != positions(**settings)
