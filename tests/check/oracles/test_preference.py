"""Oracles of preference, balance and distillation methods hold to rounding, and catch the mistakes planted here."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

import pytest
import torch

from stepwell.batch import Read
from stepwell.check.methods import bench, gradient
from stepwell.check.oracles import registry
from stepwell.check.oracles.preference import claims
from stepwell.check.oracles.preference import gradients as oracles
from stepwell.check.oracles.preference.losses import LOSSES, WAYS
from stepwell.check.oracles.registry import oracle
from stepwell.errors import InputError
from stepwell.methods import Card, get
from stepwell.objective.balance import SubTrajectoryBalance
from stepwell.objective.distillation import TeacherAdvantage, TeacherDivergence, TeacherEstimate
from stepwell.objective.groups import Consistency, GroupLoss, NashRegression, PosteriorMatching
from stepwell.objective.policy import Policy
from stepwell.objective.preference.links import Robust
from stepwell.objective.preference.pairs import Pairs, SequenceScore
from stepwell.objective.preference.unpaired import Prospect, RejectionPairs
from stepwell.objective.reduction import Reduction
from stepwell.objective.regularise import Divergence, Regulariser
from stepwell.objective.surrogate import Plain
from stepwell.parts import Part
from stepwell.recipe.recipe import Recipe
from stepwell.rng import Rng
from stepwell.trajectories import pad_steps

FOUND = 1e-4


@dataclass
class Mutant:
    """A card whose method runs with another option than it was told."""

    card: Card
    option: str
    value: object

    @property
    def id(self):
        return self.card.id

    @property
    def options(self):
        return self.card.options

    def recipe(self, **options):
        told = {**self.card.options, **options}[self.option]
        changed = self.value if told != self.value else self.card.options[self.option]
        return self.card.recipe(**{**options, self.option: changed})


NOT_IN_THE_LOSS = {"accept", "epochs", "minibatches", "rounds", "decay", "reference", "segment", "vines"}
NOT_IN_THE_LOSS |= {"trajectory-balance rate"}
OTHER = {"threshold": 0.9, "limit": 0.3, "pairs": "mean", "semantics": "trl", "anchor": "down", "estimate": "k3"}
OTHER |= {"loss": "ipo", "divergence": "forward-kl", "to_go": True, "failing": True, "ratio": True, "weighted": True}


def mutants():
    for name in LOSSES:
        for option, value in get(name).options.items():
            if not {option, f"{name} {option}"} & NOT_IN_THE_LOSS:
                yield name, option, OTHER[option] if option in OTHER else 0.99 * value if value else 0.01


@pytest.mark.parametrize(("name", "option", "value"), list(mutants()))
def test_an_option_of_another_value_than_told_fails_the_loss_by_hand(name, option, value):
    card = get(name)
    mutant = Mutant(card, option, value)
    found = [oracles._by_hand(mutant, way) for way in ({}, *WAYS.get(name, [])) if fits(mutant, way)]
    assert max(found) > 1e-5


def fits(mutant, way):
    """Whether the method takes the changed option beside these."""
    try:
        mutant.recipe(**way)
    except InputError:
        return False
    return True


@dataclass(frozen=True)
class Halved(SequenceScore):
    """The mistake of scoring half of what there is."""

    def __call__(self, batch):
        return 0.5 * super().__call__(batch)


@dataclass(frozen=True)
class Skewed(NashRegression):
    """The mistake of labels from rewards in place of rates of winning."""

    def __call__(self, score, reward, proposal):
        label = torch.sigmoid(reward[:, None] - reward)
        logit = self.beta * (score[:, None] - score)
        return -(label * torch.nn.functional.logsigmoid(logit)).sum() / len(score) ** 2


@dataclass(frozen=True)
class Unproposed(PosteriorMatching):
    """The mistake of forgetting the law that the samples were drawn from."""

    def __call__(self, score, reward, proposal):
        return super().__call__(score, reward, torch.zeros_like(proposal))


@dataclass(frozen=True)
class BelowZero(Prospect):
    """The mistake of a point that is the mean size of the scores."""

    def plan(self, batch, targets):
        planned = super().plan(batch, targets)
        return {**planned, "center": 2 * planned["center"]}


@dataclass(frozen=True)
class Eager(RejectionPairs):
    """The mistake of accepting at another temperature."""

    def draw(self, rows, process, rng):
        return dataclasses.replace(RejectionPairs(temperature=2 * self.temperature, keep=self.keep)).draw(
            rows, process, rng
        )


@dataclass(frozen=True)
class Constantly(Part):
    """The mistake of an advantage without its sign."""

    reads = frozenset({Read("teacher", "log_prob")})

    def __call__(self, batch):
        return TeacherAdvantage()(batch).abs()


def near(step):
    policy = Policy(surrogate=Plain(), reduction=Reduction("row-sum"))
    return policy + Regulariser(Divergence("k3", "old"), 1 / step, Reduction("row-sum"))


PLANTED = {
    "tilted_minimum": [GroupLoss(Consistency(0.7), Halved()), GroupLoss(Unproposed(0.35))],
    "win_rate_minimum": [GroupLoss(Skewed(0.7)), GroupLoss(Consistency(0.7))],
    "regularised_gradient": [GroupLoss(Consistency(0.8)), GroupLoss(Consistency(0.7), Halved())],
    "posterior_gradient": [GroupLoss(Unproposed(0.7)), GroupLoss(PosteriorMatching(0.8))],
    "flow_minimum": [SubTrajectoryBalance(0.9), SubTrajectoryBalance(0.9, against="none")],
    "mirror_minimum": [near(1.3)],
    "flipped_labels": [Pairs(Robust(0.7, 0.25))],
    "reference_point": [BelowZero(), Prospect(score=Halved())],
    "guiding_weight": [Pairs(score=SequenceScore()), get("dpo").recipe(beta=0.7).objective],
    "rejection_law": [Eager(temperature=0.7, keep=2), RejectionPairs(temperature=0.7, keep=3)],
    "teacher_gradient": [
        Regulariser(TeacherEstimate("k3"), 1.0),
        Regulariser(TeacherEstimate(), 1.0, Reduction("row-sum")),
    ],
    "exact_distillation": [Regulariser(TeacherDivergence(0.5), 1.0)],
}


@pytest.mark.parametrize(("name", "planted"), [(name, term) for name, terms in PLANTED.items() for term in terms])
def test_a_planted_mistake_fails_the_oracle_it_should(name, planted):
    def build(beta=0.7, smoothing=0.2, accept=2, step=1.3, scaled=False):
        return Recipe(planted)

    assert oracle(name)(Card("planted", "A planted mistake", build)) > FOUND


def test_an_advantage_without_a_sign_fails_the_teachers_gradient():
    def build(to_go=False):
        return Recipe(Policy(Constantly()))

    assert claims.teacher_gradient(Card("planted", "", build)) > FOUND


def test_every_oracle_has_a_planted_mistake():
    homes = {oracles.__name__, claims.__name__}
    own = {name for name, found in registry.oracles().items() if found.__module__ in homes}
    assert own == {*PLANTED, "loss_by_hand"}


# the laws of methods, for what is not a default


def ways():
    for name in ("dpo", "ipo", "f-dpo", "disco", "kdrl", "on-policy-distillation", "step-dpo", "full-step-dpo", "gkd"):
        for way in WAYS.get(name, [{"beta": 0.0}, {"beta": 1.0, "scaled": True}, {"top": 2}]):
            yield pytest.param(name, way, id=f"{name}-{'-'.join(str(value) for value in way.values())}")


@pytest.mark.parametrize(("name", "way"), list(ways()))
def test_options_obey_the_laws_of_methods_too(name, way):
    recipe = get(name).recipe(**way)
    process, rows = bench(recipe)
    whole = gradient(process, recipe, rows)
    assert float(whole.norm()) > 0
    order = Rng(11).permutation(len(rows))
    kinds = [
        gradient(process, recipe, pad_steps(rows, rows.mask.shape[1] + 3)),
        gradient(process, recipe, rows[order]),
        gradient(process, recipe, rows, tokens=1),
    ]
    if recipe.whole.coupling != "batch":
        groups = [(rows.prompt % 2 == parity).nonzero()[:, 0] for parity in (0, 1)]
        kinds.append(gradient(process, recipe, rows, groups))
    for found in kinds:
        assert torch.allclose(found, whole, rtol=0, atol=1e-12)


def test_step_dpo_with_one_segment_is_dpo_on_the_pairs_remainder():
    """Rows that part at their first step and have one segment are compared whole: step-dpo is dpo."""
    recipe, plain = get("step-dpo").recipe(beta=0.3), get("dpo").recipe(beta=0.3, pairs="all")
    process, rows = bench(recipe)
    rows = rows[torch.tensor([list(rows.action[:, 0] == a).index(True) for a in rows.action[:, 0].unique()])]
    rows = rows.replace(prompt=torch.zeros(len(rows)).long(), segment=torch.zeros_like(rows.segment))
    assert torch.allclose(gradient(process, recipe, rows), gradient(process, plain, rows), rtol=0, atol=1e-13)


def test_limits_of_options_are_other_methods():
    process, rows = bench(get("tgdpo").recipe())
    slope = functools.partial(gradient, process)

    def same(one, two, tolerance=1e-12):
        assert torch.allclose(slope(one, rows), slope(two, rows), rtol=0, atol=tolerance)

    dpo = get("dpo").recipe()
    same(get("tgdpo").recipe(alpha=0.0), dpo)
    same(get("ld-dpo").recipe(tail=1.0), dpo)
    same(get("robust-dpo").recipe(smoothing=0.0), dpo)
    same(get("alphapo").recipe(alpha=1e-7), get("simpo").recipe(), 1e-6)  # of first order in alpha
    same(get("online-dpo").recipe(loss="ipo"), get("ipo").recipe())
    same(
        get("slic").recipe(likelihood=0.0),
        Recipe(Pairs(get("slic").recipe().whole.terms[0].link, SequenceScore(against="none"))),
    )


def test_vargrad_is_copg_up_to_the_factor_that_its_card_says():
    process, rows = bench(get("vargrad").recipe())
    rows = rows[(rows.prompt == 0).nonzero()[:, 0]]
    number, beta = len(rows), 0.3
    found = gradient(process, get("vargrad").recipe(beta=beta), rows)
    expected = gradient(process, get("copg").recipe(beta=beta), rows)
    # half the variance over n of s - R / beta, against half the mean square difference of pairs of R - beta s
    assert torch.allclose(found * 2 * beta**2 * number / (number - 1), expected, rtol=0, atol=1e-12)
