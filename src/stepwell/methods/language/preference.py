"""Methods that train a language model from comparisons of its own samples, each a composition with its card."""

from __future__ import annotations

from stepwell.errors import InputError
from stepwell.methods.language.semantics import semantics_of
from stepwell.objective.preference.links import OF_MARGINS, PER_STEP, Classifier, link
from stepwell.objective.preference.pairs import (
    ChosenLikelihood,
    Hinge,
    Logistic,
    Pairing,
    Pairs,
    PairScore,
    SequenceScore,
    SortedPairs,
)
from stepwell.objective.preference.scores import ImplicitReward, LengthDesensitised, OnPolicyWeight
from stepwell.objective.state import RunningMean
from stepwell.objective.term import Objective, Term
from stepwell.parts import Part
from stepwell.ranges import NotNegative, Positive
from stepwell.recipe.recipe import Recipe
from stepwell.recipe.registry import method


def scored(loss: str, divergence: str = "reverse-kl", tail: float = 1.0) -> Part:
    """The score that a loss is a function of; raises `InputError` for what the loss is not defined for."""
    if divergence != "reverse-kl" and loss not in OF_MARGINS:
        raise InputError(
            f"divergence must be reverse-kl with the loss '{loss}', got '{divergence}'; {', '.join(OF_MARGINS)} take "
            "others."
        )
    if loss.startswith("aot") and tail != 1.0:
        raise InputError(f"tail must be 1 with the loss '{loss}', which sorts whole rows, got {tail}.")
    score: Part | PairScore = SequenceScore() if tail == 1.0 else LengthDesensitised(tail)
    if divergence == "reverse-kl" and tail == 1.0:
        return SequenceScore(mean=loss in PER_STEP)
    return ImplicitReward(score, divergence, mean=loss in PER_STEP)  # type: ignore[arg-type]


def with_likelihood(pairs: Pairs, coefficient: float, rows: bool = False) -> Term | Objective:
    """The pairs' loss, plus the negative log-likelihood of the chosen rows where its coefficient is not zero."""
    return pairs + ChosenLikelihood(pairs.pairing, coefficient, rows) if coefficient else pairs


@method(
    "dpo",
    title="Direct Preference Optimization, online",
    paper="Direct Preference Optimization: Your Language Model is Secretly a Reward Model",
    arxiv="2305.18290",
    year=2023,
    differs="A logistic loss on pairs built from each group (extremes, mean or all), against the starting policy.",
    when="When rewards order answers better than they measure them, and the policy should stay near its start.",
    note="`loss` is any of TRL 1.16's with hyphens for underscores, equal to it to 1e-10 in loss and gradient. TRL's "
    "sigmoid ignores label smoothing; here it gives conservative DPO.",
    proof=("preference_fixed_point", "loss_by_hand"),
)
def dpo(
    beta: float = 0.1,
    pairs: str = "extremes",
    smoothing: float = 0.0,
    loss: str = "sigmoid",
    divergence: str = "reverse-kl",
    tail: float = 1.0,
    weighted: bool = False,
) -> Recipe:
    score, form = scored(loss, divergence, tail), link(loss, beta, smoothing)
    pairing = Pairing(pairs)  # type: ignore[arg-type]
    if not loss.startswith("aot"):
        return Recipe(Pairs(form, score, pairing, weight=OnPolicyWeight() if weighted else None))
    if weighted:
        raise InputError(f"weighted must be false with the loss '{loss}', which sorts rows away from their pairs.")
    return Recipe(SortedPairs(form, pairing=pairing, paired=loss == "aot"))


@method(
    "ipo",
    title="Identity Preference Optimization",
    paper="A General Theoretical Paradigm to Understand Learning from Human Preferences",
    arxiv="2310.12036",
    year=2023,
    differs="dpo with a square in place of the logistic: margins are pulled to 1 / (2 beta) and grow no further.",
    when="When dpo overfits clear preferences: margins stop at a target.",
    note="semantics='trl' takes the mean log-ratio a step, as TRL's DPO trainer does on the authors' word; the "
    "paper's formula, and TRL's online trainer, take the sum. For rows of length n the target margin differs n-fold.",
    proof=("loss_by_hand",),
)
def ipo(beta: float = 0.1, semantics: str = "paper") -> Recipe:
    semantics_of("ipo", semantics, "paper trl")
    return Recipe(Pairs(link("ipo", beta), SequenceScore(mean=semantics == "trl")))


@method(
    "slic",
    title="Sequence Likelihood Calibration",
    aliases=("slic-hf",),
    paper="SLiC-HF: Sequence Likelihood Calibration with Human Feedback",
    arxiv="2305.10425",
    year=2023,
    differs="A hinge on the log-probabilities themselves, without a reference, plus the likelihood of the chosen row.",
    when="When there is no memory for a reference and the chosen answers must stay likely.",
    note="The likelihood is of the group's best row; the paper's is of a fine-tuning target. Defaults are ours.",
    proof=("loss_by_hand",),
)
def slic(margin: Positive = 1.0, likelihood: NotNegative = 0.1) -> Recipe:
    pairs = Pairs(Hinge(1 / margin), SequenceScore(against="none"), coefficient=margin)
    return Recipe(with_likelihood(pairs, likelihood))


@method(
    "exo",
    title="Efficient Exact Optimization",
    aliases=("exo-pair",),
    paper="Towards Efficient Exact Optimization of Language Model Alignment",
    arxiv="2402.00856",
    year=2024,
    differs="The divergence of the pair's implied preference from its smoothed label: the reverse of dpo's.",
    when="When dpo leaves the policy spread over mediocre answers: the reverse divergence seeks the best ones.",
    proof=("loss_by_hand",),
)
def exo(beta: float = 0.1, smoothing: float = 1e-3) -> Recipe:
    return Recipe(Pairs(link("exo-pair", beta, smoothing)))


