"""Balance with a reward: where it is 0, its gradients on policy, and the learned partition."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from tilted import EXACT, OWN, loss_on, models, some_rows

from stepwell.check.oracles.expected import expected_gradient
from stepwell.check.oracles.provable import deviation
from stepwell.errors import UnknownName
from stepwell.objective.balance import SubTrajectoryBalance, TrajectoryBalance
from stepwell.objective.state import LogPartition
from stepwell.objective.term import Objective
from stepwell.rng import Rng


@functools.cache
def balanced():
    """The distribution P = R / Z with log R given, log Z, and exact log flows as its value table."""
    process, _, log_reward, _ = models()
    by_string = dict(zip(process.strings(), log_reward.tolist(), strict=True))
    probability = dict(zip(process.strings(), process.string_log_probabilities().tolist(), strict=True))
    target = process.tilted(lambda text: by_string[text] - probability[text])
    rows = target.trajectories().replace(reward=log_reward)
    contexts, flow = target._contexts(rows.action), torch.zeros(target.contexts, dtype=torch.float64)
    for step in range(target.length):
        here = rows.mask[:, step]
        flow.index_add_(0, contexts[here, step], log_reward[here].exp())
    target.module.get_parameter("value").data.copy_(flow.clamp(min=1e-300).log()[None])
    return target, rows, float(log_reward.logsumexp(0))


def balance(partition="learned", log_partition=0.0):
    return TrajectoryBalance(score=OWN, partition=partition, log_partition=LogPartition("log_partition", log_partition))


def test_trajectory_balance_is_zero_at_the_normalised_reward():
    target, rows, log_partition = balanced()
    assert loss_on(target, balance(log_partition=log_partition), rows)[0] < 1e-25
    assert loss_on(target, balance("group"), rows.replace(prompt=torch.arange(len(rows)) % 3))[0] < 1e-25
    assert loss_on(target, balance(log_partition=log_partition + 1), rows)[0] == pytest.approx(0.5)
    assert loss_on(models()[0], balance(log_partition=log_partition), rows)[0] > 0.1


@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0, 3.0])
def test_sub_trajectory_and_detailed_balance_are_zero_at_exact_flows(lam):
    target, rows, _ = balanced()
    assert loss_on(target, SubTrajectoryBalance(lam, against="none"), rows)[0] < 1e-25
    assert loss_on(target, SubTrajectoryBalance(lam, against="none"), rows.replace(reward=2 * rows.reward))[0] > 0.1


def sub_balance_by_hand(log_prob, flow, log_reward, lam):
    """One row: every pair i < j of the states of its trained steps, weighted and normalised."""
    states = [*flow, log_reward]
    total, weights = 0.0, 0.0
    for i, j in itertools.combinations(range(len(states)), 2):
        weight = lam ** (j - i - 1)
        total += weight * (states[i] + sum(log_prob[i:j]) - states[j]) ** 2
        weights += weight
    return total / weights


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0, 2.0])
def test_sub_trajectory_balance_is_its_definition(batch_of, lam):
    """It skips steps that are not trained."""
    mask = torch.tensor([[True, False, True, True, False], [False, True, False, False, False], [True] * 5])
    present, flow = (Rng(i).normal(3, 5, dtype=torch.float64) for i in range(2))
    log_reward = Rng(2).normal(3, dtype=torch.float64)
    objective = Objective((SubTrajectoryBalance(lam, against="none"),))
    batch = batch_of(present, mask=mask, extra={"value": flow}, reward=log_reward)
    found = float(objective.loss(batch, objective.plan(batch)).value)
    by_hand = [
        sub_balance_by_hand(p[m].tolist(), f[m].tolist(), float(r), lam)
        for p, f, m, r in zip(present, flow, mask, log_reward, strict=True)
    ]
    assert found == pytest.approx(sum(by_hand) / 3, rel=1e-12)


def test_the_limits_of_sub_trajectory_balance(batch_of):
    """Detailed balance at one end, trajectory balance at the other."""
    present, flow = (Rng(i).normal(1, 4, dtype=torch.float64) for i in range(2))
    log_reward = torch.tensor([2.3], dtype=torch.float64)
    batch = batch_of(present, extra={"value": flow}, reward=log_reward)

    def value(lam):
        objective = Objective((SubTrajectoryBalance(lam, against="none"),))
        return float(objective.loss(batch, objective.plan(batch)).value)

    states = torch.cat([flow[0], log_reward])
    detailed = ((states[:-1] + present[0] - states[1:]) ** 2).mean()
    whole = (flow[0, 0] + present.sum() - log_reward[0]) ** 2
    assert value(0.0) == pytest.approx(float(detailed), rel=1e-12)
    assert value(1e12) == pytest.approx(float(whole), rel=1e-9)


def test_vargrad_has_the_gradient_of_balance():
    """With the mean residual held fixed."""
    process, _, _, _ = models()
    rows = some_rows(number=6, groups=1)
    with torch.no_grad():
        missing = rows.reward - process.score(rows).log_prob.sum(1)
    fixed = loss_on(process, balance(log_partition=float(missing.mean())), rows)
    assert deviation(loss_on(process, balance("group"), rows)[1], fixed[1]) < EXACT
    score = process.score(rows).log_prob.sum(1)
    through = 0.5 * ((rows.reward - score).mean() + score - rows.reward).pow(2).mean()
    assert deviation(fixed[1], torch.autograd.grad(through, process.logits)[0]) < EXACT


@pytest.mark.parametrize("error", [0.0, 3.0])
def test_balance_on_policy_has_the_gradient_of_the_divergence(error):
    """From the target."""
    process, _, log_reward, _ = models()
    _, _, log_partition = balanced()
    found = -expected_gradient(process, balance(log_partition=log_partition + error), 1, log_reward)
    log_probability = process.string_log_probabilities()
    divergence = (log_probability.exp() * (log_probability - log_reward)).sum()
    assert deviation(found, torch.autograd.grad(divergence, process.logits)[0]) < EXACT


def test_the_learned_partition_converges_to_that_of_the_target():
    """Elsewhere it converges to a bound."""
    target, rows, log_partition = balanced()
    term = balance()
    found = 0.0
    for _ in range(60):
        found = term.log_partition.update(found, loss_on(target, term, rows, {"log_partition": found})[2])
    assert found == pytest.approx(log_partition * (1 - 0.9**60), rel=1e-9)
    process, _, log_reward, _ = models()
    probability = process.string_probabilities().detach()
    bound = float((probability * (log_reward - probability.log())).sum())
    assert bound < log_partition  # the evidence bound: what rows of another policy teach
    residual = float((probability * (bound + probability.log() - log_reward)).sum())
    assert term.log_partition.update(bound, {"residual": residual}) == pytest.approx(bound, abs=1e-12)


def test_names_that_are_none_are_refused():
    for wrong, said in (
        (lambda: TrajectoryBalance(partition="groups"), "group"),
        (lambda: SubTrajectoryBalance(against="nome"), "none"),
    ):
        with pytest.raises(UnknownName, match=f"did you mean '{said}'"):
            wrong()
