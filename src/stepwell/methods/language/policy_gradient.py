"""Methods that train a language model from rewards, each a composition of parts with its card."""

from __future__ import annotations

from math import inf

from stepwell.credit.group import Best, GroupCredit
from stepwell.credit.shaping import DivergencePenalty, Outcome, Overlong
from stepwell.credit.traces import GeneralisedAdvantage, Whitened
from stepwell.credit.turns import Unpaid
from stepwell.methods.language.semantics import semantics_of
from stepwell.objective.policy import Policy
from stepwell.objective.ratio import Ratio
from stepwell.objective.reduction import Mode, Reduction
from stepwell.objective.regularise import Divergence, Regulariser, entropy_bonus
from stepwell.objective.surrogate import Clip, Score
from stepwell.objective.term import Objective, Term
from stepwell.objective.value import ValueLoss
from stepwell.parts import Part
from stepwell.planning.groups import DynamicSampling
from stepwell.ranges import NotNegative
from stepwell.recipe.recipe import Recipe
from stepwell.recipe.registry import method


def penalised(policy: Policy, kl: float, divergence: Divergence, reduction: Mode = "token") -> Term | Objective:
    """A policy term, with a divergence penalty in the loss where its coefficient is not zero."""
    return Objective((policy, Regulariser(divergence, kl, Reduction(reduction)))) if kl else policy


def reward_with(kl: float) -> Part:
    """The outcome, less a divergence penalty where its coefficient is not zero."""
    return Outcome() + DivergencePenalty(kl) if kl else Outcome()


@method(
    "reinforce",
    title="REINFORCE",
    paper="Simple Statistical Gradient-Following Algorithms for Connectionist Reinforcement Learning",
    year=1992,
    differs="The score function with the reward itself: unbiased, and as noisy as it gets.",
    when="For one sample a prompt, and as the unbiased baseline that others are compared with; expect noise.",
    proof=("exact_gradient",),
)
def reinforce(kl: NotNegative = 0.0) -> Recipe:
    credit = GroupCredit("none", reward=reward_with(kl))
    return Recipe(Policy(credit, surrogate=Score(), reduction=Reduction("row-sum")))


@method(
    "rloo",
    title="REINFORCE Leave-One-Out",
    paper="Back to Basics: Revisiting REINFORCE-Style Optimization for Learning from Human Feedback in LLMs",
    arxiv="2402.14740",
    year=2024,
    differs="Each sample's baseline is the mean reward of the others; one clipped ratio a sequence, their product.",
    when="A good first choice with several samples a prompt: no critic, no reference, and no bias on fresh samples.",
    note="TRL's is the paper's. semantics='verl' has token ratios, bounded and always clipped dually, the mean over "
    "tokens, and the reward itself for a prompt with one sample: it is ppo with this credit.",
    proof=("exact_gradient",),
)
def rloo(clip: float = 0.2, kl: NotNegative = 0.0, semantics: str = "paper") -> Recipe:
    library, tokens = semantics_of("rloo", semantics, "paper verl"), semantics == "verl"
    credit = library.credit("leave-one-out", "none", reward_with(kl))
    ratio = library.ratio() if tokens else library.ratio("sequence", "product")
    return Recipe(Policy(credit, ratio, library.clip(clip, clip), reduction=Reduction("token" if tokens else "row")))


@method(
    "grpo",
    title="Group Relative Policy Optimization",
    paper="DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models",
    arxiv="2402.03300",
    year=2024,
    differs="Rewards standardised within the group; token ratios, clipped; the mean of each row's mean.",
    when="The usual choice for rewards that can be verified, and what most other methods are compared with.",
    note="`epsilon` is added to a group's deviation; 0 is the library's own, 1e-4 (verl: 1e-6). semantics='trl' "
    "weights the divergence with the ratio, so that its gradient is the reverse divergence's. semantics='verl' takes "
    "the mean over tokens, clips dually at 3, bounds log-ratios by 20, and gives a lone sample its reward itself.",
    proof=("standardised_gradient", "length_weighted_gradient"),
)
def grpo(clip: float = 0.2, kl: NotNegative = 0.0, epsilon: NotNegative = 0.0, semantics: str = "paper") -> Recipe:
    library = semantics_of("grpo", semantics)
    mode: Mode = "token" if semantics == "verl" else "row"
    credit, ratio = library.credit(epsilon=epsilon), library.ratio()
    policy = Policy(credit, ratio, library.clip(clip, clip), reduction=Reduction(mode))
    return Recipe(penalised(policy, kl, library.divergence(), mode))


@method(
    "dr-grpo",
    title="GRPO Done Right",
    aliases=("dr.grpo",),
    paper="Understanding R1-Zero-Like Training: A Critical Perspective",
    arxiv="2503.20783",
    year=2025,
    differs="grpo without its two biases: no division by the deviation, and a fixed length in place of each row's.",
    when="When wrong answers grow longer under grpo, or prompts that are nearly always or never solved dominate it.",
    proof=("mean_centred_gradient",),
)
def dr_grpo(clip: float = 0.2, length: int = 0) -> Recipe:
    policy = Policy(GroupCredit("mean"), surrogate=Clip(clip, clip), reduction=Reduction("fixed", length or None))
    return Recipe(policy)


