"""From requests to trajectories: whatever the shape of the request, the rows have the distribution asked for."""

import pytest
import torch
from torch import nn
from walks import Places

from stepwell.check import expectation, law
from stepwell.distributions import Categorical, Gaussian, Point
from stepwell.errors import InputError
from stepwell.meter import Meter
from stepwell.process.base import Process, Samples
from stepwell.process.exact.table import markov
from stepwell.rng import Rng
from stepwell.sampling.request import Prompt, Request, Snapshot
from stepwell.sampling.rollout import rollout
from stepwell.trajectories import edges

MODEL = markov(symbols=2, length=3, prompts=2, seed=1)
FIRST, SECOND = Prompt(0, 0), Prompt(1, 1)


def strings(model=MODEL, prompt=0):
    return dict(zip(model.strings(), model.string_probabilities(prompt).tolist(), strict=True))


def drawn_strings(*requests, model=MODEL, **settings):
    return lambda rng: rollout(model, requests, rng, **settings)


def product(*distributions):
    pairs = {(): 1.0}
    for one in distributions:
        pairs = {(*key, text): p * q for key, p in pairs.items() for text, q in one.items()}
    return pairs


def test_rows_of_a_group_are_independent_draws_of_the_process():
    exact = law(drawn_strings(Request(FIRST, 2)))
    assert exact == pytest.approx(product(strings(), strings()), abs=1e-14)


@pytest.mark.parametrize("rows_at_once", [None, 1])
def test_requests_come_back_in_their_order_however_they_are_batched(rows_at_once):
    exact = law(drawn_strings(Request(SECOND, 1), Request(FIRST, 1), rows_at_once=rows_at_once))
    assert exact == pytest.approx(product(strings(prompt=1), strings()), abs=1e-14)


def test_prompts_and_columns_follow_their_rows():
    same = Request(SECOND, 1, proposal=lambda distribution, state, prompts: distribution)
    requests = [Request(FIRST, 2, horizon=1), same, Request(FIRST, 2)]
    drawn = rollout(MODEL, requests, Rng(0), rows_at_once=2, version=3)
    assert [prompt.id for prompt in drawn.prompts] == [0, 0, 1, 0, 0]
    assert drawn.trajectories.prompt.tolist() == [0, 0, 1, 0, 0]
    assert drawn.trajectories.condition["prompt"].tolist() == [0, 0, 1, 0, 0]
    assert drawn.trajectories.version.tolist() == [3] * 5
    for row, text in enumerate(drawn.samples.values):
        length = int(drawn.trajectories.length[row])
        assert drawn.trajectories.action[row, :length].tolist() == list(text)
        assert drawn.samples.columns["completion_ids"][row] == list(text)
    assert (edges(drawn.trajectories).count == 1).all()


def test_the_stored_log_probability_is_the_score():
    drawn = rollout(MODEL, [Request(FIRST, 4), Request(SECOND, 4)], Rng(0)).trajectories
    torch.testing.assert_close(MODEL.score(drawn).log_prob.detach(), drawn.log_prob, rtol=0, atol=1e-14)


def test_a_context_is_drawn_from_and_the_prompt_is_scored():
    exact = law(drawn_strings(Request(FIRST, 1, context=1)))
    assert exact == pytest.approx({(text,): p for text, p in strings(prompt=1).items()}, abs=1e-14)
    rows = rollout(MODEL, [Request(FIRST, 3, context=1)], Rng(0)).trajectories
    assert rows.condition["prompt"].tolist() == [0, 0, 0]
    context = MODEL.condition([1, 1, 1])
    torch.testing.assert_close(MODEL.score(rows, context=context).log_prob.detach(), rows.log_prob)
    assert not torch.allclose(MODEL.score(rows).log_prob, rows.log_prob)


def test_rows_are_cut_at_their_own_horizon_and_only_there():
    requests = [Request(FIRST, 3, horizon=1), Request(FIRST, 3, horizon=2), Request(FIRST, 3)]
    rows = rollout(markov(symbols=2, length=3, end=False), requests, Rng(0)).trajectories
    assert rows.length.tolist() == [1] * 3 + [2] * 3 + [3] * 3
    assert rows.truncated.tolist() == [True] * 6 + [False] * 3
    assert rows.mask.sum(1).tolist() == rows.length.tolist()


