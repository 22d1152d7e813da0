"""Methods for language models that differ in their credit: the baseline of a sample, and the reward that counts."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from stepwell.credit.baseline import GreedyBaseline, Informative, LengthBaseline, TokenBaseline
from stepwell.credit.columns import AcrossPrompts, LengthClass, RewardColumn, Stratified
from stepwell.credit.contest import WinnerTakesAll, WinRate
from stepwell.credit.entropy import EntropyModulated
from stepwell.credit.group import GroupCredit
from stepwell.credit.risk import MixedRisk
from stepwell.credit.shaping import Outcome
from stepwell.credit.traces import Coverage, RewardToGo, Whitened
from stepwell.methods.language.policy_gradient import penalised, reward_with
from stepwell.objective.constraint import Priced, Watch
from stepwell.objective.gates.selection import Agreement
from stepwell.objective.policy import Policy
from stepwell.objective.reduction import Reduction
from stepwell.objective.regularise import Divergence
from stepwell.objective.state import Multiplier
from stepwell.objective.surrogate import Clip, Score
from stepwell.parts import Part
from stepwell.planning.measured import WithGreedy
from stepwell.ranges import NotNegative
from stepwell.recipe.recipe import Recipe
from stepwell.recipe.registry import method


def score(credit: Part) -> Policy:
    """The score function with a credit, the mean over rows of each row's sum: exact where the credit is unbiased."""
    return Policy(credit, surrogate=Score(), reduction=Reduction("row-sum"))


@method(
    "reinforce++",
    title="REINFORCE++",
    aliases=("rf++", "reinforce-plus-plus"),
    paper="REINFORCE++: A Simple and Efficient Approach for Aligning Large Language Models",
    arxiv="2501.03262",
    year=2025,
    differs="No groups: rewards to go, with the divergence penalty inside, whitened over all tokens of the batch.",
    when="With one or few samples a prompt and no critic: the baseline is that of the whole batch.",
    note="Whitening is over tokens, so that long answers weigh more in the mean and the deviation.",
    proof=("penalised_sequence_gradient", "whitened_over_tokens"),
)
def reinforce_plus_plus(clip: float = 0.2, kl: NotNegative = 0.0) -> Recipe:
    return Recipe(Policy(Whitened(RewardToGo(kl=kl)), surrogate=Clip(clip, clip)))


@method(
    "reinforce++-baseline",
    title="REINFORCE++ with a group baseline",
    aliases=("rf++-baseline", "reinforce-plus-plus-baseline"),
    paper="REINFORCE++: A Simple and Efficient Approach for Aligning Large Language Models",
    arxiv="2501.03262",
    year=2025,
    differs="reinforce++ on rewards less their group's mean; the divergence penalty is a k2 term of the loss.",
    when="With several samples a prompt, when the deviation of a small group is too noisy to divide by.",
    note="Whitening is over tokens, so that long answers weigh more in the mean and the deviation. A prompt with one "
    "sample keeps its reward, as in verl.",
    proof=("whitened_over_tokens",),
)
def reinforce_plus_plus_baseline(clip: float = 0.2, kl: NotNegative = 0.0) -> Recipe:
    policy = Policy(Whitened(GroupCredit("mean", singleton="reward")), surrogate=Clip(clip, clip))
    return Recipe(penalised(policy, kl, Divergence("k2")))


@method(
    "remax",
    title="ReMax",
    paper="ReMax: A Simple, Effective, and Efficient Reinforcement Learning Method for Aligning Large Language Models",
    arxiv="2310.10505",
    year=2023,
    differs="REINFORCE less the reward of the greedy answer to the prompt, which is drawn beside the samples.",
    when="When one more greedy answer is cheaper than a group of samples: its reward is the baseline.",
    proof=("greedy_baseline_gradient",),
)
def remax(kl: NotNegative = 0.0) -> Recipe:
    return Recipe(score(GreedyBaseline(reward_with(kl))), WithGreedy())


@method(
    "opo",
    title="On-Policy Optimization with an Optimal Baseline",
    paper="On-Policy RL with Optimal Reward Baseline",
    arxiv="2505.23585",
    year=2025,
    differs="REINFORCE less a mean of the group's rewards that weighs them by length.",
    when="On fresh samples of uneven length: a baseline with less variance than the group's mean.",
    note="Published: the mean holds the sample itself, and the expected gradient is off by 54 % for two samples and "
    "37 % for three, on strings of one to three symbols.",
    proof=("unbiased_gradient", "length_baseline_by_hand"),
)
def opo(kl: NotNegative = 0.0, variant: Literal["corrected", "published"] = "corrected") -> Recipe:
    return Recipe(score(LengthBaseline(variant == "corrected", reward=reward_with(kl))))


