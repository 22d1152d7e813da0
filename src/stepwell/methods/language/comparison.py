"""Methods that learn from comparisons otherwise than dpo: without a reference, row by row, by tokens, in rounds."""

from __future__ import annotations

from typing import Literal

from stepwell.methods.language.preference import scored, with_likelihood
from stepwell.objective.preference.links import OddsRatio, link
from stepwell.objective.preference.pairs import Logistic, Pairing, Pairs, SequenceScore
from stepwell.objective.preference.scores import ImplicitReward, Parting, TokenGuided
from stepwell.objective.preference.step_pairs import StepPairs
from stepwell.objective.preference.unpaired import Prospect, RejectionPairs
from stepwell.planning.groups import Groups
from stepwell.planning.measured import Vines
from stepwell.ranges import NotNegative
from stepwell.recipe.recipe import Recipe
from stepwell.recipe.registry import method

AVERAGE = SequenceScore(mean=True, against="none")
"""The mean log-probability of a row's steps: the score of methods without a reference."""


@method(
    "kto",
    title="Kahneman-Tversky Optimization",
    paper="KTO: Model Alignment as Prospect Theoretic Optimization",
    arxiv="2402.01306",
    year=2024,
    differs="Rows judged one by one, good or bad, against a reference point: the divergence from the reference.",
    when="When answers are judged good or bad one by one, with no pairs, and perhaps many more of one kind.",
    note="The reference point is the mean score of the rows, which are the policy's own: exactly the divergence in "
    "expectation. TRL estimates it on mismatched prompts and answers, as its rows are not.",
    proof=("loss_by_hand", "reference_point"),
)
def kto(beta: float = 0.1, desirable: float = 1.0, undesirable: float = 1.0, threshold: float = 0.5) -> Recipe:
    return Recipe(Prospect(beta, desirable, undesirable, threshold))


@method(
    "simpo",
    title="Simple Preference Optimization",
    paper="SimPO: Simple Preference Optimization with a Reference-Free Reward",
    arxiv="2405.14734",
    year=2024,
    differs="dpo on mean log-probabilities, without a reference, and with a margin to reach.",
    when="When there is no memory for a reference, and scores should not grow with length.",
    note="Defaults are the authors' for Llama-3-8B-Instruct (gamma / beta = 0.55); TRL's are beta 0.1, gamma 0.5.",
    proof=("loss_by_hand",),
)
def simpo(beta: float = 2.5, gamma: float = 1.375, smoothing: float = 0.0) -> Recipe:
    return Recipe(Pairs(Logistic(beta, smoothing, gamma), AVERAGE))


@method(
    "alphapo",
    title="AlphaPO",
    paper="AlphaPO: Reward Shape Matters for LLM Alignment",
    arxiv="2501.03884",
    year=2025,
    differs="simpo whose reward is (1 - p^-alpha) / alpha of the mean probability p; alpha to 0 is simpo.",
    when="When simpo lowers the likelihood of chosen and rejected rows alike; `alpha` bends its reward.",
    note="The formula is TRL's; the defaults are simpo's and ours.",
    proof=("loss_by_hand",),
)
def alphapo(beta: float = 2.5, gamma: float = 1.375, alpha: float = 0.25) -> Recipe:
    return Recipe(Pairs(Logistic(beta, margin=gamma), ImplicitReward(AVERAGE, "alpha", 1 - alpha)))


@method(
    "cpo",
    title="Contrastive Preference Optimization",
    paper="Contrastive Preference Optimization: Pushing the Boundaries of LLM Performance in Machine Translation",
    arxiv="2401.08417",
    year=2024,
    differs="dpo with a uniform reference, and so without one, plus the likelihood of the chosen rows.",
    when="When there is no memory for a reference and the chosen answers are good enough to imitate.",
    proof=("loss_by_hand",),
)
def cpo(beta: float = 0.1, likelihood: NotNegative = 1.0, smoothing: float = 0.0) -> Recipe:
    return Recipe(with_likelihood(Pairs(Logistic(beta, smoothing), SequenceScore(against="none")), likelihood))


@method(
    "orpo",
    title="Odds Ratio Preference Optimization",
    paper="ORPO: Monolithic Preference Optimization without Reference Model",
    arxiv="2403.07691",
    year=2024,
    differs="Imitate the chosen rows, with a small penalty on the odds of the rejected against theirs.",
    when="To imitate the best answers and move away from the worst in one stage, without a reference.",
    note="The likelihood is of the answer; TRL's is of prompt and answer. TRL computes the odds in float32.",
    proof=("loss_by_hand",),
)
def orpo(odds: NotNegative = 0.1) -> Recipe:
    return Recipe(with_likelihood(Pairs(OddsRatio(), AVERAGE, coefficient=odds), 1.0))


@method(
    "rso",
    title="Statistical Rejection Sampling Optimization",
    paper="Statistical Rejection Sampling Improves Preference Optimization",
    arxiv="2309.06657",
    year=2023,
    catalogue=25,
    differs="Pairs among those rows of a group that rejection sampling accepts, as if drawn from the optimal policy.",
    when="When pairs should look as if drawn from the optimal policy, and many samples a prompt are cheap.",
    note="The largest reward is the group's and not that of all answers, so the accepted rows are tilted less.",
    proof=("rejection_law", "loss_by_hand"),
)
def rso(beta: float = 0.5, accept: int = 4, loss: str = "hinge") -> Recipe:
    return Recipe(RejectionPairs(link(loss, beta), scored(loss), temperature=beta, keep=accept), Groups(size=16))