@method(
    "nca",
    title="Noise Contrastive Alignment",
    aliases=("nca-pair",),
    paper="Noise Contrastive Alignment of Language Models with Explicit Rewards",
    arxiv="2402.05369",
    year=2024,
    differs="Each row is set against the reference by itself, so that the chosen row's probability does not fall.",
    when="When dpo lowers the probability of the chosen answers together with that of the rejected.",
    proof=("loss_by_hand",),
)
def nca(beta: float = 0.1) -> Recipe:
    return Recipe(Pairs(link("nca-pair", beta)))


@method(
    "robust-dpo",
    title="Provably Robust DPO",
    paper="Provably Robust DPO: Aligning Language Models with Noisy Feedback",
    arxiv="2403.00409",
    year=2024,
    differs="dpo whose mean over labels flipped at a known rate is dpo's loss of the true labels.",
    when="When a known share of the comparisons is wrong, as with a noisy judge; `smoothing` is that share.",
    note="Unbounded below: at x beyond all bounds a pair's loss falls with slope -beta e / (1 - 2e).",
    proof=("loss_by_hand", "flipped_labels"),
)
def robust_dpo(beta: float = 0.1, smoothing: float = 0.1) -> Recipe:
    return Recipe(Pairs(link("robust", beta, smoothing)))


@method(
    "bco",
    title="Binary Classifier Optimization",
    paper="Binary Classifier Optimization for Large Language Model Alignment",
    arxiv="2404.04656",
    year=2024,
    differs="Each row is classified by itself as chosen or rejected, its score counted from the running mean score.",
    when="When each answer is good or bad by itself and scores drift: the threshold between them follows.",
    note="TRL 1.16's bco_pair leaves the mean out, which dpo(loss='bco-pair') does too; the decay is ours.",
    proof=("loss_by_hand",),
)
def bco(beta: float = 0.1, decay: float = 0.9) -> Recipe:
    return Recipe(Pairs(Classifier(beta, RunningMean("score_shift", metric="pair_score", decay=decay))))


@method(
    "apo",
    title="Anchored Preference Optimization",
    aliases=("apo-zero",),
    paper="Anchored Preference Optimization and Contrastive Revisions: Addressing Underspecification in Alignment",
    arxiv="2408.06266",
    year=2024,
    differs="The direction of each row's own probability is chosen: chosen up and rejected down, or both down.",
    when="When the chosen answers are better than the policy's usual ones (anchor=zero), or worse (anchor=down).",
    proof=("loss_by_hand",),
)
def apo(beta: float = 0.1, anchor: str = "zero") -> Recipe:
    return Recipe(Pairs(link(f"apo-{anchor}", beta)))


@method(
    "discopop",
    title="Discovered Preference Optimization",
    paper="Discovering Preference Optimization Algorithms with and for Large Language Models",
    arxiv="2406.08414",
    year=2024,
    differs="A blend of logistic and exponential loss, found by a language model's search; it is not convex.",
    when="To reproduce the published loss; it points away from reward at equal scores, so start with dpo.",
    note="At equal scores it falls towards the rejected row: its slope is (1 - log 2) / (4 tau) - 3/4 = +0.784 there, "
    "and dpo's -0.5. A run from the reference moves away from reward at first.",
    proof=("loss_by_hand",),
)
def discopop(beta: float = 0.05) -> Recipe:
    return Recipe(Pairs(link("discopop", beta)))


@method(
    "f-dpo",
    title="DPO under other divergences",
    paper="Beyond Reverse KL: Generalizing Direct Preference Optimization with Diverse Divergence Constraints",
    arxiv="2309.16240",
    year=2023,
    differs="dpo whose score is f'(pi / ref) of the divergence f that keeps the policy near its reference.",
    when="When dpo collapses onto few answers: other divergences keep more of the reference's variety.",
    note="TRL 1.16 fails on the alpha divergence in float64; in float32 the two agree to its rounding.",
    proof=("loss_by_hand",),
)
def f_dpo(beta: float = 0.1, divergence: str = "js", loss: str = "sigmoid") -> Recipe:
    return Recipe(Pairs(link(loss, beta), scored(loss, divergence)))


@method(
    "ld-dpo",
    title="Length-Desensitised DPO",
    paper="Length Desensitization in Direct Preference Optimization",
    arxiv="2409.06411",
    year=2024,
    differs="dpo in which the longer row's tokens beyond the shorter row's length count `tail` times.",
    when="When dpo makes answers longer and not better.",
    proof=("loss_by_hand",),
)
def ld_dpo(beta: float = 0.1, tail: float = 0.5) -> Recipe:
    return Recipe(Pairs(Logistic(beta), LengthDesensitised(tail)))


@method(
    "wpo",
    title="Weighted Preference Optimization",
    paper="WPO: Enhancing RLHF with Weighted Preference Optimization",
    arxiv="2406.11827",
    year=2024,
    differs="dpo with each pair weighted by how likely the present policy is to have drawn its two rows.",
    when="When rows come from an older policy: pairs that the present one would hardly draw count less.",
    proof=("loss_by_hand",),
)
def wpo(beta: float = 0.1, loss: str = "sigmoid") -> Recipe:
    return Recipe(Pairs(link(loss, beta), scored(loss), weight=OnPolicyWeight()))