@method(
    "otb",
    title="Optimal Token Baseline",
    aliases=("optimal-token-baseline",),
    paper="The Optimal Token Baseline: Variance Reduction for Long-Horizon LLM-RL",
    year=2026,
    differs="opo token by token: rewards to go weigh by the squared norm of the score so far, in the logits.",
    when="For long rows, where the variance grows with length: each token has the baseline of least variance.",
    note="Published: the mean holds the row itself, and the expected gradient is off by 59 % for two samples and 41 % "
    "for three, on strings of one to three symbols.",
    proof=("unbiased_gradient", "least_variance_by_token"),
)
def otb(kl: NotNegative = 0.0, variant: Literal["corrected", "published"] = "corrected") -> Recipe:
    return Recipe(score(TokenBaseline(variant == "corrected", reward=reward_with(kl))))


@method(
    "gpg",
    title="Group Policy Gradient",
    paper="GPG: A Simple and Strong Reinforcement Learning Baseline for Model Reasoning",
    arxiv="2504.02546",
    year=2025,
    differs="The score function with mean-centred rewards, times all rows over those of groups that teach something.",
    when="For a policy gradient without clip, critic or reference, where many groups are all right or all wrong.",
    note="`nonzero` counts rows with a reward other than 0 in their place, as verl does: in a batch of one mixed "
    "group of two and four of equal rewards, two right and two wrong, the gradient is then 0.4 times what it is.",
    proof=("equal_groups_change_nothing", "informative_gradient"),
)
def gpg(nonzero: bool = False) -> Recipe:
    return Recipe(Policy(GroupCredit("mean") * Informative(nonzero), surrogate=Score()))


@method(
    "maxrl",
    title="Maximum Likelihood Reinforcement Learning",
    paper="Maximum Likelihood Reinforcement Learning",
    arxiv="2602.02710",
    year=2026,
    differs="Mean-centred rewards over the group's mean: the log-likelihood of success to order G - 1.",
    when="For pass-or-fail rewards: rarely solved prompts count more, as the log-likelihood of success has it.",
    proof=("truncated_likelihood_gradient",),
)
def maxrl(epsilon: float = 1e-6) -> Recipe:
    return Recipe(score(GroupCredit("mean", "mean", epsilon=epsilon)))


@method(
    "poppy",
    title="Poppy, on one policy: max@G",
    aliases=("max@g", "max@k"),
    paper="Winner Takes It All: Training Performant RL Populations for Combinatorial Optimization",
    arxiv="2210.03475",
    year=2022,
    catalogue=219,
    differs="The best of a group earns what it is better by than the second, the others nothing: E[max of G] rises.",
    when="When the best of several answers counts and not their mean, as for pass@k.",
    note="The paper's policies are several; here they are the samples of one. verl's pass@k divides by the group's "
    "deviation and leaves the factor G out.",
    proof=("largest_of_group_gradient",),
)
def poppy(kl: NotNegative = 0.0) -> Recipe:
    return Recipe(score(WinnerTakesAll(reward_with(kl))))


@method(
    "stratified-grpo",
    title="Stratified GRPO",
    paper="Stratified GRPO: Handling Structural Heterogeneity in Reinforcement Learning of LLM Search Agents",
    arxiv="2510.06214",
    year=2025,
    catalogue=357,
    differs="grpo's credit blended with that among answers of the same structure.",
    when="For agents whose answers differ in structure, such as the number of searches, and so in reward.",
    note="`column` is the number (from 0) of the reward function, of weight 0, that says an answer's structure, such "
    "as its searches; 0 takes the power of two of its length. The paper's alpha could not be established; 1/2 is "
    "even-handed. At alpha = 1 choices between structures have no gradient, as an oracle shows.",
    proof=("stratified_by_hand", "strata_hide_choices"),
)
def stratified_grpo(alpha: float = 0.5, column: int = 0, clip: float = 0.2) -> Recipe:
    credit = Stratified(RewardColumn(column) if column else LengthClass(), alpha)
    return Recipe(Policy(credit, surrogate=Clip(clip, clip)))


@method(
    "riskpo",
    title="RiskPO",
    paper="RiskPO: Risk-based Policy Optimization via Verifiable Reward for LLM Post-Training",
    arxiv="2510.00911",
    year=2025,
    catalogue=281,
    differs="grpo's clip on the credit of a mixed value at risk: the least count most, the `top` share nothing.",
    when="When the mean hides failures: the lowest rewards count most, and the highest not at all.",
    note="Quantiles are the batch's; the authors' code can also track them. Their deviation divides, as there.",
    proof=("risk_gradient", "bundles_by_hand"),
)
def riskpo(low: float = 0.1, top: float = 0.1, emphasis: float = 1.5, bundle: int = 1, clip: float = 0.2) -> Recipe:
    return Recipe(Policy(MixedRisk(low, 1 - top, emphasis, bundle), surrogate=Clip(clip, clip)))


