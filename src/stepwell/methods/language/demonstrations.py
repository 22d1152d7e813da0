"""Methods that learn from what others wrote for a prompt as well: demonstrations and hints in the data."""

from __future__ import annotations

from stepwell.credit.group import GroupCredit
from stepwell.credit.sources import AgainstOwn
from stepwell.methods.language.ratio import STANDARD
from stepwell.objective.gates.step import Sources, SuccessRate
from stepwell.objective.policy import Policy
from stepwell.objective.ratio import MixtureDenominator, PerSource, Ratio
from stepwell.objective.reduction import PerPrompt, Reduction
from stepwell.objective.surrogate import BySource, Clip, Focused, Score, Shaped
from stepwell.parts import Constant
from stepwell.planning.demonstrations import Demonstrated
from stepwell.planning.hints import Hinted
from stepwell.ranges import NotNegative
from stepwell.recipe.recipe import Recipe
from stepwell.recipe.registry import method


@method(
    "luffy",
    title="Learning to reason Under oFF-policY guidance",
    paper="Learning to Reason under Off-Policy Guidance",
    arxiv="2504.14945",
    year=2025,
    differs="grpo by the token with the data's demonstrations in the group; theirs is pi / (pi + gamma) in place of a "
    "ratio.",
    when="When the data have worked answers that the policy rarely finds by itself.",
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
    differs="grpo by the token, with the data's demonstrations: their ratio is to a mixture, and unlikely tokens "
    "count most.",
    when="As luffy, when the unlikely tokens of right demonstrations should count most.",
    note="The demonstrator is taken for (old + 1) / 2, so that the ratio is 4 pi / (1 + 3 old); it is unbiased only "
    "where that is so. `share` is the 1's in the mixture. The data need a column `demonstration`.",
    proof=("mixture_ratio", "stated_slopes"),
)
def rl_plus(clip: float = 0.2, gamma: float = 0.5, share: float = 0.25) -> Recipe:
    ratio = Ratio(denominator=PerSource(MixtureDenominator((("old", 1 - share), ("behaviour", share)))))
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
    when="When some prompts are beyond the policy: those imitate, and the others learn from reward.",
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


@method(
    "guide",
    title="Guide-GRPO",
    aliases=("guide-grpo",),
    paper="Adaptive Guidance Accelerates Reinforcement Learning of Reasoning Models",
    arxiv="2506.13923",
    year=2025,
    catalogue=10,
    differs="grpo that asks unsolved prompts again with a hint and learns to do without it, by the ratio to the "
    "hinted distribution.",
    when="When many prompts are never solved and the data have hints for them.",
    note="The data's column `hinted` holds a prompt with its hint; prompts without one are grpo's. As hints follow "
    "failure, unclipped ratios give the gradient of a prompt 1 + (1 - p)^G / 2 times, p its success rate.",
    proof=("hinted_gradient", "standardised_gradient"),
)
def guide(clip: float = 0.2, hints: int = 0) -> Recipe:
    ratio = Ratio(denominator="behaviour")
    policy = Policy(GroupCredit("mean", "std"), ratio, Clip(clip, clip), reduction=Reduction("row"))
    return Recipe(policy, Hinted(hints=hints))
