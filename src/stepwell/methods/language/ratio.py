"""Methods that differ in the ratio of a step, its clip, and the mean over steps."""

from __future__ import annotations

from stepwell.credit.group import GroupCredit
from stepwell.methods.language.policy_gradient import grpo, penalised, ppo
from stepwell.methods.language.semantics import semantics_of
from stepwell.objective.policy import Policy
from stepwell.objective.ratio import LogBound, LogClip, Ratio
from stepwell.objective.reduction import Reduction
from stepwell.objective.surrogate import Clip, Drift, GammaScore, Plain, Taper
from stepwell.recipe.recipe import Recipe
from stepwell.recipe.registry import method

STANDARD = GroupCredit("mean", "std")
"""Rewards standardised within the group, as grpo's."""


@method(
    "bnpo",
    title="GRPO by the token, TRL's loss type bnpo",
    paper="TRL: Transformer Reinforcement Learning (loss_type='bnpo')",
    year=2025,
    differs="grpo with the mean over all trained tokens of the update in place of the mean of each row's mean.",
    when="When long answers should count by their tokens and nothing else of grpo should change.",
    note="TRL takes the token mean of each micro-batch and then the mean of those, so that its gradient depends on "
    "how the rows are cut: with micro-batches of two rows, of 1 to 5 tokens each, it is 34 % of its norm away on "
    "average, and with one row each it is grpo. Ours is the same however it is cut. semantics='trl' weights the "
    "divergence with the ratio.",
    proof=("standardised_gradient", "stated_slopes"),
)
def bnpo(clip: float = 0.2, kl: float = 0.0, semantics: str = "paper") -> Recipe:
    divergence = semantics_of("bnpo", semantics, "paper trl").divergence()
    return Recipe(penalised(Policy(STANDARD, surrogate=Clip(clip, clip)), kl, divergence))


@method(
    "dual-clip",
    title="Dual-clip PPO with group credit",
    aliases=("dual-clip-ppo",),
    paper="Mastering Complex Control in MOBA Games with Deep Reinforcement Learning",
    arxiv="1912.09729",
    year=2019,
    differs="grpo whose loss is bounded by c |A| where A < 0: steps that grew c times likelier teach nothing more.",
    when="With several updates a rollout, when bad rows that became likely blow up the loss.",
    proof=("leave_one_out_gradient", "stated_slopes"),
)
def dual_clip(clip: float = 0.2, c: float = 3.0) -> Recipe:
    return grpo().replace(surrogate=Clip(clip, clip, dual=c))


@method(
    "two-sided-clip",
    title="Two-sided clipping of GRPO",
    paper="INTELLECT-2: A Reasoning Model Trained Through Globally Decentralized Reinforcement Learning",
    arxiv="2505.07291",
    year=2025,
    differs="grpo whose unclipped ratio is capped too, at delta: what bounds the loss where A < 0.",
    when="With stale or asynchronous rollouts, when a few ratios become huge where A < 0.",
    proof=("leave_one_out_gradient", "stated_slopes"),
)
def two_sided_clip(clip: float = 0.2, delta: float = 4.0) -> Recipe:
    return grpo().replace(surrogate=Clip(clip, clip, delta=delta))


@method(
    "gmpo",
    title="Geometric-Mean Policy Optimization",
    aliases=("geo-mean",),
    paper="Geometric-Mean Policy Optimization",
    arxiv="2507.20673",
    year=2025,
    differs="gspo's ratio, of which each token is clipped by itself, in log space, before the mean is taken.",
    when="When a few outlying tokens dominate grpo's update.",
    proof=("leave_one_out_gradient", "stated_slopes"),
)
def gmpo(low: float = 0.4, high: float = 0.4) -> Recipe:
    return grpo().replace(ratio=Ratio("sequence", hook=LogClip(low, high)), surrogate=Plain())


@method(
    "luspo",
    title="Length-Unbiased Sequence Policy Optimization",
    paper="Length-Unbiased Sequence Policy Optimization: Revealing and Controlling Response Length Variation in RLVR",
    arxiv="2602.05261",
    year=2026,
    differs="gspo with each row's loss multiplied by its length: long rows no longer count less.",
    when="When gspo is right and long answers are wanted, which its mean over tokens counts less.",
    proof=("leave_one_out_gradient", "stated_slopes"),
)
def luspo(low: float = 3e-4, high: float = 4e-4) -> Recipe:
    return grpo().replace(ratio=Ratio("sequence"), surrogate=Clip(low, high), reduction=Reduction("row-sum"))


