"""Branches, trees and candidates: shared steps, costs, and leaves that are distributed as plain rows."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from stepwell.check import expectation, law
from stepwell.data.stream import PromptStream
from stepwell.errors import InputError, UnknownName
from stepwell.planning.base import Planner
from stepwell.planning.branches import Branches, Candidates, Tree
from stepwell.process.exact.table import markov
from stepwell.process.flow.build import flow
from stepwell.process.flow.process import Flow
from stepwell.reward.mixing import Rewards
from stepwell.rng import Rng
from stepwell.sampling.request import Prompt
from stepwell.training.collect import collect
from stepwell.trajectories import edges

STEPS, ETA = 5, 0.8


def nearness(completions):
    return [-float((torch.as_tensor(point, dtype=torch.float64) - 1.0).square().sum()) for point in completions]


def small(**settings) -> Flow:
    """Data of one point, 0.4, whose velocity is linear in the state."""
    given = {"solver": "ddim-eta", "steps": STEPS, "dtype": torch.float64} | settings
    return flow(lambda x, t: (x - 0.4) / t.clamp(min=1e-9) * 0.5, (1,), **given).with_sampler(level=ETA)


def stream(number=2, rng=None):
    return PromptStream([Prompt(i, i) for i in range(number)], rng or Rng(0), shuffle=False)


def drawn(planner, process=None, rng=None, prompts=None):
    """All rows that a step's rollout keeps."""
    process = process or small()
    return collect(process, planner, prompts or stream(), Rewards(nearness), rng or Rng(0), 0).drawn.trajectories


def affine_steps(times, eta):
    """slope, shift and deviation of each of DDIM's steps with eta on x_0hat = x - t v, ehat = x + (1 - t) v."""
    for t, s in itertools.pairwise(times):
        q = eta * s * math.sqrt(1 - (s * (1 - t) / (t * (1 - s))) ** 2)
        kept = math.sqrt(s**2 - q**2)
        slope, shift = 0.5 / t, -0.2 / t
        yield (
            (1 - s) * (1 - t * slope) + kept * (1 + (1 - t) * slope),
            -(1 - s) * t * shift + kept * (1 - t) * shift,
            q,
        )


def moments(times, random):
    """Mean and variance after each step of rows that are random in those steps (1 is the first after the noise)."""
    answer, mean, variance = [(0.0, 1.0)], 0.0, 1.0
    pairs = zip(affine_steps(times, 0.0), affine_steps(times, ETA), strict=True)
    for place, both in enumerate(pairs, 1):
        slope, shift, q = both[place in random]
        mean, variance = slope * mean + shift, slope**2 * variance + q**2
        answer.append((mean, variance))
    return answer


def slope_from(times, random, step):
    """What a difference after `step` is multiplied by until the end."""
    pairs = list(zip(affine_steps(times, 0.0), affine_steps(times, ETA), strict=True))
    return math.prod(pairs[place - 1][place in random][0] for place in range(step + 1, len(times)))


TIMES = small().sampler.times


def last_states(planner):
    """A program: the last states of all kept rows of one prompt and their squares."""

    def program(rng):
        x = drawn(planner, rng=rng, prompts=stream(1, rng.split("prompts"))).action[:, -1, 0]
        return x, x[:, None] * x

    return program


def covariance(planner):
    mean, squares = expectation(last_states(planner), normal_nodes=2)
    return mean, squares - mean[:, None] * mean


# branches


def test_they_are_planners_with_nothing_to_remember():
    for planner in (Branches(), Tree(), Candidates()):
        assert isinstance(planner, Planner)
        assert planner.state_dict() == {}


