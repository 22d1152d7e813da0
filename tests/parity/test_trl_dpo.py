"""Every preference and distillation loss that TRL 1.16 offers equals ours, in the loss and in its slopes, float64."""

from __future__ import annotations

import collections
import os
from types import SimpleNamespace

import pytest
import torch

from stepwell.columns import Columns

os.environ |= {"TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_OFFLINE": "1"}
pytest.importorskip("trl", minversion="1.16", reason="TRL 1.16 is what these losses are held against")

from trl.experimental.cpo.cpo_trainer import CPOTrainer
from trl.experimental.gkd.gkd_trainer import GKDTrainer
from trl.experimental.iw_opd.iw_opd_trainer import IWOPDTrainer
from trl.experimental.orpo.orpo_trainer import ORPOTrainer
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.kto_trainer import KTOTrainer

from stepwell.batch import Batch
from stepwell.errors import InputError, UnknownName
from stepwell.methods.catalogue import get
from stepwell.objective.distillation import TeacherAdvantage, generalised_divergence
from stepwell.objective.policy import Policy
from stepwell.objective.preference.links import LINKS, OF_MARGINS, OddsRatio
from stepwell.objective.preference.pairs import ChosenLikelihood, Pairs, Square
from stepwell.objective.surrogate import Score
from stepwell.objective.term import Objective
from stepwell.process.base import Scores
from stepwell.rng import Rng
from stepwell.trajectories import count, make

EXACT = 1e-10
PAIRS, STEPS = 4, 7
LENGTH = torch.tensor([7, 3, 5, 2, 4, 6, 5, 7])  # the chosen rows, then the rejected
MASK = torch.arange(STEPS) < LENGTH[:, None]
PRESENT, REFERENCE, SQUARES = (
    (-0.1 - 0.9 * Rng(seed).uniform(2 * PAIRS, STEPS, dtype=torch.float64)) * MASK for seed in range(3)
)


class OneProcess:
    """What TRL asks of accelerate, for one process."""

    device = torch.device("cpu")
    num_processes = 1
    gather = staticmethod(lambda x: x)
    gather_for_metrics = staticmethod(lambda x: x)
    reduce = staticmethod(lambda x, reduction="sum": x)


class Model(torch.nn.Module):
    """A model that has already said what it says."""

    is_gradient_checkpointing = False

    def __init__(self, log_prob):
        super().__init__()
        self.log_prob = log_prob

    def forward(self, **_):
        nothing = torch.zeros_like(self.log_prob)
        return SimpleNamespace(
            log_probs=self.log_prob,
            log_sum_sq_probs=SQUARES.to(nothing),
            entropy=nothing,
            mean_logits=nothing,
            is_top1=nothing.bool(),
            label_mask=MASK,
            aux_loss=None,
            logits=None,
            loss=None,
        )


def trainer(present, reference, **settings):
    """A TRL trainer without its construction: the attributes that its loss reads."""
    defaults = {
        "model": Model(present),
        "ref_model": Model(reference),
        "accelerator": OneProcess(),
        "aux_loss_enabled": False,
        "precompute_ref_logps": False,
        "args": SimpleNamespace(gradient_checkpointing_kwargs=None, discopop_tau=0.05),
        "_total_train_tokens": 0,
        "_tp_size": 1,
        "_metrics": {mode: collections.defaultdict(list) for mode in ("train", "eval")},
    }
    return SimpleNamespace(**{**defaults, **settings})


def inputs():
    """Token ids of no meaning, one token of prompt and then the rows' steps."""
    mask = torch.cat([torch.zeros(2 * PAIRS, 1, dtype=torch.bool), MASK], 1).long()
    return {"input_ids": torch.zeros_like(mask), "attention_mask": torch.ones_like(mask), "completion_mask": mask}


def theirs(loss, beta, smoothing=0.0, divergence="reverse_kl", tail=None, weighted=False, kind=torch.float64):
    """TRL's loss and its slopes."""
    leaf = PRESENT.to(kind).clone().requires_grad_()
    names = loss if isinstance(loss, list) else [loss]
    stub = trainer(
        leaf,
        REFERENCE.to(kind),
        ld_alpha=tail,
        f_divergence_type=divergence,
        f_alpha_divergence_coef=0.5,
        loss_types=names,
        loss_weights=[1.0] * len(names),
        beta=beta,
        label_smoothing=smoothing,
        use_weighting=weighted,
    )
    torch.set_default_dtype(kind)  # TRL makes its smoothing a tensor of the default kind: float32, 5e-8 off, otherwise
    try:
        value = DPOTrainer._compute_loss(stub, stub.model, inputs(), False)
    finally:
        torch.set_default_dtype(torch.float32)
    return value.detach(), torch.autograd.grad(value, leaf)[0]


