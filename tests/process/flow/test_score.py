"""Scores of given rows are those they were drawn with, cost one evaluation a state, and are exact in their sums."""

from __future__ import annotations

import math

import pytest
import torch
from small_flow import STEPS, Net, draw, small
from torch import nn

from stepwell.columns import Columns
from stepwell.distributions import Gaussian
from stepwell.errors import InputError, MissingAbility
from stepwell.process.base import AT_POINTS
from stepwell.process.flow.build import flow
from stepwell.rng import Rng
from stepwell.sampling.request import Prompt, Request
from stepwell.trajectories import concatenate, pad_steps


def off(process, rows):
    """The largest deviation of a trained step's score from its stored log-density."""
    with torch.no_grad():
        found = process.score(rows).log_prob
    assert found.dtype == torch.float64
    assert not found[~rows.mask].any()
    return float((found - rows.log_prob).abs().max())


# the ratio is one


SOLVERS = ["sde-flow", "sde-euler", "sde-dance", "cps", "ddpm", "sde-dpmpp-2m"]


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("window", [(1, 3), (2, 5), (4, 6), (0, 7), (3, 3)])
def test_rows_of_a_window_score_as_they_were_drawn(solver, window):
    process = small(solver)
    rows = draw(process, Request(Prompt(0, 0), 3, window=window), Request(Prompt(1, 1), 2, window=window))
    trained = [max(window[0], 1) <= step < min(window[1], STEPS) for step in range(STEPS + 1)]  # the last draws nothing
    if solver in ("sde-euler", "sde-dance"):
        trained[STEPS] = window[1] > STEPS
    assert rows.mask.tolist() == [trained] * 5
    assert off(process, rows) < 1e-12


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(("step", "window"), [(1, (1, 4)), (3, (3, 4)), (4, None), (2, (1, 4))])
def test_branches_score_as_they_were_drawn(solver, step, window):
    process = small(solver)
    trunk = draw(process, Request(Prompt(0, 0), 1, window=(0, 0)), Request(Prompt(1, 1), 1))
    requests = [Request(Prompt(row, row), 3, start=(row, step), window=window) for row in range(2)]
    rows = draw(process, *requests, so_far=trunk, seed=1)
    assert off(process, rows) < 1e-12
    assert off(process, concatenate([trunk, rows])) < 1e-12


@pytest.mark.parametrize("sampler", [{"tail": (3, "dpmpp-2m", 2)}, {"tail": (3, "unipc-2", 3)}, {"stride": (3, 2)}])
@pytest.mark.parametrize("solver", SOLVERS)
def test_rows_with_another_end_score_under_the_sampler_that_all_share(solver, sampler):
    process = small(solver)
    rows = draw(process, Request(Prompt(0, 0), 3, window=(2, 4), sampler=sampler))
    assert rows.mask.any()
    assert off(process, rows) < 1e-12
    assert off(process, pad_steps(rows, STEPS + 1)) < 1e-12
    other = draw(process, Request(Prompt(0, 0), 3, window=(2, 4)))
    assert torch.equal(rows.action[:, :4], other.action[:, :4]), "what came before is the same"
    assert not torch.equal(rows.action[:, -1], other.action[:, -1])


@pytest.mark.parametrize("solver", ["sa-solver-2", "sa-solver-3", "sde-dpmpp-2m"])
def test_rows_of_solvers_that_remember_score_as_they_were_drawn_whatever_their_length(solver):
    process = small(solver)
    rows = draw(process, Request(Prompt(0, 0), 3), Request(Prompt(1, 1), 2, horizon=4))
    assert rows.length.tolist() == [STEPS + 1] * 3 + [4] * 2
    assert off(process, rows) < 1e-12
    branches = draw(process, Request(Prompt(0, 0), 2, start=(1, 4)), so_far=rows, seed=1)
    assert off(process, branches) < 1e-12