def test_children_leave_the_trunk_at_their_own_step_and_train_it_alone():
    process = small()
    rows = drawn(Branches(2, 3, at=(0, 2)), process)
    assert len(rows) == 2 * 3 * 2
    assert rows.prompt.tolist() == [0] * 6 + [1] * 6
    trained = [[step == place for step in range(STEPS + 1)] for place in (1, 3) for _ in range(3)]
    assert rows.mask.tolist() == trained * 2
    for first, place in ((0, 1), (3, 3), (6, 1), (9, 3)):
        mine = rows[torch.arange(first, first + 3)]
        assert (mine.node[:, :place] == mine.node[0, :place]).all()
        assert len(mine.node[:, place:].unique()) == 3 * (STEPS + 1 - place)
        assert len(mine.action[:, place].unique()) == 3
    assert torch.equal(rows.node[0, :1], rows.node[3, :1]), "one trunk a prompt"
    assert rows.node[0, 0] != rows.node[6, 0]


def test_the_rest_of_a_trunk_and_of_a_child_is_the_ode():
    process = small()
    rows = drawn(Branches(1, 3, at=(1, 3)), process)
    for row, place in enumerate([2] * 3 + [4] * 3):
        for step, (slope, shift, _) in enumerate(affine_steps(TIMES, 0.0), 1):
            expected = slope * rows.action[row, step - 1] + shift
            apart = float((rows.action[row, step] - expected).abs())
            assert (apart > 1e-6) if step == place else (apart < 1e-12)


def test_a_child_is_its_trunk_with_one_random_step():
    """Mean, variance and the covariance of children, which share the noise of their trunk."""
    mean, cov = covariance(Branches(1, 2, at=(1, 2)))
    for row, place in enumerate([2, 2, 3, 3]):
        expected = moments(TIMES, {place})[-1]
        assert (float(mean[row]), float(cov[row, row])) == pytest.approx(expected, abs=1e-12)
    slopes = [slope_from(TIMES, {place}, 0) for place in (2, 2, 3, 3)]
    for one, other in itertools.combinations(range(4), 2):
        assert float(cov[one, other]) == pytest.approx(slopes[one] * slopes[other], abs=1e-12)


def test_branches_cost_their_trunk_and_the_steps_after_they_part():
    """Trunks are not judged."""
    process = small()
    drawn(Branches(2, 3, at=(0, 2), trunks=2), process)
    assert process.meter.spent.model_evaluations == 2 * 2 * (STEPS + 3 * (STEPS - 0) + 3 * (STEPS - 2))
    assert process.meter.spent.reward_calls == 2 * 2 * 3 * 2


def test_several_trunks_a_prompt_have_noise_of_their_own():
    rows = drawn(Branches(2, 3, at=(1,), trunks=2))
    assert len(rows) == 12
    assert rows.prompt.tolist() == [0] * 6 + [1] * 6
    assert len(rows.node[:, 0].unique()) == 4
    assert len(rows.action[:, 0].unique()) == 4


@pytest.mark.parametrize("stride", [2, 3, 4, 9])
def test_strides_judge_the_same_random_step_by_other_ends_that_reach_zero(stride):
    process = small()
    rows = drawn(Branches(1, 3, at=(0, 1), strides=(1, stride)), process)
    assert len(rows) == 3 * 2 * 2
    assert rows.source.tolist() == [0] * 6 + [1] * 6
    first, second = rows[torch.arange(6)], rows[torch.arange(6, 12)]
    assert torch.equal(first.mask[:, :3], second.mask[:, :3])
    for row in range(6):
        place = 1 + row // 3
        assert torch.equal(first.node[row, : place + 1], second.node[row, : place + 1]), "the random step is shared"
        assert torch.equal(first.action[row, : place + 1], second.action[row, : place + 1])
        assert not (set(first.node[row, place + 1 :].tolist()) & set(second.node[row, place + 1 :].tolist()))
        times = [*range(place), *range(place, STEPS, stride), STEPS]
        assert int(second.length[row]) == len(times)
        x = second.action[row, place]
        grid = [TIMES[k] for k in times]
        for step, (slope, shift, _) in list(enumerate(affine_steps(grid, 0.0), 1))[place:]:
            x = slope * x + shift
            torch.testing.assert_close(second.action[row, step], x, rtol=0, atol=1e-12)
        assert grid[-1] == 0.0
    with torch.no_grad():
        assert float((process.score(rows).log_prob - rows.log_prob).abs().max()) < 1e-12