def ours(objective, kind=torch.float64, **targets):
    """Our loss and its slopes on the same rows, each pair a prompt."""
    objective = objective if isinstance(objective, Objective) else Objective((objective,))
    leaf = PRESENT.to(kind).clone().requires_grad_()
    prompt = torch.arange(PAIRS).repeat(2)
    reward = torch.tensor([1.0, 0.0], dtype=kind).repeat_interleave(PAIRS)
    fields = {"reward": reward, "prompt": prompt, "length": LENGTH}
    fields |= {"reference_log_prob": REFERENCE.to(kind), "old_log_prob": PRESENT.to(kind)}
    rows = make(torch.zeros(MASK.shape, dtype=torch.long), PRESENT.to(kind), MASK, **fields)
    rows = rows.replace(info=Columns({"teacher_log_prob": REFERENCE.to(kind)}, len(rows)))
    scores = Scores(leaf, {"sum_of_squares": SQUARES.exp().to(kind)})
    plan = objective.plan(Batch(rows, count(rows), scores.detach()))
    plan = plan.replace(**{"0": plan["0"].replace(**targets)})
    value = objective.loss(Batch(rows, count(rows), scores), plan).value
    return value.detach(), torch.autograd.grad(value, leaf)[0]


def apart(one, two):
    """The largest difference in loss or slope; padding has none that counts."""
    return max(float((one[0] - two[0]).abs()), float(((one[1] - two[1]) * MASK).abs().max()))


def recipe(**options):
    return get("dpo").recipe(**options).whole


SMOOTHING = {"exo-pair": 1e-3, "robust": 0.1, "aot": 0.1, "aot-unpaired": 0.1}


@pytest.mark.parametrize("beta", [0.1, 0.7])
@pytest.mark.parametrize("loss", LINKS)
def test_every_dpo_loss_is_that_of_trl(loss, beta):
    smoothing = SMOOTHING.get(loss, 0.0)
    expected = theirs(loss.replace("-", "_"), beta, smoothing)
    assert apart(ours(recipe(loss=loss, beta=beta, smoothing=smoothing)), expected) < EXACT
    assert apart(ours(recipe(loss=loss, beta=1.001 * beta, smoothing=smoothing)), expected) > 1e-6


def test_the_sigmoid_loss_of_trl_ignores_smoothing_and_ours_is_conservative_dpo():
    plain, smoothed = theirs("sigmoid", 0.3), theirs("sigmoid", 0.3, 0.1)
    assert apart(plain, smoothed) == 0
    assert apart(ours(recipe(beta=0.3, smoothing=0.1)), smoothed) > 1e-3
    cpo = link_of(CPOTrainer.cpo_loss, "sum", **{**CPO, "loss_type": "sigmoid"})
    score = get("cpo").recipe().whole.terms[0].score
    assert apart(ours(Pairs(recipe(beta=0.7, smoothing=0.1).terms[0].link, score)), cpo) < EXACT


def test_every_loss_type_that_trl_knows_is_covered():
    with pytest.raises(ValueError, match="Unknown loss type") as error:
        theirs("none", 0.1)
    known = set(str(error.value).split("[")[1].split("]")[0].replace("'", "").split(", "))
    assert known == {name.replace("-", "_") for name in LINKS} | {"sft"}


def test_the_supervised_loss_is_that_of_trl_and_losses_add_up():
    assert apart(ours(ChosenLikelihood()), theirs("sft", 0.1)) < EXACT
    both = ours(recipe(loss="hinge", beta=0.3) + ChosenLikelihood())
    assert apart(both, theirs(["hinge", "sft"], 0.3)) < EXACT
    assert apart(ours(ChosenLikelihood(rows=True)), theirs("sft", 0.1)) > 1e-3


@pytest.mark.parametrize("divergence", ["forward-kl", "js"])
@pytest.mark.parametrize("loss", OF_MARGINS)
def test_other_divergences_are_those_of_trl(loss, divergence):
    smoothing = SMOOTHING.get(loss, 0.0)
    name = {"js": "js_divergence"}.get(divergence, "forward_kl")
    expected = theirs(loss.replace("-", "_"), 0.3, smoothing, name)
    assert apart(ours(recipe(loss=loss, beta=0.3, smoothing=smoothing, divergence=divergence)), expected) < EXACT