@pytest.mark.parametrize("window", [(4, 6), (1, 5)])
def test_a_stochastic_corrector_refuses_rows_whose_past_it_cannot_know(window):
    """SA-Solver corrects a step by how it was drawn; a row does not say whether an untrained one drew its noise.

    Of six steps it draws noise in steps 3 to 5, those that begin at times in [0.2, 0.8].
    """
    process = small("sa-solver-2")
    rows = draw(process, Request(Prompt(0, 0), 2, window=window), Request(Prompt(1, 1), 2))
    with pytest.raises(MissingAbility, match=r"corrects a step by how it was drawn.*step"):
        process.score(rows)
    alone = draw(process, Request(Prompt(0, 0), 2, window=window))
    if window == (4, 6):  # the step before the window was taken without noise by all rows
        with pytest.raises(MissingAbility, match="step 3 is not trained"):
            process.score(alone)
    else:  # nothing untrained comes before a trained step
        assert off(process, alone) < 1e-12


def test_a_step_after_a_deterministic_corrector_is_scored_with_its_correction():
    from stepwell.solver.schedule import Schedule
    from stepwell.solver.table import table

    times = (1.0, 0.7, 0.4, 0.2, 0.0)
    mixed = Schedule("mixed", times, (table("unipc-2"), table("unipc-2"), table("ddpm"), table("ddim")))
    process = flow(Net(), (2,), solver=mixed, encode="label")
    rows = draw(process)
    assert rows.mask.sum(1).tolist() == [1] * 5
    assert off(process, rows) < 1e-12


def test_a_planted_window_that_scores_other_steps_is_off():
    process = small()
    rows = draw(process, Request(Prompt(0, 0), 3, window=(2, 4)))
    shifted = rows.replace(mask=rows.mask.roll(1, 1), log_prob=rows.log_prob.roll(1, 1))
    assert off(process, shifted) > 1.0


def test_scores_under_a_sampler_that_does_not_fit_are_refused():
    process = small()
    rows = draw(process)
    with pytest.raises(InputError, match="in which it is deterministic"):
        process.with_sampler(solver="ddim").score(rows)
    with pytest.raises(InputError, match="beyond the 2 steps"):
        process.with_sampler(steps=2).score(rows)
    with pytest.raises(InputError, match="without a condition"):
        process.score(rows.replace(condition=None))


# a state is asked for once


def siblings(process, count=5, step=3):
    trunk = draw(process, Request(Prompt(0, 0), 1, window=(0, 0)))
    window = (step, step + 1)
    return trunk, draw(process, Request(Prompt(0, 0), count, start=(0, step), window=window), so_far=trunk, seed=1)


def evaluations(process, act):
    before = process.meter.spent.model_evaluations
    act()
    return process.meter.spent.model_evaluations - before


def test_siblings_share_the_evaluation_of_the_state_that_they_leave():
    process = small()
    _, rows = siblings(process)
    assert evaluations(process, lambda: process.score(rows)) == 1
    whole = draw(process)
    assert evaluations(process, lambda: process.score(whole)) == int(whole.mask.sum())
    joined = concatenate([rows, whole], renumber=True)
    assert evaluations(process, lambda: process.score(joined)) == 1 + int(whole.mask.sum())
    with_gradient = process.meter.spent.backward
    process.score(rows)
    assert process.meter.spent.backward == with_gradient + 1


def test_siblings_have_the_scores_and_the_gradient_that_they_have_alone():
    process = small()
    _, rows = siblings(process)
    parameters = list(process.module.parameters())
    weight = Rng(3).normal(len(rows), dtype=torch.float64)
    together = process.score(rows).log_prob.sum(1)
    alone = torch.cat([process.score(rows[torch.tensor([row])]).log_prob.sum(1) for row in range(len(rows))])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)
    gradients = [torch.autograd.grad((weight * scores).sum(), parameters) for scores in (together, alone)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11)