@method(
    "dapo",
    title="Decoupled Clip and Dynamic Sampling Policy Optimization",
    paper="DAPO: An Open-Source LLM Reinforcement Learning System at Scale",
    arxiv="2503.14476",
    year=2025,
    differs="grpo with a wider upper clip, the mean over tokens, groups of equals replaced, and long answers punished.",
    when="When many groups are all right or all wrong, entropy falls early, or answers run into the length limit.",
    note="TRL's loss type dapo is the clip and the mean alone: dynamic sampling and punishment are left to its user. "
    "semantics='verl' clips dually at 3 and bounds log-ratios by 20.",
    proof=("standardised_gradient", "refilled_gradient", "overlong_schedule"),
)
def dapo(
    low: float = 0.2, high: float = 0.28, buffer: float = 0.2, refill: float = 4.0, semantics: str = "paper"
) -> Recipe:
    library = semantics_of("dapo", semantics, "paper verl")
    reward = Outcome() + Overlong(buffer=buffer) if buffer else Outcome()
    policy = Policy(library.credit(reward=reward), library.ratio(), library.clip(low, high))
    return Recipe(policy, DynamicSampling(limit=refill))


@method(
    "gspo",
    title="Group Sequence Policy Optimization",
    paper="Group Sequence Policy Optimization",
    arxiv="2507.18071",
    year=2025,
    differs="grpo with one ratio a sequence: the geometric mean of its token ratios, clipped far more tightly.",
    when="For long answers and mixtures of experts, where the ratios of single tokens are too noisy to clip.",
    note="TRL's is the paper's. semantics='verl' gives each token the sequence's ratio with its own gradient, which "
    "is the same where a row's tokens share their advantage and stay below e^10. Its clip is 0.2 unless set.",
    proof=("first_update_of_grpo", "one_token_is_ppo"),
)
def gspo(low: float = 3e-4, high: float = 4e-4, semantics: str = "paper") -> Recipe:
    library, ratio = semantics_of("gspo", semantics, "paper verl"), Ratio("sequence")
    if semantics == "verl":
        ratio = Ratio("sequence_token", bounds=(-inf, 10.0))
    return grpo().replace(credit_of=library.credit(), ratio=ratio, surrogate=Clip(low, high))


@method(
    "cispo",
    title="Clipped Importance Sampling Policy Optimization",
    paper="MiniMax-M1: Scaling Test-Time Compute Efficiently with Lightning Attention",
    arxiv="2506.13585",
    year=2025,
    differs="The ratio is a weight, clipped from above, on the score function: no token loses its gradient.",
    when="When rare tokens that matter lose their gradient to the clip, as with several updates a rollout.",
    note="The cap is TRL's. The paper's is 1 + epsilon; verl's bounds are [0.8, 1.2] unless set, far tighter: "
    "semantics='verl' with maximum=1.2, minimum=0.8. It also bounds log-ratios by 20.",
    proof=("gradient_multiplier", "standardised_gradient"),
)
def cispo(maximum: float = 5.0, minimum: float = 0.0, semantics: str = "paper") -> Recipe:
    library = semantics_of("cispo", semantics, "paper verl")
    return Recipe(Policy(library.credit(), library.ratio(), Score(minimum or None, maximum)))


@method(
    "ppo",
    title="Proximal Policy Optimization",
    paper="Proximal Policy Optimization Algorithms",
    arxiv="1707.06347",
    year=2017,
    differs="A value head's generalised advantages, whitened over tokens, in place of a group's statistics.",
    when="With one sample a prompt, or rewards within a row: a value head gives each token its own credit.",
    note="semantics='verl' clips dually at 3 and bounds log-ratios by 20.",
    proof=("exact_critic_gradient",),
)
def ppo(
    clip: float = 0.2,
    lam: float = 0.95,
    gamma: float = 1.0,
    kl: NotNegative = 0.0,
    value_coefficient: float = 0.1,
    value_clip: float = 0.2,
    entropy: float = 0.0,
    epochs: int = 2,
    minibatches: int = 2,
    semantics: str = "paper",
) -> Recipe:
    library, estimator = semantics_of("ppo", semantics, "paper verl"), GeneralisedAdvantage(gamma, lam, kl, Unpaid())
    policy = Policy(Whitened(estimator), library.ratio(), library.clip(clip, clip))
    objective = policy + ValueLoss(estimator, value_clip, coefficient=value_coefficient)
    objective = objective + entropy_bonus(entropy) if entropy else objective
    return Recipe(objective, epochs=epochs, minibatches=minibatches)


@method(
    "raft",
    title="Reward-Ranked Fine-Tuning",
    paper="RAFT: Reward rAnked FineTuning for Generative Foundation Model Alignment",
    arxiv="2304.06767",
    year=2023,
    differs="Imitate the best sample of each group; `keep` may be top, above-mean or positive.",
    when="A simple and stable start: supervised learning on the best samples, with no ratio, clip or reference.",
    note="keep='positive', skip_equal=False imitates every rewarded row, as RFT, ReST-EM and, apart from its hints, "
    "STaR do.",
    proof=("best_of_group_gradient",),
)
def raft(keep: str = "top", skip_equal: bool = True) -> Recipe:
    credit = Best(keep, skip_equal=skip_equal)  # type: ignore[arg-type]
    return Recipe(Policy(credit, surrogate=Score(), reduction=Reduction("row-sum")))
