"""Methods whose target is a distribution that can be written down: regression, balance, mirror steps, teachers."""

from __future__ import annotations

from stepwell.credit.group import GroupCredit
from stepwell.credit.shaping import Outcome
from stepwell.errors import InputError
from stepwell.objective.balance import SubTrajectoryBalance, TrajectoryBalance
from stepwell.objective.distillation import Distillation, Failing, TeacherAdvantage, TeacherDivergence, TeacherEstimate
from stepwell.objective.groups import (
    Consistency,
    Discriminative,
    GroupLoss,
    NashRegression,
    OrderPreserving,
    PosteriorMatching,
    SelfPlay,
    TrustRegion,
)
from stepwell.objective.policy import Policy
from stepwell.objective.preference.pairs import SequenceScore
from stepwell.objective.preference.scores import MeanRatio
from stepwell.objective.reduction import Reduction
from stepwell.objective.regularise import Divergence, Regulariser
from stepwell.objective.state import LogPartition
from stepwell.objective.surrogate import Clip, Plain, Score
from stepwell.parts import Part
from stepwell.ranges import NotNegative, Positive
from stepwell.recipe.recipe import Recipe
from stepwell.recipe.registry import method


@method(
    "copg",
    title="Contrastive Policy Gradient",
    paper="Contrastive Policy Gradient: Aligning LLMs on sequence-level scores in a supervised-friendly fashion",
    arxiv="2406.19185",
    year=2024,
    catalogue=11,
    differs="Regularised rewards of a group's rows are made equal, which they are at ref exp(R / beta), on any data.",
    when="For stale or stored rows, when the target is the reference tilted by the reward.",
    note="On policy the expected gradient is -2 beta that of E R - beta KL.",
    proof=("tilted_minimum", "regularised_gradient", "loss_by_hand"),
)
def copg(beta: float = 0.1) -> Recipe:
    return Recipe(GroupLoss(Consistency(beta)))


@method(
    "brain",
    title="Bayesian Reward-conditioned Amortized Inference",
    paper="BRAIn: Bayesian Reward-conditioned Amortized Inference for natural language generation from feedback",
    arxiv="2402.02479",
    year=2024,
    catalogue=35,
    differs="Forward divergence from the tilted reference, its samples and its baseline self-normalised in the group.",
    when="When the target is the reference tilted by the reward, and groups are large enough to estimate it.",
    proof=("tilted_minimum", "posterior_gradient"),
)
def brain(beta: float = 0.1) -> Recipe:
    return Recipe(GroupLoss(PosteriorMatching(beta)))


@method(
    "dno",
    title="Direct Nash Optimization",
    paper="Direct Nash Optimization: Teaching Language Models to Self-Improve with General Preferences",
    arxiv="2404.03715",
    year=2024,
    catalogue=325,
    differs="Soft labels from the rows' rates of winning within their group; the reference is each round's policy.",
    when="When preferences are soft, and each round should improve on the last policy.",
    note="Win rates are within the group, so their noise biases the labels; given them the fixed point is exact. "
    "Preferences are Bradley and Terry's of the rewards.",
    proof=("win_rate_minimum", "loss_by_hand"),
)
def dno(beta: float = 0.1, rounds: int = 1) -> Recipe:
    return Recipe(GroupLoss(NashRegression(beta)), reference="synced", sync_every=rounds)


@method(
    "sppo",
    title="Self-Play Preference Optimization",
    paper="Self-Play Preference Optimization for Language Model Alignment",
    arxiv="2405.00675",
    year=2024,
    differs="Each row's log-ratio is fitted to its rate of winning less a half, over beta; the reference moves on.",
    when="When all that counts is who beats whom in a group, and the reference may move on.",
    note="Win rates are within the group, by Bradley and Terry's model of the rewards. dpo(loss='sppo-hard') is the "
    "form with labels 0 and 1.",
    proof=("loss_by_hand",),
)
def sppo(beta: float = 0.1, rounds: int = 1) -> Recipe:
    return Recipe(GroupLoss(SelfPlay(beta)), reference="synced", sync_every=rounds)


