"""Methods that differ in the ratio, its clip, and the steps that train: off-policy rules for language models."""

from __future__ import annotations

from stepwell.credit.group import GroupCredit
from stepwell.credit.shaping import Outcome
from stepwell.credit.sources import AgainstOwn
from stepwell.methods.language.policy_gradient import grpo, penalised, ppo
from stepwell.methods.language.semantics import semantics_of
from stepwell.objective.gates.minibatch import DropCovariance, EntropyChange, HiddenReward, SecondMoment, TopCovariance
from stepwell.objective.gates.step import (
    HighEntropy,
    OffPolicyRows,
    OneSide,
    ProbabilityShift,
    Ring,
    SamplerCorrection,
    Sources,
    SuccessRate,
    TwoSide,
)
from stepwell.objective.policy import Policy
from stepwell.objective.ratio import LogBound, LogClip, Mixture, PerSource, Ratio
from stepwell.objective.reduction import PerPrompt, Reduction
from stepwell.objective.regularise import Divergence, Regulariser
from stepwell.objective.surrogate import (
    BySource,
    Clip,
    Drift,
    Focused,
    GammaScore,
    Plain,
    Score,
    Shaped,
    SignedScore,
    Taper,
)
from stepwell.parts import Constant, NotNegative
from stepwell.planning.demonstrations import Demonstrated
from stepwell.planning.groups import DynamicSampling
from stepwell.recipe.recipe import Recipe
from stepwell.recipe.registry import method

STANDARD = GroupCredit("mean", "std")


@method(
    "bnpo",
    title="GRPO by the token, TRL's loss type bnpo",
    paper="TRL: Transformer Reinforcement Learning (loss_type='bnpo')",
    year=2025,
    differs="grpo with the mean over all trained tokens of the update in place of the mean of each row's mean.",
    note="TRL takes the token mean of each micro-batch and then the mean of those, so that its gradient depends on how "
    "the rows are cut: with micro-batches of two rows, of 1 to 5 tokens each, it is 34 % of its norm away on average, "
    "and with one row each it is grpo. Ours is the same however it is cut. semantics='trl' weights the divergence with "
    "the ratio.",
    proof=("standardised_gradient", "stated_slopes"),
)
def bnpo(clip: float = 0.2, kl: float = 0.0, semantics: str = "paper") -> Recipe:
    divergence = semantics_of("bnpo", semantics, "paper trl").divergence()
    return Recipe(penalised(Policy(STANDARD, surrogate=Clip(clip, clip)), kl, divergence))


@method(
    "dual-clip",
    title="Dual-clip PPO with group credit",
    paper="Mastering Complex Control in MOBA Games with Deep Reinforcement Learning",
    arxiv="1912.09729",
    year=2019,
    differs="grpo whose loss is bounded by c |A| where A < 0: steps that grew c times likelier teach nothing more.",
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
    proof=("leave_one_out_gradient", "stated_slopes"),
)
def two_sided_clip(clip: float = 0.2, delta: float = 4.0) -> Recipe:
    return grpo().replace(surrogate=Clip(clip, clip, delta=delta))