def test_the_alpha_divergence_is_that_of_trl_in_the_one_precision_trl_can():
    with pytest.raises(KeyError):
        theirs("sigmoid", 0.3, divergence="alpha_divergence")
    found = ours(recipe(beta=0.3, divergence="alpha"), torch.float32)
    expected = theirs("sigmoid", 0.3, divergence="alpha_divergence", kind=torch.float32)
    # scores of up to 7 steps: sums and an exponential of order 10, at 2^-23 each
    assert apart(found, expected) < 40 * 2**-23


@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "nca-pair", "sigmoid-norm"])
@pytest.mark.parametrize("tail", [0.0, 0.3])
def test_length_desensitised_scores_are_those_of_trl(loss, tail):
    found = ours(recipe(loss=loss, beta=0.3, tail=tail))
    assert apart(found, theirs(loss.replace("-", "_"), 0.3, tail=tail)) < EXACT
    assert apart(found, theirs(loss.replace("-", "_"), 0.3)) > 1e-4


@pytest.mark.parametrize("loss", [name for name in LINKS if not name.startswith("aot") and name != "hinge"])
def test_on_policy_weights_are_those_of_trl(loss):
    smoothing = SMOOTHING.get(loss, 0.0)
    found = ours(recipe(loss=loss, beta=0.3, smoothing=smoothing, weighted=True))
    assert apart(found, theirs(loss.replace("-", "_"), 0.3, smoothing, weighted=True)) < EXACT


def test_a_weighted_hinge_has_slopes_here_and_none_in_trl():
    with pytest.raises(RuntimeError, match="inplace operation"):  # it multiplies the output of its relu in place
        theirs("hinge", 0.3, weighted=True)
    plain, weighted = (ours(recipe(loss="hinge", beta=0.3, weighted=flag)) for flag in (False, True))
    own = ((PRESENT - SQUARES) * MASK).sum(1) / LENGTH
    pair = (own[:PAIRS] + own[PAIRS:]).exp().repeat(2)
    assert float((weighted[1] - plain[1] * pair[:, None]).abs().max()) < EXACT


def test_a_divergence_a_length_and_a_weight_together_are_those_of_trl():
    found = ours(recipe(loss="ipo", beta=0.3, divergence="js", tail=0.3, weighted=True))
    assert apart(found, theirs("ipo", 0.3, 0.0, "js_divergence", 0.3, True)) < EXACT


@pytest.mark.parametrize(
    "options",
    [
        {"loss": "hinge", "smoothing": 0.1},
        {"loss": "exo-pair"},
        {"loss": "robust", "smoothing": 0.5},
        {"loss": "nca-pair", "divergence": "js"},
        {"loss": "aot", "weighted": True},
        {"loss": "aot-unpaired", "tail": 0.5},
        {"tail": 1.5},
    ],
)
def test_what_a_loss_would_ignore_is_refused(options):
    with pytest.raises(InputError):
        recipe(**options)


def test_an_unknown_loss_names_the_nearest():
    with pytest.raises(UnknownName, match="did you mean 'exo-pair'"):
        recipe(loss="exo_pair")


def test_the_ipo_method_with_semantics_trl_is_that_of_trl_and_with_the_papers_is_not():
    expected = theirs("ipo", 0.3)
    assert apart(ours(get("ipo").recipe(beta=0.3, semantics="trl").whole), expected) < EXACT
    assert apart(ours(get("ipo").recipe(beta=0.3).whole), expected) > 0.1


@pytest.mark.parametrize("point", [0.3, -0.2])
def test_kto_is_that_of_trl_given_its_reference_point(point):
    leaf = PRESENT.clone().requires_grad_()
    settings = {"loss_type": "kto", "beta": 0.3, "desirable_weight": 1.3, "undesirable_weight": 0.8}
    stub = trainer(leaf, REFERENCE, calculate_KL=True, **settings)
    stub._compute_kl_logps = lambda model, batch: torch.full((8,), point if model is stub.model else 0.0).double()
    label = torch.tensor([1] * PAIRS + [0] * PAIRS)
    value = KTOTrainer._compute_loss(stub, stub.model, {**inputs(), "label": label}, False)
    expected = value.detach(), torch.autograd.grad(value, leaf)[0]
    options = {"beta": 0.3, "desirable": 1.3, "undesirable": 0.8}
    center = torch.full((2 * PAIRS,), max(point, 0.0)).double()
    assert apart(ours(get("kto").recipe(**options).whole, center=center), expected) < EXACT
    assert apart(ours(get("kto").recipe(**options).whole, center=center + 0.1), expected) > 1e-4


def link_of(kind, score, **settings):
    """The loss and slopes of a TRL function of two sides' scores, sums or means of log-probabilities."""
    leaf = PRESENT.clone().requires_grad_()
    total = (leaf * MASK).sum(1) / (LENGTH if score == "mean" else 1)
    losses = kind(SimpleNamespace(accelerator=OneProcess(), **settings), total[:PAIRS], total[PAIRS:])[0]
    return losses.mean().detach(), torch.autograd.grad(losses.mean(), leaf)[0]