def test_a_row_that_ends_at_its_horizon_is_not_truncated():
    rows = rollout(MODEL, [Request(FIRST, 20, horizon=1)], Rng(0)).trajectories
    assert torch.equal(rows.truncated, rows.action[:, 0] != 0)
    assert rows.truncated.any()
    assert not rows.truncated.all()


def test_a_truncated_row_has_the_distribution_of_the_beginning():
    exact = law(drawn_strings(Request(FIRST, 1, horizon=2)))
    beginnings = {}
    for text, p in strings().items():
        beginnings[(text[:2],)] = beginnings.get((text[:2],), 0.0) + p
    assert exact == pytest.approx(beginnings, abs=1e-14)


# branches


def given_beginning(text, prompt=0):
    """The distribution of complete strings that begin like `text`."""
    match = {other: p for other, p in strings(prompt=prompt).items() if other[: len(text)] == text}
    total = sum(match.values())
    return {other: p / total for other, p in match.items()}


def origin():
    """Rows of which at least one does not end in its first two steps."""
    drawn = rollout(MODEL, [Request(FIRST, 12), Request(SECOND, 2)], Rng(0))
    row = next(i for i, text in enumerate(drawn.samples.values[:12]) if len(text) == 3)
    return drawn, row


@pytest.mark.parametrize("step", [0, 1, 2])
def test_a_branch_goes_on_with_the_distribution_given_its_beginning(step):
    drawn, row = origin()
    exact = law(drawn_strings(Request(FIRST, 2, start=(row, step)), so_far=drawn.trajectories))
    one = given_beginning(drawn.samples.values[row][:step])
    assert exact == pytest.approx(product(one, one), abs=1e-14)


def test_branching_anew_leaves_the_distribution_of_a_row_unchanged():
    def program(rng):
        first = rollout(MODEL, [Request(FIRST, 1)], rng)
        return rollout(MODEL, [Request(FIRST, 1, start=(0, 1))], rng, so_far=first.trajectories)

    assert law(program) == pytest.approx({(text,): p for text, p in strings().items()}, abs=1e-14)


def test_branches_share_their_beginning_and_nothing_else():
    """Nodes and stored log-probabilities alike."""
    drawn, row = origin()
    more = rollout(
        MODEL,
        [Request(FIRST, 2, start=(row, 1)), Request(FIRST, 1, start=(row, 2)), Request(FIRST, 1)],
        Rng(5),
        so_far=drawn.trajectories,
    )
    rows = more.trajectories
    for place, step in enumerate([1, 1, 2, 0]):
        assert torch.equal(rows.node[place, :step], drawn.trajectories.node[row, :step])
        assert torch.equal(rows.log_prob[place, :step], drawn.trajectories.log_prob[row, :step])
    joined = (drawn + more).trajectories
    shared = edges(joined).count > 1
    assert shared.sum() == 2  # the first two steps of the origin
    assert edges(joined).count[shared].sum() == 4 + 2
    torch.testing.assert_close(MODEL.score(joined).log_prob.detach(), joined.log_prob, rtol=0, atol=1e-14)


def snapshot(row, step):
    """The state after `step` steps of a drawn row, and its trajectory so far."""
    drawn, _ = origin()
    trajectory = drawn.trajectories[torch.tensor([row])]
    state = MODEL.start([0], Rng(0))
    for action in trajectory.action[0, :step]:
        state = MODEL.advance(state, action[None], Rng(0))
    return Snapshot(state, trajectory.replace(length=torch.tensor([step])))


def test_a_snapshot_goes_on_with_the_distribution_given_its_beginning():
    drawn, row = origin()
    exact = law(drawn_strings(Request(FIRST, 2, start=snapshot(row, 2))))
    one = given_beginning(drawn.samples.values[row][:2])
    assert exact == pytest.approx(product(one, one), abs=1e-14)


def test_rows_from_a_snapshot_keep_its_weight_and_share_only_its_nodes():
    _, row = origin()
    here = snapshot(row, 2)
    weighted = Snapshot(here.state, here.trajectory.replace(weight=torch.tensor([0.25], dtype=torch.float64)))
    drawn = rollout(MODEL, [Request(FIRST, 3, start=weighted), Request(FIRST, 3)], Rng(0))
    rows = drawn.trajectories
    assert rows.weight.tolist() == [0.25] * 3 + [0.0] * 3
    assert sorted(edges(rows).count.tolist(), reverse=True)[:3] == [3, 3, 1]
    assert torch.equal(rows.node[:3, :2], here.trajectory.node[:, :2].expand(3, 2))