@method(
    "online-dpo",
    title="Online DPO",
    aliases=("oaif",),
    paper="Direct Language Model Alignment from Online AI Feedback",
    arxiv="2402.04792",
    year=2024,
    differs="dpo on two fresh samples a prompt, the better one chosen, against the starting policy.",
    when="When two samples a prompt are all that a judge can compare; the plainest online form of dpo.",
    note="With loss='ipo' the score is the sum, as in TRL's online trainer; its DPO trainer takes the mean.",
    proof=("preference_fixed_point", "loss_by_hand"),
)
def online_dpo(beta: float = 0.1, loss: str = "sigmoid") -> Recipe:
    return Recipe(Pairs(link(loss, beta)), Groups(prompts=32, size=2))


@method(
    "iterative-dpo",
    title="Iterative DPO",
    paper="Iterative Preference Learning from Human Feedback: Bridging Theory and Practice for RLHF under "
    "KL-Constraint",
    arxiv="2312.11456",
    year=2023,
    catalogue=68,
    differs="dpo in rounds: the best against the worst of each group, several passes over it, then fresh samples.",
    when="When rollouts are expensive: several passes over each before new samples, where dpo makes one.",
    note="The paper keeps the starting policy as reference; reference='synced' moves it to the policy every round. "
    "Its ladder of rejection samplers is not here. Passes and minibatches are ours.",
    proof=("preference_fixed_point", "loss_by_hand"),
)
def iterative_dpo(
    beta: float = 0.1, epochs: int = 2, minibatches: int = 4, reference: Literal["start", "synced"] = "start"
) -> Recipe:
    return Recipe(Pairs(Logistic(beta)), epochs=epochs, minibatches=minibatches, reference=reference)


@method(
    "pre-dpo",
    title="Pre-DPO",
    paper="Pre-DPO: Improving Data Utilization in Direct Preference Optimization Using a Guiding Reference Model",
    arxiv="2504.15843",
    year=2025,
    catalogue=185,
    differs="dpo from the start again, with an already optimised policy, the `teacher`, as its reference.",
    when="After a finished run of dpo or simpo: train once more from the start, guided by its result.",
    proof=("loss_by_hand", "guiding_weight"),
)
def pre_dpo(beta: float = 0.1, pairs: str = "extremes") -> Recipe:
    return Recipe(Pairs(Logistic(beta), SequenceScore(against="teacher"), Pairing(pairs)))  # type: ignore[arg-type]


@method(
    "step-dpo",
    title="Step-DPO",
    paper="Step-DPO: Step-wise Preference Optimization for Long-chain Reasoning of LLMs",
    arxiv="2406.18629",
    year=2024,
    catalogue=392,
    differs="dpo on the one step in which the two rows of a pair part; what they share before it trains nothing.",
    when="For long reasoning whose rows share a beginning: only the step in which they part is trained.",
    note="The paper finds a wrong step and resamples it; here a group's rows are compared, whichever step they part "
    "in, and judged by their outcome.",
    proof=("loss_by_hand",),
)
def step_dpo(beta: float = 0.4, pairs: str = "all") -> Recipe:
    return Recipe(Pairs(Logistic(beta), Parting(), Pairing(pairs)))  # type: ignore[arg-type]


@method(
    "full-step-dpo",
    title="Full-Step-DPO",
    paper="Full-Step-DPO: Self-Supervised Preference Optimization with Step-wise Rewards for Mathematical Reasoning",
    arxiv="2502.14356",
    year=2025,
    catalogue=170,
    differs="dpo in which each step weighs by its reward: the best steps of the chosen row, the worst of the rejected.",
    when="For long reasoning, when there is time to measure each step's reward by drawing rows after it.",
    note="Formula and defaults are those of the authors' code, but for its softmax times n and sum over n, which "
    "cancel. It masks tokens whose step's reward is exactly 0; here those are masked that are not trained. There each "
    "prompt's pairs are averaged first; here all pairs count alike. In place of a process reward model, rows drawn "
    "after each step measure its reward; steps have a number of tokens. At rate = temperature = 0 the slope of a row "
    "of n tokens is dpo's of all pairs over 2 beta n.",
    proof=("loss_by_hand", "even_steps_are_dpo", "measured_step_values"),
)
def full_step_dpo(
    beta: float = 0.05, temperature: float = 0.5, rate: float = 1.0, segment: int = 32, vines: int = 4
) -> Recipe:
    pairs = StepPairs(beta=beta, temperature=temperature, rate=rate)
    return Recipe(pairs, Vines(segment=segment, vines=vines))


@method(
    "tgdpo",
    title="Token-Guided DPO",
    paper="TGDPO: Harnessing Token-Level Reward Guidance for Enhancing Direct Preference Optimization",
    arxiv="2506.14574",
    year=2025,
    catalogue=331,
    differs="dpo with tokens weighted by the implicit reward of an earlier DPO model, the `teacher`.",
    when="When an earlier dpo model is at hand: its implicit rewards say which tokens matter.",
    note="Weights are not clamped and may be negative, as in the authors' code.",
    proof=("loss_by_hand",),
)
def tgdpo(beta: float = 0.1, alpha: float = 0.5) -> Recipe:
    return Recipe(Pairs(Logistic(beta), TokenGuided(alpha, beta)))