def test_rows_that_were_joined_without_renumbering_are_scored_each_by_itself():
    process = small()
    first, second = draw(process, Request(Prompt(0, 0), 2)), draw(process, Request(Prompt(1, 1), 2), seed=1)
    assert torch.equal(first.node, second.node), "two rollouts that know nothing of each other"
    joined = concatenate([first, second])
    assert off(process, joined) < 1e-12
    assert evaluations(process, lambda: process.score(joined)) == int(joined.mask.sum())


def test_a_condition_given_for_each_row_is_not_shared():
    process = small()
    _, rows = siblings(process)
    context = process.condition([0, 1, 2, 0, 1])
    found = process.score(rows, context=context).log_prob.sum(1)
    alone = [process.score(rows[torch.tensor([r])], context=context[r : r + 1]).log_prob.sum(1) for r in range(5)]
    torch.testing.assert_close(found, torch.cat(alone), rtol=0, atol=1e-12)
    assert not torch.allclose(found[0], process.score(rows).log_prob.sum(1)[1])


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_states_at_once_bounds_the_batch_and_changes_no_number(guidance):
    unconditional = {"label": torch.tensor([2])}
    settings = {"guidance": guidance, "unconditional": unconditional}
    whole, cut = small(**settings), small(states_at_once=4, **settings)
    rows = draw(whole)
    wide = 1 if guidance == 1.0 else 2
    with torch.no_grad():
        cut.module.shown.clear()
        spent = evaluations(cut, lambda: None)
        found, expected = cut.score(rows, ("mean",)), whole.score(rows, ("mean",))
        torch.testing.assert_close(found.log_prob, expected.log_prob, rtol=0, atol=1e-12)
        torch.testing.assert_close(found["mean"], expected["mean"], rtol=0, atol=1e-12)
        assert max(cut.module.shown) == 4 * wide
        costs = [evaluations(p, lambda p=p: p.score(rows)) for p in (cut, whole)]
        assert costs[0] == costs[1] == wide * int(rows.mask.sum())
        assert spent == 0
    cut.module.shown.clear()
    cut.score(rows)
    assert cut.module.shown == [wide * int(rows.mask.sum())], "with a gradient nothing would be gained"


# numbers


def test_a_large_states_ratio_survives_because_densities_are_summed_in_double_precision():
    """Single precision knows a sum between 2^18 and 2^19 to steps of 1/32, which a ratio cannot afford."""
    dimension, shift = 200_000, nn.Parameter(torch.zeros(1))

    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.shift = shift

        def forward(self, x, time):
            return 0.5 * x + self.shift

    process = flow(Shifted(), (dimension,), solver="sde-flow", steps=3).with_sampler(level=0.1)
    rows = draw(process, Request(Prompt(0, None), 2, window=(2, 3)))
    assert 2**18 < float(rows.log_prob[:, 2].abs().min()) < float(rows.log_prob[:, 2].abs().max()) < 2**19
    with torch.no_grad():
        before = process.score(rows, ("mean",))
        shift += 1e-5
        now = process.score(rows, ("mean", "deviation"))
    found = now.log_prob[:, 2] - rows.log_prob[:, 2]
    action, q = rows.action[:, 2].double(), now["deviation"][:, 2].double()
    squares = [((action - scores["mean"][:, 2].double()) ** 2).sum(1) for scores in (now, before)]
    exact = (squares[1] - squares[0]) / (2 * q**2)
    assert float(exact.abs().min()) > 1e-3, "the ratio is not one"
    rounding = 4 * math.sqrt(2 * dimension) * 4 * 2**-24  # two sums of roundings of numbers below 4, at 4 deviations
    torch.testing.assert_close(found, exact, rtol=0, atol=rounding)
    planted = [
        Gaussian(scores["mean"][:, 2], now["deviation"][:, 2, None].float()).log_prob(rows.action[:, 2]).float()
        for scores in (now, before)
    ]
    assert not ((planted[0] - planted[1]) * 32 % 1).any(), "nothing between steps of 1/32 is left"
    assert float((planted[0] - planted[1] - exact).abs().max()) > rounding


