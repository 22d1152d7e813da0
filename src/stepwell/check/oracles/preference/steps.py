"""Oracles of pairs whose steps count by what they are worth: their limit, and that what they are worth is measured."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from stepwell.batch import Batch
from stepwell.check.oracles.credit.rollouts import drawn, earned, small
from stepwell.check.oracles.preference import by_hand as hand
from stepwell.check.oracles.preference.claims import only
from stepwell.check.oracles.provable import Provable, deviation
from stepwell.check.oracles.registry import register
from stepwell.check.replay import expectation
from stepwell.objective.preference.pairs import Logistic, Pairing, Pairs
from stepwell.objective.preference.step_pairs import StepPairs
from stepwell.objective.term import Objective, Term
from stepwell.process.base import Scores
from stepwell.trajectories import count


def slope_of(term: Term) -> tuple[Tensor, Batch]:
    """(N, T) dL/d log pi on rows with holes in their masks, and the rows."""
    rows, scores = hand.some_rows()
    leaf, objective = scores["log_prob"].clone().requires_grad_(), Objective((term,))
    batch = Batch(rows, count(rows), Scores(leaf))
    loss = objective.loss(batch, objective.plan(Batch(rows, batch.counts, Scores(leaf.detach())))).value
    return torch.autograd.grad(loss, leaf)[0] * batch.mask, batch


@register
def even_steps_are_dpo(card: Provable) -> float:
    """At rate = temperature = 0 the slope is that of dpo with all pairs, over 2 beta and the row's number of steps."""
    found, batch = slope_of(only(card, beta=0.7, rate=0.0, temperature=0.0))
    whole, _ = slope_of(Pairs(Logistic(0.7), pairing=Pairing("all")))
    return deviation(found, whole / (2 * 0.7 * batch.steps))


@register
def measured_step_values(card: Provable) -> float:
    """Over every outcome of rollouts, what a step is said to be worth has its prefix's expected reward as its mean.

    Each prefix is that of the row that has it; of a row that ends there it is the reward itself.
    """
    process, worst = small(), 0.0
    probability, strings = process.string_probabilities().tolist(), process.strings()
    for segment, vines in ((1, 1), (2, 2)):
        recipe = card.recipe(segment=segment, vines=vines)
        planner = dataclasses.replace(recipe.planner, prompts=1, size=1)  # type: ignore[type-var]
        term: Any = recipe.whole.terms[0]
        assert isinstance(term, StepPairs)

        def measured(rng: Any, planner: Any = planner, term: Any = term) -> Tensor:
            rows = drawn(process, planner, rng)
            answer = torch.zeros(len(strings), process.length, dtype=torch.float64)
            text = tuple(rows.action[0, : int(rows.length[0])].tolist())
            values = term.values(Batch(rows, count(rows)))
            answer[strings.index(text), : values.shape[1]] = values[0]
            return answer

        wanted = torch.zeros(len(strings), process.length, dtype=torch.float64)
        for place, text in enumerate(strings):
            for step in range(len(text)):
                known = text[: (step // segment + 1) * segment]
                same = [i for i, other in enumerate(strings) if other[: len(known)] == known]
                value = sum(probability[i] * earned(strings[i]) for i in same) / sum(probability[i] for i in same)
                wanted[place, step] = probability[place] * value
        worst = max(worst, deviation(expectation(measured), wanted))
    return worst
