"""Methods that choose the tokens, and the rows, that train."""

from __future__ import annotations

from stepwell.credit.group import GroupCredit
from stepwell.methods.language.policy_gradient import grpo
from stepwell.methods.language.ratio import STANDARD
from stepwell.objective.gates.minibatch import DropCovariance, EntropyChange, HiddenReward, TopCovariance
from stepwell.objective.gates.selection import Influence, MostSpread
from stepwell.objective.gates.step import HighEntropy
from stepwell.objective.policy import Policy
from stepwell.objective.regularise import Divergence, Regulariser
from stepwell.objective.state import Ramp
from stepwell.objective.surrogate import Clip, Plain
from stepwell.planning.groups import DynamicSampling
from stepwell.recipe.recipe import Recipe
from stepwell.recipe.registry import method


@method(
    "clip-cov",
    title="Clip-Cov",
    paper="The Entropy Mechanism of Reinforcement Learning for Reasoning Language Models",
    arxiv="2505.22617",
    year=2025,
    differs="grpo by the token, without a few random tokens whose advantage and log-probability vary together most.",
    when="When entropy collapses early: a few of the tokens that lower it most are left out.",
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
    when="When entropy collapses early: the few tokens that lower it most are held back by a penalty.",
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
    when="For long reasoning: only the tokens at which answers really part are trained.",
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
    differs="grpo by the token, each weighted down by how much it would change the entropy of its distribution.",
    when="When entropy collapses or explodes: tokens that would change it most count least.",
    note="The paper's estimate leaves out the other tokens of the distribution; `exact` is the whole first-order "
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
    when="To lean towards exploiting (p > 0) or exploring (p < 0) without touching the reward.",
    note="p > 0 exploits and p < 0 explores. The paper's threshold on |THR| is left out; it reads all logits.",
    proof=("stated_slopes", "hidden_influence"),
)
def thr(p: float = 0.1, clip: float = 0.2) -> Recipe:
    return grpo(clip).replace(gates=(HiddenReward(p),))


@method(
    "d3s",
    title="Dynamic Dual-Level Down-Sampling",
    paper="Learning More with Less: A Dynamic Dual-Level Down-Sampling Framework for Efficient Policy Optimization",
    arxiv="2509.22115",
    year=2025,
    catalogue=23,
    differs="grpo on the rows whose credits spread most and the tokens of most credit times entropy; both shares grow "
    "over the run.",
    when="When updates cost more than rollouts: train on the rows and tokens from which most is learned.",
    note="The paper's shares could not be established: a half of each at first, and all after `updates`, are ours. "
    "The best subset of rows is found exactly. Rows left out still count in the loss's denominator.",
    proof=("most_spread_subset", "most_telling_steps", "everything_is_grpo"),
)
def d3s(rows: float = 0.5, tokens: float = 0.5, updates: int = 200, clip: float = 0.2) -> Recipe:
    credit = MostSpread(GroupCredit("mean", "std"), Ramp("rows_kept", rows, updates=updates))
    gate = Influence(Ramp("tokens_kept", tokens, updates=updates))
    return Recipe(Policy(credit, surrogate=Clip(clip, clip), gates=(gate,)))