def gaussians(process, rows):
    """The mean and deviation of every trained step, by the process's own proposals along each row."""
    means, deviations = torch.zeros_like(rows.action), torch.zeros(rows.mask.shape, dtype=torch.float64)
    state = process.start([{0: 0, 1: 1}[p] for p in rows.prompt.tolist()], Rng(0))
    for step in range(rows.mask.shape[1]):
        distribution = process.propose(state)
        if step and rows.mask[0, step]:
            means[:, step], deviations[:, step] = distribution.mean, distribution.standard_deviation
        state = process.advance(state, rows.action[:, step], Rng(0))
    return means, deviations


@pytest.mark.parametrize("solver", ["sde-flow", "sde-dpmpp-2m", "sa-solver-2"])
def test_means_deviations_entropies_and_divergences_are_those_of_the_steps(solver):
    process, reference = small(solver), small(solver, seed=2)
    rows = draw(process)
    with torch.no_grad():
        found = process.score(rows, ("mean", "deviation", "entropy", "kl", "step_size"), reference=reference)
    mean, q = gaussians(process, rows)
    other, _ = gaussians(reference, rows)
    inside = rows.mask
    torch.testing.assert_close(found["mean"], mean, rtol=0, atol=1e-12)
    torch.testing.assert_close(found["deviation"], q, rtol=0, atol=1e-12)
    divergence = ((mean - other) ** 2).sum(2)[inside] / (2 * q[inside] ** 2)
    torch.testing.assert_close(found["kl"][inside], divergence, rtol=1e-10, atol=1e-12)
    entropy = 2 * (q[inside].log() + 0.5 * math.log(2 * math.pi * math.e))
    torch.testing.assert_close(found["entropy"][inside], entropy, rtol=0, atol=1e-12)
    size = torch.tensor([0.0] + [1 / STEPS] * STEPS, dtype=torch.float64) * inside
    torch.testing.assert_close(found["step_size"], size, rtol=0, atol=1e-12)
    for need in ("mean", "deviation", "entropy", "kl", "step_size"):
        assert not found[need][~inside].any()


def test_the_divergence_is_differentiable_in_the_policy_alone():
    process, reference = small(), small(seed=2)
    found = process.score(draw(process), ("kl",), reference=reference)["kl"].sum()
    found.backward()
    assert all(p.grad is not None for p in process.module.parameters())
    assert all(p.grad is None for p in reference.module.parameters())


def with_points(rows, **points):
    return rows.replace(points=Columns(points, len(rows)))


# what is missing is said


def test_needs_that_cannot_be_met_are_refused_in_words():
    process = small()
    rows = draw(process)
    with pytest.raises(MissingAbility, match="logits"):
        process.score(rows, ("logits",))
    for need, reads in (("forward", "noise, time"), ("denoised", "noise, time"), ("sample", "depth")):
        assert need in AT_POINTS
        with pytest.raises(MissingAbility, match=reads if need == "sample" else "noise, time"):
            process.score(rows, (need,))
    for depth in (0, STEPS + 1):
        with pytest.raises(InputError, match=f"1 to {STEPS} steps"):
            process.score(with_points(rows, depth=torch.full((5,), depth)), ("sample",))
    short = draw(process, Request(Prompt(0, 0), 2, horizon=3))
    with pytest.raises(InputError, match="drawn to their end"):
        process.score(with_points(short, depth=torch.ones(2).long()), ("sample",))
    with pytest.raises(MissingAbility, match="reference"):
        process.score(rows, ("kl",))


def test_rows_without_a_trained_step_have_scores_of_nothing():
    process = small("euler")
    rows = draw(process)
    assert not rows.mask.any()
    assert evaluations(process, lambda: process.score(rows)) == 0
    assert not process.score(rows).log_prob.any()