def test_new_nodes_are_new_even_beside_a_snapshot_with_high_numbers():
    _, row = origin()
    here = snapshot(row, 1)
    for first in range(12):
        node = torch.where(here.trajectory.node >= 0, here.trajectory.node * 0 + first, -1)
        request = Request(FIRST, 4, start=Snapshot(here.state, here.trajectory.replace(node=node)))
        counts = edges(rollout(MODEL, [request], Rng(0)).trajectories).count
        assert sorted(counts.tolist(), reverse=True)[:2] == [4, 1]


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (lambda: Request(FIRST, 1, start=(0, 9)), "a row and a step that were drawn, got row 0, step 9"),
        (lambda: Request(FIRST, 1, start=(0, -1)), "a row and a step that were drawn, got row 0, step -1"),
        (lambda: Request(FIRST, 1, start=(99, 1)), r"were drawn, got row 99, step 1 \(prompt 0, 14 rows so far\)"),
        (lambda: Request(FIRST, 1, start=(-1, 1)), "a row and a step that were drawn, got row -1, step 1"),
        (lambda: Request(SECOND, 1, start=(0, 1)), "own prompt, 1; got row 0, which answers prompt 0"),
        (lambda: Request(FIRST, 1, start="root"), r"Request.start must be a Start, .* got 'root' \(prompt 0\)"),
        (lambda: Request(FIRST, 0), r"Request.count must be at least 1, got 0 \(prompt 0\)"),
        (lambda: Request(FIRST, 1, horizon=0), "Request.horizon must be at least 1, got 0"),
        (lambda: Request(FIRST, 1, window=(2, 1)), r"0 <= begin <= end, got \(2, 1\)"),
    ],
)
def test_impossible_requests_are_refused_where_they_are_made(request_, message):
    drawn, _ = origin()
    with pytest.raises(InputError, match=message):
        rollout(MODEL, [request_()], Rng(0), so_far=drawn.trajectories)


def test_branching_needs_rows_and_a_rollout_needs_requests():
    with pytest.raises(InputError, match=r"got row 0, step 1 \(prompt 0, 0 rows so far\)"):
        rollout(MODEL, [Request(FIRST, 1, start=(0, 1))], Rng(0))
    with pytest.raises(InputError, match="at least one request"):
        rollout(MODEL, [], Rng(0))


# proposals


def flat(distribution, state, prompts):
    return Categorical(torch.zeros_like(distribution.logits))


def test_weighted_expectations_under_a_proposal_are_those_of_the_process():
    def program(rng):
        drawn = rollout(MODEL, [Request(FIRST, 2, proposal=flat)], rng)
        weights, lengths = drawn.trajectories.weight.exp(), drawn.trajectories.length
        return {"evidence": weights.mean(), "length": (weights * lengths).mean(), "unweighted": lengths.double().mean()}

    found, exact = expectation(program), float(MODEL.expectation(len).detach())
    assert float(found["evidence"]) == pytest.approx(1.0, abs=1e-14)
    assert float(found["length"]) == pytest.approx(exact, abs=1e-14)
    assert abs(float(found["unweighted"]) - exact) > 0.01  # the weights matter


def test_the_stored_log_probability_is_that_of_the_proposal():
    rows = rollout(MODEL, [Request(FIRST, 5, proposal=flat)], Rng(0)).trajectories
    assert torch.allclose(rows.log_prob[rows.mask], torch.tensor(0.5, dtype=torch.float64).log())
    ratio = (MODEL.score(rows).log_prob.detach() - rows.log_prob).sum(1)
    torch.testing.assert_close(ratio, rows.weight)


def test_rows_with_weights_are_not_branched_as_if_they_had_none():
    rows = rollout(MODEL, [Request(FIRST, 5, proposal=flat)], Rng(0)).trajectories
    with pytest.raises(InputError, match="Snapshot"):
        rollout(MODEL, [Request(FIRST, 1, start=(0, 1))], Rng(0), so_far=rows)


# processes of other kinds


class RandomWalk(Process):
    """Three steps on the line in double precision, of which the given ones are points."""

    def __init__(self, points):
        self.module, self.meter, self.points = nn.Module(), Meter(), points

    def start(self, prompts, rng):
        return Places(torch.tensor(prompts, dtype=torch.float64)[:, None], 0)

    def propose(self, state):
        if state.step in self.points:
            return Point(state.place + 1)
        return Gaussian(state.place, torch.tensor(0.5, dtype=torch.float64))

    def advance(self, state, action, rng):
        return Places(action, state.step + 1)

    def finish(self, state):
        return Samples(state.place[:, 0].tolist())

    def score(self, trajectories, needs=(), context=None, reference=None):
        raise NotImplementedError


