"""semantics='verl' is what verl's core algorithms compute, written out in plain numbers: it is no test dependency.

The formulas were read in verl's `core_algos.py`.
"""

from __future__ import annotations

import math
import statistics

import pytest
import torch

from stepwell.batch import Batch
from stepwell.errors import InputError
from stepwell.methods.catalogue import get
from stepwell.objective.term import Objective
from stepwell.process.base import Scores
from stepwell.rng import Rng
from stepwell.trajectories import count, make

EXACT = 1e-10
ROWS, STEPS = 9, 5
LENGTH = [5, 3, 4, 1, 5, 2, 4, 5, 3]
PROMPT = [0, 0, 0, 0, 1, 1, 1, 1, 2]  # the last one is alone
REWARD = Rng(1).normal(ROWS, dtype=torch.float64).tolist()
MASK = torch.arange(STEPS) < torch.tensor(LENGTH)[:, None]
OLD = (-1.0 - 2.0 * Rng(2).uniform(ROWS, STEPS, dtype=torch.float64)) * MASK
FAR = torch.tensor([[0.1, -0.3, 1.4, 21.0, -25.0]], dtype=torch.float64)  # log-ratios: beyond the clip, 3, and e^20
MOVED = FAR[0, (torch.arange(STEPS) + torch.arange(ROWS)[:, None]) % 5]
PRESENT = (OLD + MOVED) * MASK
AWAY = torch.tensor([0.2, -0.5, 3.0, -22.0, 1.0], dtype=torch.float64)
REFERENCE = (PRESENT - AWAY[(torch.arange(STEPS) + 2 * torch.arange(ROWS)[:, None]) % 5]) * MASK


def slopes(objective):
    """Ours, (N, T)."""
    objective = objective if isinstance(objective, Objective) else Objective((objective,))
    leaf = PRESENT.clone().requires_grad_()
    fields = {"reward": torch.tensor(REWARD, dtype=torch.float64), "prompt": torch.tensor(PROMPT)}
    fields |= {"length": torch.tensor(LENGTH), "old_log_prob": OLD, "reference_log_prob": REFERENCE}
    rows = make(torch.zeros(MASK.shape, dtype=torch.long), OLD, MASK, **fields)
    scores = Scores(leaf, {})
    plan = objective.plan(Batch(rows, count(rows), scores.detach()))
    return torch.autograd.grad(objective.loss(Batch(rows, count(rows), scores), plan).value, leaf)[0]


def credit(scaled=True):
    """Rewards less their group's mean over its deviation, or less the others' mean; of one alone the reward itself."""
    answer = []
    for reward, prompt in zip(REWARD, PROMPT, strict=True):
        group = [r for r, p in zip(REWARD, PROMPT, strict=True) if p == prompt]
        if len(group) == 1:
            answer.append(reward)
        elif scaled:
            answer.append((reward - statistics.fmean(group)) / (statistics.stdev(group) + 1e-6))
        else:
            answer.append(reward - (sum(group) - reward) / (len(group) - 1))
    return answer


def clipped(x, a, low=0.2, high=0.2, dual=3.0):
    """d/dx of the loss -min(r A, clip(r) A), at least -c A where A < 0, x bounded by 20."""
    if abs(x) > 20:
        return 0.0
    ratio = math.exp(x)
    if a > 0:
        return -ratio * a if ratio <= 1 + high else 0.0
    return -ratio * a if 1 - low <= ratio <= dual else 0.0


def stated(slope, by="token"):
    """(N, T) slope(x, A, row) over all steps, or over each row's and the rows."""
    found = torch.zeros(ROWS, STEPS, dtype=torch.float64)
    for row, length in enumerate(LENGTH):
        weight = 1 / sum(LENGTH) if by == "token" else 1 / (length * ROWS)
        for step in range(length):
            found[row, step] = weight * slope(row, step)
    return found


def x(row, step):
    return float(PRESENT[row, step] - OLD[row, step])


def divergence_slope(row, step):
    """d/d log pi of exp(-d) - 1 + d, d bounded by 20 and the whole by 10."""
    d = float(PRESENT[row, step] - REFERENCE[row, step])
    return 1 - math.exp(-d) if abs(d) <= 20 and math.exp(-d) - 1 + d <= 10 else 0.0


def near(found, expected):
    return float((found - expected).abs().max()) < EXACT * max(1.0, float(expected.abs().max()))


def test_grpo():
    a = credit()
    expected = stated(lambda row, step: clipped(x(row, step), a[row]) + 0.3 * divergence_slope(row, step))
    assert near(slopes(get("grpo").recipe(kl=0.3, semantics="verl").whole), expected)
    assert not near(slopes(get("grpo").recipe(kl=0.3).whole), expected)


def test_dapo_has_its_own_upper_clip():
    a = credit()
    expected = stated(lambda row, step: clipped(x(row, step), a[row], high=0.28))
    assert near(slopes(get("dapo").recipe(buffer=0.0, semantics="verl").whole), expected)
    assert not near(slopes(get("dapo").recipe(buffer=0.0).whole), expected)


def test_rloo_is_by_tokens():
    a = credit(scaled=False)
    expected = stated(lambda row, step: clipped(x(row, step), a[row]))
    assert near(slopes(get("rloo").recipe(semantics="verl").whole), expected)
    assert not near(slopes(get("rloo").recipe().whole), expected)


def test_cispo_bounds_the_weight_and_keeps_its_gradient():
    a = credit()
    recipe = get("cispo").recipe(maximum=1.2, minimum=0.8, semantics="verl")
    weight = lambda row, step: min(max(math.exp(min(max(x(row, step), -20), 20)), 0.8), 1.2)  # noqa: E731
    assert near(slopes(recipe.whole), stated(lambda row, step: -weight(row, step) * a[row]))


@pytest.mark.parametrize("scale", [0.01, 1.0])
def test_gspo_has_the_value_of_the_row_and_the_gradient_of_the_token(scale, monkeypatch):
    monkeypatch.setitem(globals(), "PRESENT", (OLD + scale * MOVED) * MASK)
    a = credit()

    def slope(row, step):
        mean = statistics.fmean(x(row, s) for s in range(LENGTH[row]))
        ratio = math.exp(min(mean, 10.0))
        if mean > 10 or (a[row] > 0 and ratio > 1.04) or (a[row] < 0 and ratio < 0.97):
            return 0.0
        return -ratio * a[row]

    found = slopes(get("gspo").recipe(low=0.03, high=0.04, semantics="verl").whole)
    assert near(found, stated(slope, "row"))


@pytest.mark.parametrize("name", ["grpo", "bnpo", "gspo", "cispo", "rloo", "dapo", "ppo", "vespo", "ipo"])
def test_a_library_that_a_method_has_no_semantics_of_is_refused(name):
    with pytest.raises(InputError, match="must be one of paper, "):
        get(name).recipe(semantics="openrlhf")