@method(
    "disco",
    title="Discriminative Constrained Optimization",
    paper="DisCO: Reinforcing Large Reasoning Models with Discriminative Constrained Optimization",
    arxiv="2505.12366",
    year=2025,
    catalogue=311,
    differs="Right answers' scores are raised over a soft maximum of the wrong ones', inside a trust region.",
    when="For right-or-wrong rewards, when grpo's preference for prompts of middling difficulty is unwanted.",
    note="Rows above the threshold are right. The released code pairs rows within a micro-batch and takes the trust "
    "region of each; here both are of the whole minibatch.",
    proof=("loss_by_hand",),
)
def disco(
    temperature: float = 10.0,
    limit: float = 1e-4,
    penalty: NotNegative = 1e3,
    threshold: float = 0.5,
    ratio: bool = False,
) -> Recipe:
    score: Part = MeanRatio() if ratio else SequenceScore(mean=True, against="none")
    return Recipe(GroupLoss(Discriminative(temperature, threshold), score) + TrustRegion(limit, penalty))


@method(
    "mdpo",
    title="Mirror Descent Policy Optimization",
    paper="Mirror Descent Policy Optimization",
    arxiv="2005.09814",
    year=2020,
    catalogue=332,
    differs="No clip: several passes at the reward less a divergence from the policy that drew the batch.",
    when="For several passes over a rollout without a clip.",
    note="One pass alone is the plain policy gradient. The paper lowers `step` to 0 over the run; here it stays, and "
    "the number of passes is ours.",
    proof=("mirror_minimum", "loss_by_hand"),
)
def mdpo(step: Positive = 1.0, epochs: int = 4) -> Recipe:
    policy = Policy(GroupCredit("leave-one-out"), surrogate=Plain(), reduction=Reduction("row-sum"))
    near = Regulariser(Divergence("k3-weighted", "old"), 1 / step, Reduction("row-sum"))
    return Recipe(policy + near, epochs=epochs)


@method(
    "trajectory-balance",
    title="Trajectory Balance",
    aliases=("tb",),
    paper="Trajectory Balance: Improved Credit Assignment in GFlowNets",
    arxiv="2201.13259",
    year=2022,
    differs="The squared residual of log Z + log pi - log ref - R / beta, with a log Z that is learned beside it.",
    when="When answers should be drawn in proportion to exp(R / beta), for variety and not for the best one.",
    note="Backward policy: none, for text has one parent. On policy, whatever log Z, the gradient is the divergence's.",
    proof=("tilted_minimum", "loss_by_hand"),
)
def trajectory_balance(beta: Positive = 0.1, rate: float = 0.1) -> Recipe:
    return Recipe(TrajectoryBalance(Outcome() * (1 / beta), log_partition=LogPartition("log_partition", rate=rate)))


@method(
    "vargrad",
    title="VarGrad",
    paper="VarGrad: A Low-Variance Gradient Estimator for Variational Inference",
    arxiv="2010.10436",
    year=2020,
    differs="trajectory-balance with log Z estimated by the group's mean residual: the variance of the log-ratio.",
    when="As trajectory-balance, with several samples a prompt and no log Z to learn.",
    note="It is copg up to a factor 2 beta^2 (n-1) / n for groups of n.",
    proof=("tilted_minimum", "loss_by_hand"),
)
def vargrad(beta: Positive = 0.1) -> Recipe:
    return Recipe(TrajectoryBalance(Outcome() * (1 / beta), partition="group"))


@method(
    "sub-trajectory-balance",
    title="Sub-Trajectory Balance",
    aliases=("subtb",),
    paper="Learning GFlowNets from Partial Episodes for Improved Convergence and Stability",
    arxiv="2209.12782",
    year=2022,
    differs="Balance between every two states of a row, with a flow that the value head learns; lam weighs the gaps.",
    when="As trajectory-balance, for long rows: every part of a row teaches.",
    note="lam to 0 is detailed balance (DB), lam to infinity trajectory balance.",
    proof=("flow_minimum", "loss_by_hand"),
)
def sub_trajectory_balance(beta: Positive = 0.1, lam: float = 0.9) -> Recipe:
    return Recipe(SubTrajectoryBalance(lam, Outcome() * (1 / beta)))


