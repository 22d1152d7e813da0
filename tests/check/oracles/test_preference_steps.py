"""Oracles of pairs whose steps count by what they are worth catch the mistakes that are planted here."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import pytest
import torch
from mistakes import LateVines

from stepwell import methods
from stepwell.check.oracles.preference import steps as preference_steps
from stepwell.check.oracles.registry import oracle, oracles
from stepwell.credit.prefixes import PrefixValues
from stepwell.objective.preference.pairs import Logistic, Pairing, Pairs
from stepwell.objective.preference.step_pairs import StepPairs
from stepwell.parts import Part
from stepwell.planning.measured import Vines
from stepwell.recipe.recipe import Recipe

FOUND = 1e-3


@dataclass(frozen=True)
class Same(StepPairs):
    """The mistake of lowering most what is worth most."""

    def credit(self, batch):
        targets = super().credit(batch)
        return {**targets, "falls": targets["rises"]}


@dataclass(frozen=True)
class Padded(StepPairs):
    """The mistake of a share for every step, trained or not."""

    def credit(self, batch):
        whole = dataclasses.replace(batch, rows=batch.rows.replace(mask=torch.ones_like(batch.rows.mask)))
        return {**super().credit(whole), "sides": self.pairing(batch)}


@dataclass(frozen=True)
class ByPrompt(StepPairs):
    """A mean over prompts of the mean over each one's pairs: the authors' way, which is not ours."""

    def plan(self, batch, targets):
        share = torch.zeros_like(batch.reward)
        for prompt in batch.rows.prompt.unique():
            own = batch.rows.prompt == prompt
            above = (batch.reward[own][:, None] > batch.reward[own]).sum()
            share[own] = 1 / (above.clamp(min=1) * len(batch.rows.prompt.unique()))
        return {"share": share}


@dataclass(frozen=True)
class Before(Part):
    """The mistake of a step's worth before it was taken."""

    def __call__(self, batch):
        return batch.field("value_before") * batch.mask


@dataclass(frozen=True)
class NoOutcome(Part):
    """The mistake of rows drawn from an end, where there is none."""

    def __call__(self, batch):
        return batch.field("value_after") * batch.mask


def planted(term, planner=Vines):
    """The card of full-step-dpo with a mistake in its term, by the settings of the right one, or in its planner."""
    real = methods.get("full-step-dpo")

    def build(beta=0.05, temperature=0.5, rate=1.0, segment=32, vines=4):
        return Recipe(term(beta=beta, temperature=temperature, rate=rate), planner(segment=segment, vines=vines))

    return dataclasses.replace(real, build=build)


def with_values(part):
    return lambda **settings: StepPairs(values=part, **settings)


PLANTED = [
    ("loss_by_hand", planted(Same), "what is worth most falls most"),
    ("loss_by_hand", planted(Padded), "shares of what is not trained"),
    ("loss_by_hand", planted(ByPrompt), "a mean over prompts"),
    ("loss_by_hand", planted(lambda beta, **rest: StepPairs(beta=1e-9, **rest)), "pairs that weigh alike"),
    ("loss_by_hand", planted(with_values(NoOutcome())), "no outcome"),
    ("even_steps_are_dpo", planted(Padded), "shares of what is not trained"),
    ("even_steps_are_dpo", planted(ByPrompt), "a mean over prompts"),
    ("even_steps_are_dpo", planted(lambda beta, **rest: StepPairs(beta=1e-9, **rest)), "pairs that weigh alike"),
    (
        "even_steps_are_dpo",
        planted(lambda beta, **_: Pairs(Logistic(beta), pairing=Pairing("all"))),
        "no division by the steps",
    ),
    ("measured_step_values", planted(with_values(Before())), "values of the states before"),
    ("measured_step_values", planted(with_values(NoOutcome())), "no outcome"),
    ("measured_step_values", planted(with_values(PrefixValues())), "what a step adds, not what it is worth"),
    ("measured_step_values", planted(StepPairs, LateVines), "values of later states"),
]


@pytest.mark.parametrize(
    ("name", "card", "mistake"), PLANTED, ids=[f"{name}-{mistake}" for name, _, mistake in PLANTED]
)
def test_a_planted_mistake_is_caught(name, card, mistake):
    assert oracle(name)(card) > FOUND, mistake


def test_every_oracle_of_steps_has_a_planted_mistake():
    own = {name for name, found in oracles().items() if found.__module__ == preference_steps.__name__}
    assert len(own) == 2
    assert own <= {name for name, *_ in PLANTED}