def test_the_steps_that_strides_share_are_listed_once():
    found = edges(drawn(Branches(1, 3, at=(0,), strides=(1, 2, 3))))
    assert sorted(found.count.tolist(), reverse=True)[:5] == [9, 3, 3, 3, 1], "the noise, and each random step"


def test_the_first_stride_may_be_other_than_one():
    rows = drawn(Branches(1, 2, at=(0,), strides=(2, 1)))
    assert rows.length.tolist() == [1 + 1 + 2] * 2 + [STEPS + 1] * 2
    assert rows.source.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("settings", [{"at": ()}, {"at": (-1,)}, {"strides": ()}, {"strides": (1, 0)}])
def test_branches_that_are_none_are_refused(settings):
    (name,) = settings
    said = rf"Branches.{name} must be one or more whole numbers, {int(name == 'strides')} or more, got \("
    with pytest.raises(InputError, match=said):
        Branches(**settings)


# trees


def test_a_tree_has_the_leaves_it_says_and_every_edge_is_listed_once():
    rows = drawn(Tree(2, 8, steps=STEPS - 1, begin=1))
    assert len(rows) == 16
    assert rows.prompt.bincount().tolist() == [8, 8]
    found = edges(rows)
    for prompt in (0, 1):
        mine = (rows.prompt == prompt).nonzero()[:, 0]
        nodes = rows.node[mine]
        assert [len(nodes[:, step].unique()) for step in range(STEPS + 1)] == [1, 1, 2, 4, 8, 8]
    assert len(found.row) == 2 * (1 + 1 + 2 + 4 + 8 + 8) == len(rows.node.unique())
    assert int(found.count.sum()) == 16 * (STEPS + 1)
    assert rows.mask.tolist() == [[False, False, True, True, True, False]] * 16


def test_a_tree_of_three_branches_parts_into_three():
    rows = drawn(Tree(1, 9, branching=3, steps=STEPS - 1))
    assert [len(rows.node[:, step].unique()) for step in range(STEPS + 1)] == [1, 3, 9, 9, 9, 9]


def test_siblings_part_from_the_state_that_they_share():
    rows = drawn(Tree(1, 4, steps=STEPS - 1, begin=1))
    for step in range(1, STEPS + 1):
        for one, other in itertools.combinations(range(4), 2):
            if rows.node[one, step] == rows.node[other, step]:
                assert torch.equal(rows.node[one, :step], rows.node[other, :step])
                assert torch.equal(rows.action[one, step], rows.action[other, step])
            else:
                assert not torch.equal(rows.action[one, step], rows.action[other, step])


@pytest.mark.parametrize(("size", "branching", "begin"), [(8, 2, 0), (8, 2, 1), (4, 2, 2), (9, 3, 1)])
def test_a_tree_costs_its_edges_and_no_more(size, branching, begin):
    process = small()
    rows = drawn(Tree(2, size, branching=branching, steps=STEPS - 1, begin=begin), process)
    depth = round(math.log(size, branching))
    new = [1, *[branching**level * (branching - 1) for level in range(depth)]]
    steps = [STEPS, *[STEPS - begin - level for level in range(depth)]]
    expected = 2 * sum(rows_ * left for rows_, left in zip(new, steps, strict=True))
    assert process.meter.spent.model_evaluations == expected < 2 * size * STEPS
    assert expected == int((edges(rows).step > 0).sum()), "one for each edge but the noise"
    spent = process.meter.spent.model_evaluations
    process.score(rows)
    states = 2 * sum(branching**level for level in range(depth))
    assert process.meter.spent.model_evaluations - spent == states, "a state is scored once for its children"


