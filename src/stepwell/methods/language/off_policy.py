"""Methods for rows that another policy drew: stale ones, or those of another engine."""

from __future__ import annotations

from stepwell.credit.group import GroupCredit
from stepwell.credit.shaping import Outcome
from stepwell.methods.language.policy_gradient import grpo
from stepwell.methods.language.ratio import STANDARD
from stepwell.objective.gates.minibatch import SecondMoment
from stepwell.objective.gates.step import OffPolicyRows, OneSide, ProbabilityShift, Ring, SamplerCorrection, TwoSide
from stepwell.objective.policy import Policy
from stepwell.objective.ratio import Ratio
from stepwell.objective.reduction import Reduction
from stepwell.objective.surrogate import Plain, Score, SignedScore
from stepwell.parts import Constant
from stepwell.ranges import NotNegative
from stepwell.recipe.recipe import Recipe
from stepwell.recipe.registry import method


@method(
    "tis",
    title="Truncated Importance Sampling",
    paper="Your Efficient RL Framework Secretly Brings You Off-Policy RL Training",
    year=2025,
    differs="grpo, weighted by the bounded ratio of the policy, scored anew, to the sampler that really drew the rows.",
    when="When another engine or precision draws the rows than trains on them.",
    note="`mask` drops what is out of bounds in place of truncating it: MIS, TRL's default with `sequence` and a cap "
    "of 3, and with a `floor` IcePop. The whole sequence's ratio without a cap gives the exact gradient. With a "
    "sampler whose gradient is 35 % off where nothing is done, sequences cut at 2 leave 6 %, dropped at 2 14 %, and "
    "tokens cut at 2 34 %.",
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
    when="For rollouts that are many updates old: only the tokens that moved farthest are left out.",
    note="The mean is over all trained steps, those that are dropped included, as the paper's second footnote has it.",
    proof=("stated_slopes",),
)
def m2po(threshold: float = 0.04) -> Recipe:
    return Recipe(Policy(STANDARD, Ratio(denominator="behaviour"), Plain(), (SecondMoment(threshold),)))


@method(
    "dppo",
    title="Divergence Proximal Policy Optimization, Binary-TV",
    paper="Rethinking the Trust Region in LLM Reinforcement Learning",
    arxiv="2602.04879",
    year=2026,
    differs="The importance-weighted gradient, without tokens whose probability itself, not its ratio, moved too far.",
    when="When a clip of ratios is too tight for rare tokens and too loose for common ones.",
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
    when="When rows serve many updates or come from another engine: bad ones that drifted away are left out.",
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
    when="For stored or stale rows, good and bad, on which plain REINFORCE diverges.",
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
    when="For stale rows whose log-probabilities are unknown or not to be trusted: it needs no ratios.",
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
    when="To compare with mirror descent; by itself it is REINFORCE at another learning rate.",
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
    when="To see what ppo's gate does by itself, without importance weights.",
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
    when="As rec-one-side, when tokens out of bounds should be left out whatever their advantage.",
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
    when="As rec-two-side, when tokens that moved very far should still be brought back.",
    proof=("leave_one_out_gradient", "stated_slopes"),
)
def rec_ring(
    low: float = 0.2, high: float = 0.2, far_low: float = 0.6, far_high: float = 2.0, importance: bool = False
) -> Recipe:
    gate = Ring(low, high, far_low, far_high)
    return Recipe(Policy(STANDARD, surrogate=Score(0.0 if importance else None), gates=(gate,)))