@method(
    "gmpo",
    title="Geometric-Mean Policy Optimization",
    paper="Geometric-Mean Policy Optimization",
    arxiv="2507.20673",
    year=2025,
    differs="gspo's ratio, of which each token is clipped by itself, in log space, before the mean is taken.",
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
    note="The ratio of a turn is the geometric mean of its tokens', or with `product` their product. The paper's S-PPO "
    "and ST-PPO, which also normalise the gradient by what the clip takes from it, are not in here.",
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
    note="semantics='trl' also bounds each token's log-ratio by 20. Where the sampler is not the policy TRL multiplies "
    "its ratio into the sequence's, which trl-grpo does too.",
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


@method(
    "tis",
    title="Truncated Importance Sampling",
    paper="Your Efficient RL Framework Secretly Brings You Off-Policy RL Training",
    year=2025,
    differs="grpo, weighted by the bounded ratio of the policy, scored anew, to the sampler that really drew the rows.",
    note="`mask` drops what is out of bounds in place of truncating it, TRL's default with `sequence` and a cap of 3. "
    "The whole sequence's ratio without a cap gives the exact gradient. With a sampler whose gradient is 35 % off "
    "where nothing is done, sequences cut at 2 leave 6 %, dropped at 2 14 %, and tokens cut at 2 34 %.",
    proof=("sampler_correction", "stated_slopes"),
)
def tis(cap: float = 2.0, floor: float = 0.0, sequence: bool = False, mask: bool = False) -> Recipe:
    gate = SamplerCorrection("sequence" if sequence else "token", floor, cap, "mask" if mask else "truncate")
    return grpo().replace(gates=(gate,), reduction=Reduction("token"))


@method(
    "m2po",
    title="Second-Moment Trust Policy Optimization",
    paper="Prosperity before Collapse: How Far Can Off-Policy RL Reach with Stale Data on LLMs?",
    arxiv="2510.01161",
    year=2025,
    differs="No clip: the steps that moved farthest are dropped until the mean squared log-ratio is small enough.",
    note="The mean is over all trained steps, those that are dropped included, as the paper's second footnote has it.",
    proof=("stated_slopes",),
)
def m2po(threshold: float = 0.04) -> Recipe:
    return Recipe(Policy(STANDARD, Ratio(denominator="behaviour"), Plain(), (SecondMoment(threshold),)))


@method(
    "clip-cov",
    title="Clip-Cov",
    paper="The Entropy Mechanism of Reinforcement Learning for Reasoning Language Models",
    arxiv="2505.22617",
    year=2025,
    differs="grpo by the token, without a few random tokens whose advantage and log-probability vary together most.",
    note="The window is in the units of the advantage; at least one token is dropped where the window holds one.",
    proof=("stated_slopes",),
)
def clip_cov(clip: float = 0.2, fraction: float = 2e-4, low: float = 1.0, high: float = 5.0) -> Recipe:
    gate = DropCovariance(fraction, low, high, clip, clip)
    return Recipe(Policy(STANDARD, surrogate=Clip(clip, clip), gates=(gate,)))


@method(
    "kl-cov",
    title="KL-Cov",
    paper="The Entropy Mechanism of Reinforcement Learning for Reasoning Language Models",
    arxiv="2505.22617",
    year=2025,
    differs="No clip: the few tokens whose advantage and log-probability vary together most are held in place.",
    proof=("stated_slopes",),
)
def kl_cov(fraction: float = 2e-4, coefficient: float = 1.0) -> Recipe:
    distance, gates = Divergence("abs", "old"), (TopCovariance(fraction),)
    held = Regulariser(distance, coefficient, gates=gates, name="covariance_kl", credit_of=STANDARD)
    return Recipe(Policy(STANDARD, surrogate=Plain()) + held)


@method(
    "high-entropy",
    title="High-entropy minority tokens",
    paper="Beyond the 80/20 Rule: High-Entropy Minority Tokens Drive Effective Reinforcement Learning for LLM "
    "Reasoning",
    arxiv="2506.01939",
    year=2025,
    differs="dapo without the length penalty, in which only the share of tokens with the highest entropy trains.",
    note="The quantile is that of the whole update; TRL's is of each micro-batch.",
    proof=("stated_slopes",),
)
def high_entropy(top: float = 0.2, low: float = 0.2, high: float = 0.28, refill: float = 4.0) -> Recipe:
    policy = Policy(STANDARD, surrogate=Clip(low, high), gates=(HighEntropy(top),))
    return Recipe(policy, DynamicSampling(limit=refill))


@method(
    "steer",
    title="Stabilizing Token-level Entropy-Change via Reweighting",
    paper="Rethinking Entropy Interventions in RLVR: An Entropy Change Perspective",
    arxiv="2510.10150",
    year=2025,
    catalogue=367,
    differs="grpo by the token, each weighted down by how much it would change the entropy of its law.",
    note="The paper's estimate leaves out what the other tokens of the law do; `exact` is the whole first-order "
    "change, and reads all logits.",
    proof=("stated_slopes", "entropy_change"),
)
def steer(clip: float = 0.2, least: float = 0.8, exact: bool = False) -> Recipe:
    return Recipe(Policy(STANDARD, surrogate=Clip(clip, clip), gates=(EntropyChange(least, exact),)))


@method(
    "thr",
    title="Token Hidden Reward",
    paper="Token Hidden Reward: Steering Exploration-Exploitation in Group Relative Deep Reinforcement Learning",
    arxiv="2510.03669",
    year=2025,
    catalogue=377,
    differs="grpo, each token weighted up or down by whether its update makes the group's good answers likelier.",
    note="p > 0 exploits and p < 0 explores. The paper's threshold on |THR| is left out; it reads all logits.",
    proof=("stated_slopes", "hidden_influence"),
)
def thr(p: float = 0.1, clip: float = 0.2) -> Recipe:
    return grpo(clip).replace(gates=(HiddenReward(p),))


@method(
    "dppo",
    title="Divergence Proximal Policy Optimization, Binary-TV",
    paper="Rethinking the Trust Region in LLM Reinforcement Learning",
    arxiv="2602.04879",
    year=2026,
    differs="The importance-weighted gradient, without tokens whose probability itself, not its ratio, moved too far.",
    note="0.15 is the bound of public runs, not read in the paper; its binary KL and top-k estimates are not in here.",
    proof=("leave_one_out_gradient", "stated_slopes"),
)
def dppo(low: float = 0.15, high: float = 0.15) -> Recipe:
    return Recipe(Policy(STANDARD, Ratio(denominator="behaviour"), Plain(), (ProbabilityShift(low, high),)))


@method(
    "off-policy-masking",
    title="Off-policy sequence masking",
    paper="DeepSeek-V3.2: Pushing the Frontier of Open Large Language Models",
    arxiv="2512.02556",
    year=2025,
    differs="grpo without the bad rows that the policy has left: A < 0, and likelihood far below the sampler's.",
    note="The paper gives no bound; TRL suggests 0.5.",
    proof=("leave_one_out_gradient", "stated_slopes"),
)
def off_policy_masking(threshold: float = 0.5, clip: float = 0.2) -> Recipe:
    return grpo(clip).replace(gates=(OffPolicyRows(threshold),))


@method(
    "topr",
    title="Tapered Off-Policy REINFORCE",
    paper="Tapered Off-Policy REINFORCE: Stable and efficient reinforcement learning for LLMs",
    arxiv="2503.14286",
    year=2025,
    catalogue=4,
    differs="REINFORCE on stale rows: good ones at full weight, bad ones by the sequence's ratio, at most 1.",
    note="Good is R >= `baseline`; another baseline changes what share of the rows counts as good.",
    proof=("leave_one_out_gradient", "stated_slopes", "tapered_gradient"),
)
def topr(baseline: float = 0.0, maximum: float = 1.0) -> Recipe:
    credit = GroupCredit("none", reward=Outcome() - Constant(baseline) if baseline else Outcome())
    surrogate = SignedScore((1.0, 1.0), (0.0, maximum))
    return Recipe(Policy(credit, Ratio("sequence", "product"), surrogate, reduction=Reduction("row-sum")))


@method(
    "asymre",
    title="Asymmetric REINFORCE",
    paper="Asymmetric REINFORCE for off-Policy Reinforcement Learning: Balancing positive and negative rewards",
    arxiv="2506.20520",
    year=2025,
    catalogue=5,
    differs="REINFORCE with the group's mean plus `shift` as baseline: below the mean, good rows count more than bad.",
    note="On policy the shift is free; off policy it adds -shift times the likelihood of the rows.",
    proof=("shifted_gradient", "stated_slopes"),
)
def asymre(shift: float = -0.1) -> Recipe:
    return Recipe(Policy(GroupCredit("mean") - Constant(shift), surrogate=Score(), reduction=Reduction("row-sum")))


@method(
    "opmd",
    title="Online Policy Mirror Descent, one step",
    paper="Group-Relative REINFORCE Is Secretly an Off-Policy Algorithm",
    arxiv="2509.24203",
    year=2025,
    catalogue=5,
    differs="REINFORCE with the group's mean as baseline, divided by 1 + tau: another learning rate, and no more.",
    proof=("stated_slopes",),
)
def opmd(tau: NotNegative = 1.0) -> Recipe:
    return Recipe(Policy(GroupCredit("mean"), surrogate=Score(), coefficient=1 / (1 + tau)))


@method(
    "rec-one-side",
    title="REC-OneSide",
    paper="Group-Relative REINFORCE Is Secretly an Off-Policy Algorithm",
    arxiv="2509.24203",
    year=2025,
    catalogue=5,
    differs="The score function with ppo's gate and, unless asked for by `importance`, without its ratio.",
    proof=("leave_one_out_gradient", "stated_slopes"),
)
def rec_one_side(low: float = 0.2, high: float = 0.2, importance: bool = False) -> Recipe:
    return Recipe(Policy(STANDARD, surrogate=Score(0.0 if importance else None), gates=(OneSide(low, high),)))


@method(
    "rec-two-side",
    title="REC-TwoSide",
    paper="Group-Relative REINFORCE Is Secretly an Off-Policy Algorithm",
    arxiv="2509.24203",
    year=2025,
    catalogue=5,
    differs="The score function, without tokens whose ratio is out of bounds on either side, whatever their advantage.",
    proof=("leave_one_out_gradient", "stated_slopes"),
)
def rec_two_side(low: float = 0.2, high: float = 0.2, importance: bool = False) -> Recipe:
    return Recipe(Policy(STANDARD, surrogate=Score(0.0 if importance else None), gates=(TwoSide(low, high),)))


@method(
    "rec-ring",
    title="REC-Ring",
    paper="Group-Relative REINFORCE Is Secretly an Off-Policy Algorithm",
    arxiv="2509.24203",
    year=2025,
    catalogue=5,
    differs="rec-two-side that keeps tokens far out of bounds where their advantage brings them back.",
    proof=("leave_one_out_gradient", "stated_slopes"),
)
def rec_ring(
    low: float = 0.2, high: float = 0.2, far_low: float = 0.6, far_high: float = 2.0, importance: bool = False
) -> Recipe:
    gate = Ring(low, high, far_low, far_high)
    return Recipe(Policy(STANDARD, surrogate=Score(0.0 if importance else None), gates=(gate,)))


@method(
    "luffy",
    title="Learning to reason Under oFF-policY guidance",
    paper="Learning to Reason under Off-Policy Guidance",
    arxiv="2504.14945",
    year=2025,
    differs="grpo by the token, with the data's demonstrations in the group, by pi / (pi + gamma) in place of a ratio.",
    note="Demonstrations take part in the group's mean and deviation. The data need a column `demonstration`.",
    proof=("stated_slopes",),
)
def luffy(clip: float = 0.2, gamma: float = 0.1) -> Recipe:
    return Recipe(Policy(STANDARD, surrogate=BySource(Clip(clip, clip), Shaped(gamma))), Demonstrated())


@method(
    "rl-plus",
    title="RL-PLUS",
    paper="RL-PLUS: Countering Capability Boundary Collapse of LLMs in Reinforcement Learning with Hybrid-policy "
    "Optimization",
    arxiv="2508.00222",
    year=2025,
    catalogue=8,
    differs="grpo by the token, with the data's demonstrations: their ratio is to a mixture, and unlikely tokens lead.",
    note="The demonstrator is taken for (old + 1) / 2, so that the ratio is 4 pi / (1 + 3 old); it is unbiased only "
    "where that is so. `share` is the 1's in the mixture. The data need a column `demonstration`.",
    proof=("mixture_ratio", "stated_slopes"),
)
def rl_plus(clip: float = 0.2, gamma: float = 0.5, share: float = 0.25) -> Recipe:
    ratio = Ratio(denominator=PerSource(Mixture((("old", 1 - share), ("behaviour", share)))))
    policy = Policy(AgainstOwn(), ratio, BySource(Clip(clip, clip), Focused(gamma)))
    return Recipe(policy, Demonstrated())


@method(
    "hpt",
    title="Hybrid Post-Training",
    paper="Towards a Unified View of Large Language Model Post-Training",
    arxiv="2509.04419",
    year=2025,
    catalogue=362,
    differs="For each prompt either grpo on its samples, or where too few succeed, imitation of its demonstration.",
    note="A prompt imitates where its success rate is at most `gate`; success is a reward above `success`. The data "
    "need a column `demonstration`.",
    proof=("either_half", "stated_slopes"),
)
def hpt(gate: float = 0.0, success: float = 0.0, clip: float = 0.2, imitation: NotNegative = 1.0) -> Recipe:
    learns = (Sources(), SuccessRate(gate, True, success))
    imitates = (Sources(own=False), SuccessRate(gate, False, success))
    policy = Policy(AgainstOwn(), surrogate=Clip(clip, clip), gates=learns, reduction=PerPrompt())
    copy = Policy(Constant(), surrogate=Score(), gates=imitates, reduction=PerPrompt(), coefficient=imitation)
    return Recipe(policy + copy, Demonstrated())