@method(
    "sspo",
    title="Sentence-level ratio of SSPO",
    paper="SSPO: Subsentence-level Policy Optimization",
    arxiv="2511.04256",
    year=2025,
    catalogue=34,
    differs="grpo with one ratio a sentence, the geometric mean of its tokens': between grpo and gspo.",
    when="When the ratio of a token is too noisy and that of a whole row too coarse.",
    note="The paper also moves the clip's bounds with the entropy of the sentence; that schedule is not in here. "
    "Sentences end at tokens whose text ends with one of . ! ? ; or a line break.",
    proof=("leave_one_out_gradient", "stated_slopes", "segment_limits"),
)
def sspo(low: float = 0.2, high: float = 0.2) -> Recipe:
    return grpo().replace(ratio=Ratio("segment"), surrogate=Clip(low, high))


@method(
    "turn-ppo",
    title="PPO with a ratio for each turn",
    paper="ST-PPO: Stabilized Off-Policy Proximal Policy Optimization for Multi-Turn Agents Training",
    arxiv="2511.20718",
    year=2025,
    catalogue=3,
    differs="ppo with one ratio a turn, shared by its tokens; turns are runs of tokens that are the policy's own.",
    when="For agents that act in turns, when token ratios are too noisy and there is memory for a value head.",
    note="The ratio of a turn is the geometric mean of its tokens', or with `product` their product. The paper's "
    "S-PPO and ST-PPO, which also normalise the gradient by what the clip takes from it, are not in here.",
    proof=("stated_slopes", "segment_limits"),
)
def turn_ppo(
    clip: float = 0.2,
    product: bool = False,
    lam: float = 0.95,
    gamma: float = 1.0,
    epochs: int = 2,
    minibatches: int = 2,
) -> Recipe:
    recipe = ppo(clip, lam, gamma, epochs=epochs, minibatches=minibatches)
    return recipe.replace(ratio=Ratio("turn", "product" if product else "geometric"))


@method(
    "discovered-po",
    title="Discovered Policy Optimisation",
    paper="Discovered Policy Optimisation",
    arxiv="2210.05639",
    year=2022,
    catalogue=220,
    differs="ppo whose clip is a drift found by meta-learning: smooth where A > 0, and turning back where A < 0.",
    when="To try a smooth objective found by meta-learning in place of ppo's clip.",
    proof=("stated_slopes",),
)
def discovered_po(
    a: float = 2.0, b: float = 0.6, lam: float = 0.95, gamma: float = 1.0, epochs: int = 2, minibatches: int = 2
) -> Recipe:
    return ppo(lam=lam, gamma=gamma, epochs=epochs, minibatches=minibatches).replace(surrogate=Drift(a, b))


@method(
    "sapo",
    title="Soft Adaptive Policy Optimization",
    paper="Soft Adaptive Policy Optimization",
    arxiv="2511.20347",
    year=2025,
    differs="grpo with a sigmoid in place of the clip, steeper where A < 0: the gradient fades and never stops.",
    when="When the hard clip makes training unstable or wastes samples: gradients fade instead of stopping.",
    proof=("leave_one_out_gradient", "stated_slopes"),
)
def sapo(positive: float = 1.0, negative: float = 1.05) -> Recipe:
    return grpo().replace(surrogate=Taper(positive, negative))


@method(
    "vespo",
    title="Variational Sequence-Level Soft Policy Optimization",
    paper="VESPO: Variational Sequence-Level Soft Policy Optimization for Stable Off-Policy LLM Training",
    arxiv="2602.10693",
    year=2026,
    differs="The score function, weighted by a smooth bump of the whole sequence's ratio, its product.",
    when="For stale or asynchronous rollouts, when the ratio of a whole sequence needs a smooth bound.",
    note="semantics='trl' also bounds each token's log-ratio by 20. Where the sampler is not the policy TRL "
    "multiplies its ratio into the sequence's, which trl-grpo does too.",
    proof=("leave_one_out_gradient", "stated_slopes"),
)
def vespo(
    positive_shape: float = 2.0,
    positive_rate: float = 3.0,
    negative_shape: float = 3.0,
    negative_rate: float = 2.0,
    semantics: str = "paper",
) -> Recipe:
    semantics_of("vespo", semantics, "paper trl")
    surrogate = GammaScore((positive_shape, positive_rate), (negative_shape, negative_rate))
    ratio = Ratio("sequence", "product", hook=LogBound() if semantics == "trl" else None)
    return Recipe(Policy(STANDARD, ratio, surrogate))