@pytest.mark.parametrize("deterministic", [{0}, {1}, {2}, {0, 1, 2}, set()])
def test_deterministic_steps_happen_but_have_no_density(deterministic):
    rows = rollout(RandomWalk(deterministic), [Request(Prompt(0, 2.0), 3)], Rng(0)).trajectories
    assert rows.log_prob.dtype == torch.float64
    assert rows.length.tolist() == [3] * 3
    assert rows.mask.tolist() == [[step not in deterministic for step in range(3)]] * 3
    assert not rows.log_prob[~rows.mask].any()
    assert (rows.node >= 0).all()
    assert rows.action.shape == (3, 3, 1)


def test_a_step_in_lower_precision_lowers_that_of_no_other():
    class Mixed(RandomWalk):
        def propose(self, state):
            step = super().propose(state)
            return step if state.step else Gaussian(step.mean.float(), step.standard_deviation.float())

        def advance(self, state, action, rng):
            return super().advance(state, action.double(), rng)

    rows = rollout(Mixed(set()), [Request(Prompt(0, 2.0), 3)], Rng(0)).trajectories
    assert rows.log_prob.dtype == rows.action.dtype == torch.float64
    last = Gaussian(rows.action[:, 1], torch.tensor(0.5, dtype=torch.float64)).log_prob(rows.action[:, 2])
    torch.testing.assert_close(rows.log_prob[:, 2], last, rtol=0, atol=1e-14)


def test_moments_of_a_random_walk_are_exact_by_quadrature():
    def program(rng):
        place = torch.tensor(rollout(RandomWalk({1}), [Request(Prompt(0, 2.0), 1)], rng).samples.values)
        return place, place**2

    mean, square = expectation(program, normal_nodes=2)
    assert float(mean) == pytest.approx(3.0)
    assert float(square) - float(mean) ** 2 == pytest.approx(2 * 0.25, abs=1e-6)  # the samples are float32


def test_rows_that_are_done_at_their_start_are_rows_without_steps():
    walk = RandomWalk(set())
    walk.start = lambda prompts, rng: Places(torch.tensor(prompts, dtype=torch.float64)[:, None], 3)
    drawn = rollout(walk, [Request(Prompt(0, 2.0), 2)], Rng(0))
    assert drawn.samples.values == [2.0, 2.0]
    assert drawn.trajectories.mask.shape == (2, 0)
    assert not drawn.trajectories.truncated.any()
    again = rollout(walk, [Request(Prompt(0, 2.0), 1)], Rng(0), so_far=drawn.trajectories)
    assert len(drawn + again) == 3


def test_a_process_may_say_itself_which_rows_it_cut_short():
    walk = RandomWalk(set())
    walk.finish = lambda state: Samples(state.place[:, 0].tolist(), truncated=(state.place[:, 0] > 0).tolist())
    drawn = rollout(walk, [Request(Prompt(0, 50.0), 1), Request(Prompt(1, -50.0), 1)], Rng(0))
    assert drawn.trajectories.truncated.tolist() == [True, False]
    assert drawn.samples.truncated is None, "said once, by the trajectories"
    assert drawn.samples.columns == {}


def test_rows_are_picked_by_place_and_by_mask_alike():
    drawn = rollout(MODEL, [Request(FIRST, 2), Request(SECOND, 2)], Rng(0))
    by_place, by_mask = drawn[torch.tensor([1, 3])], drawn[torch.tensor([False, True, False, True])]
    for part in (by_place, by_mask):
        assert [prompt.id for prompt in part.prompts] == [0, 1]
        assert part.samples.values == [drawn.samples.values[1], drawn.samples.values[3]]
        assert torch.equal(part.trajectories.action, drawn.trajectories.action[[1, 3]])


def test_a_rollout_evaluates_only_rows_that_are_not_done():
    model = markov(symbols=2, length=3)
    drawn = rollout(model, [Request(FIRST, 10)], Rng(0))
    assert model.meter.spent.model_evaluations == int(drawn.trajectories.length.sum())
    assert model.meter.spent.backward == 0