@pytest.mark.parametrize("begin", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_each_leaf_has_the_distribution_of_a_plain_row(begin):
    """Leaves covary by the steps that they share."""
    planner = Tree(1, 4, steps=STEPS - 1, begin=begin)
    random = {begin + 1, begin + 2}
    mean, cov = covariance(planner)
    path = moments(TIMES, random)
    for leaf in range(4):
        assert (float(mean[leaf]), float(cov[leaf, leaf])) == pytest.approx(path[-1], abs=1e-12)
    nodes = drawn(planner, prompts=stream(1)).node
    for one, other in itertools.combinations(range(4), 2):
        together = int((nodes[one] == nodes[other]).sum()) - 1  # the last step that both have
        shared = path[together][1] * slope_from(TIMES, random, together) ** 2
        assert float(cov[one, other]) == pytest.approx(shared, abs=1e-12)


def test_a_planted_tree_whose_branches_keep_the_step_has_equal_leaves():
    class Late(Tree):
        def plan(self, step, so_far, prompts):
            from dataclasses import replace

            requests = super().plan(step, so_far, prompts)
            if so_far is None:
                return requests
            return [replace(request, start=(request.start.row, request.start.step + 1)) for request in requests]

    _, cov = covariance(Late(1, 2, steps=STEPS - 1, begin=1))
    assert float(cov[0, 1]) == pytest.approx(float(cov[0, 0]), abs=1e-12)
    _, cov = covariance(Tree(1, 2, steps=STEPS - 1, begin=1))
    assert float(cov[0, 1]) < float(cov[0, 0]) - 1e-3


def test_a_tree_moves_on_and_begins_again():
    planner = Tree(1, 4, steps=5, hold=2)
    places = [planner.plan(step, None, stream())[0].window for step in range(10)]
    assert [begin for begin, _ in places] == [1, 1, 2, 2, 3, 3, 4, 4, 1, 1]
    assert all(end - begin == 2 for begin, end in places)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 6}, "Tree.size must be a power of branching=2, at least 2, got 6"),
        ({"size": 1}, "Tree.size must be a power of branching=2, at least 2, got 1"),
        ({"size": 8, "branching": 1}, "Tree.branching must be a whole number, at least 2, got 1"),
        ({"size": 8, "steps": 2}, "Tree.steps must be at least the 3 in which rows part, got 2"),
        ({"size": 8, "begin": 8}, "Tree.begin must be from 0 to 7 for a tree of 3 of 10 steps, got 8"),
    ],
)
def test_trees_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        Tree(**settings)


# candidates


def test_candidates_of_a_layer_leave_one_state_and_one_of_them_goes_on():
    rows = drawn(Candidates(2, 3, steps=4))
    assert len(rows) == 2 * 3 * 4
    for prompt in (0, 1):
        mine = rows[(rows.prompt == prompt).nonzero()[:, 0]]
        before = set()
        for layer in range(4):
            place = 1 + layer
            here = mine[(mine.length == place + 1).nonzero()[:, 0]]
            assert len(here) == 3
            assert here.truncated.all()
            assert len(here.node[:, place - 1].unique()) == 1, "they leave the same state"
            assert len(here.node[:, place].unique()) == 3
            assert layer == 0 or int(here.node[0, place - 1]) in before, "which was a candidate of the layer before"
            before = set(here.node[:, place].tolist())
            assert here.mask.tolist() == [[step == place for step in range(mine.mask.shape[1])]] * 3


def test_candidates_are_judged_by_what_the_process_makes_of_them_there():
    process = small()
    rows = drawn(Candidates(1, 3, steps=3), process)
    for row in range(len(rows)):
        last = int(rows.length[row]) - 1
        x, t = float(rows.action[row, last, 0]), TIMES[last]
        data = x - t * 0.5 * (x - 0.4) / t
        assert float(rows.reward[row]) == pytest.approx(-((data - 1.0) ** 2), abs=1e-12)


def next_parents(planner):
    """A program: which candidate of each layer, counted in their order, the next layer leaves; one prompt."""

    def program(rng):
        requests, rows = [], None
        process, prompts = small(), stream(1, rng.split("prompts"))

        class Records(type(planner)):
            def plan(self, step, so_far, prompts):
                nonlocal rows
                asked = super().plan(step, so_far, prompts)
                if so_far is not None and asked and int(asked[0].start.step) > 1:
                    place = int(asked[0].start.step) - 1
                    layer = (so_far.length == place + 1).nonzero()[:, 0].tolist()
                    chosen = layer.index(asked[0].start.row)
                    requests.append((chosen, so_far.reward[layer].argmax().item()))
                return asked

        fields = {name: getattr(planner, name) for name in ("prompts", "size", "steps", "go_on")}
        collect(process, Records(**fields), prompts, Rewards(nearness), Rng(7), 0)
        return tuple(requests)

    return program