CPO = {"beta": 0.7, "alpha": 0.0, "label_smoothing": 0.1, "simpo_gamma": 0.5}


@pytest.mark.parametrize("gamma", [0.5, 1.375])
def test_simpo_and_alphapo_are_those_of_trl(gamma):
    settings = {**CPO, "simpo_gamma": gamma, "loss_type": "simpo"}
    found = ours(get("simpo").recipe(beta=0.7, gamma=gamma, smoothing=0.1).whole)
    assert apart(found, link_of(CPOTrainer.cpo_loss, "mean", **settings)) < EXACT
    shaped = {**settings, "alpha": 0.3, "label_smoothing": 0.0}
    found = ours(get("alphapo").recipe(beta=0.7, gamma=gamma, alpha=0.3).whole)
    assert apart(found, link_of(CPOTrainer.cpo_loss, "mean", **shaped)) < EXACT


def test_cpo_is_that_of_trl_with_the_supervised_loss():
    pairs = link_of(CPOTrainer.cpo_loss, "sum", **{**CPO, "loss_type": "sigmoid"})
    chosen = theirs("sft", 0.1)
    expected = pairs[0] + 0.4 * chosen[0], pairs[1] + 0.4 * chosen[1]
    assert apart(ours(get("cpo").recipe(beta=0.7, smoothing=0.1, likelihood=0.4).whole), expected) < EXACT


def test_cpo_losses_of_means_are_those_of_trl():
    term = get("simpo").recipe().whole.terms[0]
    expected = link_of(CPOTrainer.cpo_loss, "mean", **{**CPO, "loss_type": "ipo"})
    assert apart(ours(Pairs(Square(0.7), term.score)), expected) < EXACT


def test_the_odds_ratio_is_that_of_trl_in_its_float32():
    term = Pairs(OddsRatio(), get("simpo").recipe().whole.terms[0].score, coefficient=0.7)
    found = link_of(ORPOTrainer.odds_ratio_loss, "mean", beta=0.7)
    # TRL returns minus the loss, and casts to float32 first
    assert apart(ours(term), (-found[0], -found[1])) < 20 * 2**-23


@pytest.mark.parametrize("beta", [0.0, 1e-3, 0.3, 0.5, 0.99, 1.0])
def test_the_divergence_from_a_teacher_is_that_of_trl(beta):
    student, teacher = (Rng(seed).normal(2, 3, 7, dtype=torch.float64).requires_grad_() for seed in (1, 2))
    found = generalised_divergence(student.log_softmax(-1), teacher.detach().log_softmax(-1), beta)
    expected = GKDTrainer.generalized_jsd_loss(student, teacher.detach(), beta=beta, reduction="none").sum(-1)
    slopes = [torch.autograd.grad(value.sum(), student)[0] for value in (found, expected)]
    assert float((found - expected).abs().max().detach()) < EXACT
    assert float((slopes[0] - slopes[1]).abs().max()) < EXACT


def test_the_published_family_of_divergences_jumps_at_its_ends_and_the_scaled_one_does_not():
    student, teacher = (Rng(seed).normal(9, dtype=torch.float64).log_softmax(-1) for seed in (1, 2))
    value = lambda beta, scaled: float(generalised_divergence(student, teacher, beta, scaled))  # noqa: E731
    for near, end in ((1e-6, 0.0), (1 - 1e-6, 1.0)):
        assert value(near, False) < 1e-5 * value(end, False)
        assert value(near, True) == pytest.approx(value(end, True), rel=1e-4)  # of first order in beta


def test_front_loaded_distillation_is_that_of_trl():
    logits = torch.randn(8, STEPS, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    tokens = torch.zeros(MASK.shape, dtype=torch.long)
    logits = logits.requires_grad_()
    labels = tokens.masked_fill(~MASK, -100)
    stub = trainer(PRESENT, REFERENCE, temperature=1.0, iw_opd_gamma=0.5, iw_opd_epsilon=1e-8)
    value = IWOPDTrainer._compute_iw_opd_loss(stub, logits, tokens, labels, REFERENCE, PRESENT)
    expected = torch.autograd.grad(value, logits)[0]
    found = ours(Policy(TeacherAdvantage(front=0.5), surrogate=Score()))[1]
    slopes = torch.autograd.grad((logits.log_softmax(-1)[..., 0] * found * MASK).sum(), logits)[0]
    assert float((slopes - expected).abs().max()) < EXACT