@method(
    "op-gfn",
    title="Order-Preserving GFlowNet",
    paper="Order-Preserving GFlowNets",
    arxiv="2310.00386",
    year=2023,
    catalogue=272,
    differs="Only the order of rewards is read: the group's best rows should have the largest implied rewards.",
    when="When only the order of rewards means something, and variety among the best is wanted.",
    note="In the form of trajectory balance, whose implied reward is the row's probability; for two rows it is dpo's "
    "loss with beta 1 and a uniform reference.",
    proof=("loss_by_hand",),
)
def op_gfn(beta: float = 1.0) -> Recipe:
    return Recipe(GroupLoss(OrderPreserving(beta), SequenceScore(against="none")))


@method(
    "kdrl",
    title="Unified Knowledge Distillation and Reinforcement Learning",
    paper="KDRL: Post-Training Reasoning LLMs via Unified Knowledge Distillation and Reinforcement Learning",
    arxiv="2506.02208",
    year=2025,
    catalogue=319,
    differs="grpo, with a penalty on the divergence from a teacher in place of the starting policy.",
    when="When a stronger teacher of the same vocabulary is at hand, and rewards should count too.",
    note="`teacher` is another model of the same vocabulary. The paper's coefficients and its annealing could not be "
    "established; the default is ours. `failing` keeps the penalty to rows without reward.",
    proof=("teacher_gradient", "loss_by_hand"),
)
def kdrl(clip: float = 0.2, kl: NotNegative = 2e-3, failing: bool = False, estimate: str = "k2") -> Recipe:
    policy = Policy(GroupCredit("mean", "std"), surrogate=Clip(clip, clip))
    gates = (Failing(),) if failing else ()
    return Recipe(policy + Regulariser(TeacherEstimate(estimate), kl, gates=gates, name="teacher_kl"))  # type: ignore[arg-type]


@method(
    "on-policy-distillation",
    title="On-Policy Distillation",
    aliases=("opd", "on-policy-distill"),
    paper="On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes",
    arxiv="2306.13649",
    year=2023,
    differs="The policy gradient with log teacher - log policy of each token drawn as its advantage; no reward.",
    when="To teach a small model by a larger one of the same vocabulary, on the small one's samples.",
    note="to_go sums it to the end of the row: then the gradient is that of whole sequences' divergence, and not of "
    "each state's with visits frozen. front=0.5 is TRL's IW-OPD, whose early tokens weigh up to 1.5.",
    proof=("teacher_gradient", "loss_by_hand"),
)
def on_policy_distillation(to_go: bool = False, front: float = 0.0, maximum: float = 2.0) -> Recipe:
    if to_go and front:
        raise InputError(f"front must be 0 with to_go, got {front}: front-loaded advantages are not summed to the end.")
    return Recipe(Policy(TeacherAdvantage(to_go, front), surrogate=Score(maximum=maximum)))


@method(
    "gkd",
    title="Generalized Knowledge Distillation",
    paper="On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes",
    arxiv="2306.13649",
    year=2023,
    differs="The exact divergence from a teacher over the whole vocabulary, on the student's own samples; no reward.",
    when="As on-policy-distillation, with less noise, where memory holds whole distributions.",
    note="At beta 0, .001, .01, .5, .99, .999 and 1 the published family is discontinuous: it falls to 0 towards both "
    "ends and jumps there. `scaled` divides by beta (1 - beta) and is continuous. top=0 holds the teacher's whole "
    "distribution of every step of a rollout; top=64 its likeliest 64 actions, and takes the others for one.",
    proof=("exact_distillation",),
)
def gkd(beta: float = 0.5, scaled: bool = False, top: int = 0) -> Recipe:
    return Recipe(Distillation(TeacherDivergence(beta, scaled, top)))
