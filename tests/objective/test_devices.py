"""Parts make their tensors where the rows are.

The tests run on the CPU with another device as the default: whatever a part makes without saying where lands there,
and meeting the rows it fails, as it would if the rows were on an accelerator.
"""

from __future__ import annotations

import pytest
import torch

from stepwell.batch import Batch
from stepwell.check.methods import bench
from stepwell.credit.group import Best, GroupCredit
from stepwell.credit.shaping import DivergencePenalty, Outcome, Overlong
from stepwell.credit.traces import GeneralisedAdvantage, RewardToGo, Whitened
from stepwell.objective.balance import SubTrajectoryBalance, TrajectoryBalance
from stepwell.objective.gates.step import CompleteRows, HighEntropy, OffPolicyRows, OneSide, SamplerCorrection
from stepwell.objective.groups import GroupLoss, PosteriorMatching
from stepwell.objective.policy import Policy
from stepwell.objective.preference.pairs import Pairing, Pairs
from stepwell.objective.ratio import MixtureDenominator, Ratio
from stepwell.objective.reduction import Reduction
from stepwell.objective.regularise import Divergence, Regulariser, entropy_bonus
from stepwell.objective.surrogate import BySource, Clip, Drift, Score, Taper
from stepwell.objective.term import Objective
from stepwell.objective.value import ValueLoss
from stepwell.parts import Part
from stepwell.planning.groups import DynamicSampling
from stepwell.recipe.recipe import Recipe
from stepwell.trajectories import count

CREDITS = [
    GroupCredit("leave-one-out", "std"),
    GroupCredit("batch", "batch-std", singleton="reward"),
    GroupCredit("mean", "mean", reward=0.5 * Outcome() + DivergencePenalty(0.1) + Overlong()),
    Best(skip_equal=True),
    Best("above-mean"),
    Best("positive"),
    Whitened(GeneralisedAdvantage(kl=0.1)),
    RewardToGo(),
]
RATIOS = [
    Ratio(level, mean)
    for level in ("segment", "turn", "sequence", "sequence_token")
    for mean in ("product", "geometric")
]
SURROGATES = [Clip(dual=3.0, delta=4.0), Taper(), Drift(), BySource(Clip(), Score(maximum=5.0))]
GATES = [SamplerCorrection("sequence", kind="mask"), CompleteRows(), HighEntropy(), OneSide(), OffPolicyRows()]
TERMS = [
    *(Policy(credit) for credit in CREDITS),
    *(Policy(ratio=ratio) for ratio in (*RATIOS, Ratio(denominator=MixtureDenominator()))),
    *(Policy(surrogate=surrogate) for surrogate in SURROGATES),
    *(Policy(gates=(gate,)) for gate in GATES),
    *(Policy(reduction=Reduction(mode)) for mode in ("row", "row-sum", "group", "fixed", "sum")),
    *(Pairs(pairing=Pairing(kind)) for kind in ("extremes", "mean", "all")),
    *(Regulariser(Divergence(name)) for name in ("k1", "k3-weighted", "k1+", "k3+", "abs")),
    Regulariser(Divergence("k2", level="sequence")),
    entropy_bonus(),
    ValueLoss(),
    GroupLoss(),
    GroupLoss(PosteriorMatching()),
    TrajectoryBalance(),
    TrajectoryBalance(partition="group"),
    SubTrajectoryBalance(),
]


def run(term):
    """Plan and loss of a term where tensors are made on another device unless a device is named."""
    recipe = Recipe(Objective((term,)))
    models, rows = bench(recipe)
    objective, counts = recipe.whole, count(rows, models.policy.horizon)
    scores = models.score(rows, objective.needs | (objective.present - {"log_prob"}))
    batch = Batch(rows, counts, scores, {name: state.initial for name, state in objective.states.items()})
    with torch.device("meta"):
        loss = objective.loss(batch, objective.plan(batch))
    assert loss.value.device.type == "cpu"
    assert all(value.device.type == "cpu" for value in loss.metrics.values())
    return float(loss.value.detach())


@pytest.mark.parametrize("term", TERMS, ids=lambda term: str(term)[:80])
def test_a_term_stays_where_its_rows_are(term):
    run(term)


def test_a_planner_stays_where_the_rows_are():
    _, rows = bench(Recipe(Policy()))
    planner = DynamicSampling(prompts=2, size=4)
    with torch.device("meta"):
        kept = planner.keep(rows)
    assert set(rows.prompt[kept].tolist()) == {0, 1}


class Elsewhere(Part):
    """The mistake of a baseline made on the default device."""

    def __call__(self, batch):
        return batch.reward - torch.zeros(len(batch))


def test_a_part_that_makes_its_tensors_elsewhere_is_caught():
    with pytest.raises((RuntimeError, NotImplementedError)):
        run(Policy(Elsewhere()))