@method(
    "copo",
    title="Consistency-Aware Policy Optimization",
    paper="COPO: Consistency-Aware Policy Optimization",
    arxiv="2508.04138",
    year=2025,
    catalogue=291,
    differs="grpo's loss blended with one that compares prompts, the more of it the more a prompt's answers agree.",
    when="When most groups are all right or all wrong: prompts are then compared with one another.",
    note="`column` is the number (from 0) of the reward function, of weight 0, that names an answer; 0 takes the "
    "reward. The factor 1 - lambda H on a prompt's reward is left out, as its lambda could not be established.",
    proof=("agreement_by_hand",),
)
def copo(
    slope: float = 1.0, centre: float = 0.5, forced: bool = True, column: int = 0, clip: float = 0.2, dual: float = 3.0
) -> Recipe:
    gate = Agreement(RewardColumn(column) if column else Outcome(), slope, centre, forced)
    local = Policy(GroupCredit("mean", "std"), surrogate=Clip(clip, clip, dual), gates=(gate,))
    return Recipe(local + replace(local, credit_of=AcrossPrompts(), gates=(replace(gate, rest=True),)))


@method(
    "constrained-rlhf",
    title="Constrained RLHF (mu-PPO without critics)",
    paper="Confronting Reward Model Overoptimization with Constrained RLHF",
    arxiv="2310.04373",
    year=2023,
    catalogue=268,
    differs="grpo's first reward, plus the second at a price that rises while its mean is below `threshold`.",
    when="With two rewards: one to raise, and one to keep above a threshold.",
    note="Two reward functions are needed. The paper has a value head for each, and bounds its prices by a sigmoid; "
    "here groups give each its credit, and prices are projected to [0, `ceiling`].",
    proof=("priced_credit", "price_finds_the_optimum"),
)
def constrained_rlhf(
    threshold: float = 0.5, price: float = 0.0, rate: float = 0.01, ceiling: float = 10.0, clip: float = 0.2
) -> Recipe:
    mu = Multiplier("price", price, "constraint", threshold, rate, ceiling)
    each = [GroupCredit("mean", "std", reward=RewardColumn(number)) for number in (0, 1)]
    policy = Policy(each[0] + Priced(each[1], mu), surrogate=Clip(clip, clip))
    return Recipe(policy + Watch(RewardColumn(1), "constraint"))


@method(
    "spo-self-play",
    title="Self-Play Preference Optimization",
    paper="A Minimaximalist Approach to Reinforcement Learning from Human Feedback",
    arxiv="2401.04056",
    year=2024,
    catalogue=270,
    differs="A sample earns the share of its group that it beats: the policy plays against itself.",
    when="When only the order of a group's rewards means something, and not their size.",
    note="The larger reward wins; with a `temperature`, as often as a Bradley-Terry model has it.",
    proof=("self_play_gradient",),
)
def spo_self_play(temperature: float = 0.0, clip: float = 0.2) -> Recipe:
    return Recipe(Policy(WinRate(temperature), surrogate=Clip(clip, clip), reduction=Reduction("row-sum")))


@method(
    "subpo",
    title="Submodular Policy Optimization",
    paper="Submodular Reinforcement Learning",
    arxiv="2307.13372",
    year=2023,
    catalogue=277,
    differs="REINFORCE with rewards to go of marginal gains: `gain` for each token that an answer has not had yet.",
    when="When repeating is worth nothing: rewards with diminishing returns within an answer.",
    note="The submodular function is the number of different tokens, beside the outcome; any other is a part.",
    proof=("submodular_gradient",),
)
def subpo(gain: float = 0.1) -> Recipe:
    return Recipe(score(RewardToGo(gain=Coverage(gain))))


@method(
    "empg",
    title="Entropy-Modulated Policy Gradients",
    paper="Harnessing Uncertainty: Entropy-Modulated Policy Gradients for Long-Horizon LLM Agents",
    arxiv="2509.09265",
    year=2025,
    catalogue=327,
    differs="grpo whose credit grows with how sure a turn was, plus a bonus for turns that lead to a sure one.",
    when="For agents with many turns and one reward at the end: turns taken with confidence learn more.",
    note="Turns are sentences where the process knows of none. k = k_future = 1 and zeta = 0.1 are those of the "
    "pseudo-code on the authors' page; ARLArena's zeta is 0.05, and the paper's own table could not be read. At k = "
    "zeta = 0 it is grpo's credit less its mean over turns, which is 0 where all rows have as many turns.",
    proof=("entropy_by_hand", "gains_average_to_one", "unmodulated_is_grpo", "larger_scores_are_damped"),
)
def empg(k: float = 1.0, k_future: float = 1.0, zeta: float = 0.1, clip: float = 0.2) -> Recipe:
    credit = EntropyModulated(GroupCredit("mean", "std"), k, k_future, zeta)
    return Recipe(Policy(credit, surrogate=Clip(clip, clip), reduction=Reduction("row")))