def test_a_random_candidate_goes_on_whatever_they_earn():
    found = law(next_parents(Candidates(1, 3, steps=3)))
    chosen = {}
    for path, probability in found.items():
        key = tuple(place for place, _ in path)
        chosen[key] = chosen.get(key, 0.0) + probability
    assert chosen == pytest.approx(dict.fromkeys(itertools.product(range(3), repeat=2), 1 / 9), abs=1e-12)


def test_the_best_candidate_goes_on_if_asked():
    for path in law(next_parents(Candidates(1, 3, steps=3, go_on="best"))):
        assert len(path) == 2
        assert all(place == best for place, best in path)


def test_a_random_candidates_row_has_the_distribution_of_a_plain_row():
    """Going on with a random one leaves every layer's candidates with the moments of the plain chain."""
    planner = Candidates(1, 2, steps=2)

    def program(rng):
        rows = drawn(planner, rng=rng, prompts=stream(1, rng.split("prompts")))
        x = rows.action[torch.arange(len(rows)), rows.length - 1, 0]
        return x, x**2

    mean, square = expectation(program, normal_nodes=2)
    path = moments(TIMES, {1, 2})
    for row, step in enumerate([1, 1, 2, 2]):
        assert (float(mean[row]), float(square[row] - mean[row] ** 2)) == pytest.approx(path[step], abs=1e-12)


def test_going_on_with_the_best_moves_the_distribution():
    """What the layer after earns is no longer what a plain row earns: steps are not independent any more."""

    def later(go_on):
        def program(rng):
            rows = drawn(Candidates(1, 2, steps=2, go_on=go_on), rng=rng, prompts=stream(1, rng.split("prompts")))
            return rows.reward[2:].mean()

        return float(expectation(program, normal_nodes=2))

    assert later("best") > later("random") + 0.01


def test_candidates_refuse_a_third_way_to_go_on_and_begin_where_asked():
    with pytest.raises(UnknownName, match="best"):
        Candidates(go_on="worst")
    rows = drawn(Candidates(1, 2, steps=4, begin=2))
    assert sorted(rows.length.tolist()) == [4, 4, 5, 5]
    assert rows.mask.sum(1).tolist() == [1] * 4


# the language track


def test_language_models_branch_too_off_their_likeliest_string():
    model = markov(symbols=3, length=4, prompts=2, end=False, seed=2)
    rows = drawn(Branches(2, 4, at=(0, 2), first=0), model)
    assert len(rows) == 16
    greedy = []
    for prompt in (0, 1):
        state, text = model.start([prompt], Rng(0)), []
        for _ in range(4):
            text.append(int(model.deterministic(state).value))
            state = model.advance(state, torch.tensor(text[-1:]), Rng(0))
        greedy.append(text)
    for row, place in enumerate(([0] * 4 + [2] * 4) * 2):
        assert rows.mask[row].tolist() == [step == place for step in range(4)]
        assert rows.action[row, :place].tolist() == greedy[int(rows.prompt[row])][:place]
    with torch.no_grad():
        assert float((model.score(rows).log_prob - rows.log_prob).abs().max()) < 1e-14


def test_the_distribution_of_a_language_models_children_is_exact():
    model = markov(symbols=2, length=3, end=False, seed=2)
    found = law(lambda rng: drawn(Branches(1, 1, at=(1,), first=0), model, rng, stream(1, rng.split("prompts"))))
    state = model.start([0], Rng(0))
    first = model.deterministic(state).value
    state = model.advance(state, first, Rng(0))
    probability = model.propose(state).probabilities[0]
    expected = {}
    for symbol in range(2):
        then = model.advance(state, torch.tensor([symbol]), Rng(0))
        expected[((int(first), symbol, int(model.deterministic(then).value)),)] = probability[symbol].item()
    assert found == pytest.approx(expected, abs=1e-14)
