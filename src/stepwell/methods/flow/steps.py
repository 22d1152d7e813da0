"""Methods that train flows and diffusions from rewards, each a composition of parts with its card."""

from __future__ import annotations

from typing import Any

from stepwell.credit.branches import BranchExtremes, Pooled, TreeCredit
from stepwell.credit.group import GroupCredit
from stepwell.credit.shaping import Bounded, DivergencePenalty, Outcome
from stepwell.errors import InputError, UnknownName
from stepwell.objective.flow.forward import (
    DenoisingScore,
    DirectReward,
    ForwardPairs,
    ForwardPolicy,
    NegativeAware,
    Noised,
)
from stepwell.objective.flow.gaussian import (
    DivergenceBound,
    MeanRatio,
    NoiseAware,
    PerDimension,
    PerStepSize,
    RegulatedRatio,
    StepSize,
)
from stepwell.objective.policy import Policy
from stepwell.objective.preference.pairs import Logistic, Pairing, Pairs
from stepwell.objective.ratio import Ratio
from stepwell.objective.reduction import Reduction
from stepwell.objective.regularise import Divergence, Regulariser
from stepwell.objective.surrogate import Clip, Plain, Score
from stepwell.objective.term import Objective, Term
from stepwell.parts import NotNegative, Part, Share, Size
from stepwell.planning.branches import Branches, Candidates, Tree
from stepwell.planning.groups import Groups
from stepwell.planning.queue import Queue
from stepwell.planning.windows import Backward, Tail, Windows
from stepwell.recipe.recipe import Recipe
from stepwell.recipe.registry import method
from stepwell.steering.guide import RewardGuide

VARIANTS = ("corrected", "published")
RATIO = (
    "the ratio is of log-densities averaged over the D dimensions, whose mean is exp(-K/D + K/D^2) and not 1: 0.779 "
    "for a step of divergence K = 1 in D = 2"
)
FIRST = "the first step leaves a variance of 1 + level^4 / 4, 1.060 at level 0.7, however many steps there are"
KL = "the penalty is |dt| / D of the step's divergence, 0.05 of it for ten steps in two dimensions"
WINDOW = "with 25 random steps, 75 of 650 rollouts train one to three steps and 25 train none"
CPS = "noise='cps' leaves 0.7270 of the variance of Gaussian data at level 0.7 as steps grow; corrected, DDIM's eta"
"""What the published variants do, in figures that tests/check/test_flow_oracles.py and tests/solver measure."""


def published(variant: str) -> bool:
    """Whether a method runs as published, with what its card calls a bug; raises UnknownName for a third way."""
    if variant not in VARIANTS:
        raise UnknownName("variant", variant, VARIANTS)
    return variant == "published"


def check_steps(steps: int, random: int = 1) -> None:
    """Raise `InputError` unless there are so many steps before the last, which draws no noise and is never trained."""
    if steps <= random:
        raise InputError(
            f"The last step of a flow is not random, and this method trains {random} or more that are: "
            f"steps={steps} are too few."
        )


def ancestral(eta: float, steps: int) -> dict[str, Any]:
    """DDPM's own noise, or less of it, as a law (eta of DDIM, arXiv 2010.02502, equation 16)."""
    check_steps(steps)
    return {"solver": "ddpm", "level": eta, "steps": steps}


def flow_sde(level: float, steps: int, variant: str) -> dict[str, Any]:
    """Flow-GRPO's SDE, whose noise is g^2 = level^2 t / (1 - t), as a law.

    `corrected` solves its linear part exactly: tau^2 = level^2 / 2, order 1, and the marginals are those of the ODE in
    the limit. `published` is stochastic Euler, whose first step leaves a variance of 1 + level^4 / 4.
    """
    check_steps(steps)
    if published(variant):
        return {"solver": "sde-euler-published", "level": level, "steps": steps}
    return {"solver": "sde-flow", "level": level * 0.5**0.5, "steps": steps}


def preserving(level: float, steps: int, variant: str) -> dict[str, Any]:
    """Coefficients-preserving steps (CPS, arXiv 2509.05952) as published; corrected, DDIM's eta, which converges.

    With noise of level 0.7 and ever more steps CPS leaves 0.7270 of the variance of Gaussian data.
    """
    return {"solver": "cps" if published(variant) else "ddim-eta", "level": level, "steps": steps}


NOISES = {"sde": flow_sde, "cps": preserving}


def noisy(kind: str, level: float, steps: int, variant: str) -> dict[str, Any]:
    """The law of a kind of noise; raises UnknownName for another kind."""
    if kind not in NOISES:
        raise UnknownName("noise of a flow's steps", kind, NOISES)
    return NOISES[kind](level, steps, variant)


def clipped(variant: str, clip: float | None, credit: Part, **parts: Any) -> Policy:
    """A clipped policy loss on steps: the ratio of densities, or as published of their mean logarithms over D."""
    if published(variant):
        bound = 1e-4 if clip is None else clip
        return Policy(credit, MeanRatio(), Clip(bound, bound), **parts)
    bound = 0.2 if clip is None else clip
    return Policy(credit, Ratio(), Clip(bound, bound), **parts)


def near(policy: Term, kl: float, variant: str) -> Term | Objective:
    """With the exact divergence of each step from the reference's; as published, times |dt| and over D."""
    if not kl:
        return policy
    quantity = Divergence("exact") * StepSize() * PerDimension() if published(variant) else Divergence("exact")
    return Objective((policy, Regulariser(quantity, kl)))


@method(
    "ddpo-sf",
    title="Denoising Diffusion Policy Optimization, score function",
    paper="Training Diffusion Models with Reinforcement Learning",
    arxiv="2305.13301",
    year=2023,
    processes=("flow",),
    differs="REINFORCE on denoising steps drawn as DDPM draws them; rewards standardised within the prompt.",
    proof=("gaussian_gradient", "policy_moment_gradient"),
)
def ddpo_sf(steps: Size = 10, eta: NotNegative = 1.0) -> Recipe:
    credit = Bounded(GroupCredit("mean", "std"), 10.0)
    policy = Policy(credit, surrogate=Score(), reduction=Reduction("row-sum"))
    return Recipe(policy, Groups(), sampler=ancestral(eta, steps))


@method(
    "ddpo-is",
    title="Denoising Diffusion Policy Optimization, importance sampling",
    paper="Training Diffusion Models with Reinforcement Learning",
    arxiv="2305.13301",
    year=2023,
    processes=("flow",),
    differs="ddpo-sf with a clipped ratio a step; published: of mean log-densities, clipped at 1e-4.",
    note=f"{RATIO}.",
    proof=("gaussian_gradient", "policy_moment_gradient", "mean_ratio"),
)
def ddpo_is(steps: Size = 10, eta: NotNegative = 1.0, clip: float | None = None, variant: str = "corrected") -> Recipe:
    policy = clipped(variant, clip, Bounded(GroupCredit("mean", "std"), 10.0))
    return Recipe(policy, Groups(), sampler=ancestral(eta, steps))


@method(
    "flow-grpo",
    title="Flow-GRPO",
    paper="Flow-GRPO: Training Flow Matching Models via Online RL",
    arxiv="2505.05470",
    year=2025,
    processes=("flow",),
    differs="GRPO on the steps of an SDE with the flow's marginals; `window` > 0 is Fast, random steps there alone.",
    note=f"{RATIO}; {FIRST}; {KL}; {CPS}.",
    proof=("gaussian_gradient", "policy_moment_gradient", "mean_ratio", "step_divergence"),
)
def flow_grpo(
    level: NotNegative = 0.7,
    steps: Size = 10,
    clip: float | None = None,
    kl: NotNegative = 0.0,
    window: int = 0,
    noise: str = "sde",
    variant: str = "corrected",
) -> Recipe:
    policy = clipped(variant, clip, Bounded(GroupCredit("mean", "batch-std"), 5.0))
    planner = Windows(steps=steps - 1, width=window or steps - 1, schedule="random" if window else "fixed")
    return Recipe(near(policy, kl, variant), planner, sampler=noisy(noise, level, steps, variant))


@method(
    "dance-grpo",
    title="DanceGRPO",
    paper="DanceGRPO: Unleashing GRPO on Visual Generation",
    arxiv="2505.07818",
    year=2025,
    processes=("flow",),
    differs="flow-grpo with noise of constant size, standardised within the group, a prompt's samples from one noise.",
    note=f"{RATIO}.",
    proof=("gaussian_gradient", "policy_moment_gradient", "mean_ratio"),
)
def dance_grpo(
    level: NotNegative = 0.3,
    steps: Size = 16,
    clip: float | None = None,
    same_noise: bool = True,
    variant: str = "corrected",
) -> Recipe:
    policy = clipped(variant, clip, Bounded(GroupCredit("mean", "std"), 5.0))
    planner = Windows(steps=steps - 1, width=steps - 1, same_noise=same_noise)
    return Recipe(policy, planner, sampler={"solver": "sde-dance", "level": level, "steps": steps})


@method(
    "euphonium",
    title="Euphonium",
    paper="Euphonium: Steering Video Flow Matching via Process Reward Gradient Guided Stochastic Dynamics",
    arxiv="2602.04928",
    year=2026,
    processes=("flow",),
    differs="dance-grpo on rollouts guided by the reward's gradient, which the policy absorbs; scored under its own "
    "unguided law, as a guided centre would leave it in need of the reward.",
    proof=("guided_step",),
)
def euphonium(
    level: NotNegative = 0.3,
    steps: Size = 16,
    beta: float = 0.1,
    scale: NotNegative = 0.1,
    clip: float | None = None,
    variant: str = "corrected",
) -> Recipe:
    guide = RewardGuide(scale, normalise=True) if published(variant) else RewardGuide(beta=beta)
    return dance_grpo(level, steps, clip, same_noise=False, variant=variant).replace(guide=guide)


@method(
    "mix-grpo",
    title="MixGRPO",
    paper="MixGRPO: Unlocking Flow-based GRPO Efficiency with Mixed ODE-SDE",
    arxiv="2507.21802",
    year=2025,
    processes=("flow",),
    differs="flow-grpo in a window that moves from noise to data; `flash` finishes by DPM-Solver++ in fewer steps.",
    note=f"{RATIO}; {FIRST}; {WINDOW}.",
    proof=("gaussian_gradient", "policy_moment_gradient", "mean_ratio", "window_schedule"),
)
def mix_grpo(
    level: NotNegative = 0.7,
    steps: Size = 10,
    window: int = 4,
    hold: int = 25,
    schedule: str = "progressive",
    flash: Share = 0.0,
    same_noise: bool = True,
    clip: float | None = None,
    variant: str = "corrected",
) -> Recipe:
    policy = clipped(variant, clip, Bounded(GroupCredit("mean", "std", epsilon=1e-8), 5.0))
    moving: dict[str, Any] = {"steps": steps - 1, "width": window, "hold": hold, "schedule": schedule}
    moving |= {"same_noise": same_noise, "variant": variant}
    planner = Tail(ratio=flash, **moving) if flash else Windows(**moving)
    return Recipe(policy, planner, sampler=flow_sde(level, steps, variant))


@method(
    "tempflow-grpo",
    title="TempFlow-GRPO",
    paper="TempFlow-GRPO: When Timing Matters for GRPO in Flow Models",
    arxiv="2508.04324",
    year=2025,
    processes=("flow",),
    differs="Each step is judged by children that part there and nowhere else; steps weigh by the noise they draw.",
    note=f"{RATIO}; {FIRST}.",
    proof=("gaussian_gradient", "branch_gradient", "mean_ratio", "step_divergence"),
)
def tempflow_grpo(
    level: NotNegative = 0.7,
    steps: Size = 10,
    children: int = 6,
    clip: float | None = None,
    kl: NotNegative = 0.0,
    variant: str = "corrected",
) -> Recipe:
    credit = Bounded(GroupCredit("mean", "std", keys=("prompt", "origin")), 5.0)
    policy = clipped(variant, clip, credit, gates=(NoiseAware(),))
    planner = Branches(size=children, at=tuple(range(steps - 1)))
    return Recipe(near(policy, kl, "corrected"), planner, sampler=flow_sde(level, steps, variant))


@method(
    "g2rpo",
    title="Granular-GRPO",
    paper="G^2RPO: Granular GRPO for Precise Reward in Flow Models",
    arxiv="2510.01982",
    year=2025,
    processes=("flow",),
    differs="One random step a row, judged at several strides of what follows; their standardised rewards add up.",
    note=f"{RATIO}; {FIRST}.",
    proof=("gaussian_gradient", "branch_gradient", "mean_ratio"),
)
def g2rpo(
    level: NotNegative = 0.7,
    steps: Size = 10,
    branches: Size = 5,
    size: int = 6,
    strides: Size = 2,
    clip: float | None = None,
    variant: str = "corrected",
) -> Recipe:
    credit = GroupCredit("mean", "std", keys=("prompt", "origin", "source"), epsilon=1e-8)
    policy = clipped(variant, clip, Bounded(Pooled(credit), 5.0), reduction=Reduction("edge"))
    check_steps(steps, branches)
    planner = Branches(size=size, at=tuple(range(branches)), strides=tuple(range(1, strides + 1)))
    return Recipe(policy, planner, sampler=flow_sde(level, steps, variant))


@method(
    "grpo-guard",
    title="GRPO-Guard",
    paper="GRPO-Guard: Mitigating Implicit Over-Optimization in Flow Matching via Regulated Clipping",
    arxiv="2510.22319",
    year=2025,
    processes=("flow",),
    differs="flow-grpo with a ratio freed of its bias and of each step's scale, and steps reweighted by 1 / |dt|.",
    proof=("gaussian_gradient", "policy_moment_gradient", "regulated_ratio", "step_divergence"),
)
def grpo_guard(
    level: NotNegative = 0.7, steps: Size = 10, clip: float = 2e-3, reweight: bool = True, kl: NotNegative = 0.0
) -> Recipe:
    recipe = flow_grpo(level, steps, kl=kl)
    gates = (PerStepSize(),) if reweight else ()
    return recipe.replace(ratio=RegulatedRatio(), surrogate=Clip(clip, clip), gates=gates)


@method(
    "dynamic-treerpo",
    title="Dynamic-TreeRPO",
    paper="Dynamic-TreeRPO: Breaking the Independent Trajectory Bottleneck with Structured Sampling",
    arxiv="2509.23352",
    year=2025,
    processes=("flow",),
    differs="A tree of random steps in a sliding window; each step earns its leaves' mean less its siblings'.",
    note=f"{RATIO}; {FIRST}.",
    proof=("gaussian_gradient", "branch_gradient", "mean_ratio"),
)
def dynamic_treerpo(
    level: NotNegative = 0.7,
    steps: Size = 10,
    depth: int = 4,
    branching: int = 2,
    hold: int = 25,
    clip: float | None = None,
    variant: str = "corrected",
) -> Recipe:
    policy = clipped(variant, clip, TreeCredit(), reduction=Reduction("edge"))
    planner = Tree(size=branching**depth, branching=branching, steps=steps - 1, hold=hold)
    return Recipe(policy, planner, sampler=flow_sde(level, steps, variant))


@method(
    "b2-diffurl",
    title="B2-DiffuRL",
    paper="Towards Better Alignment: Training Diffusion Models with Reinforcement Learning Against Sparse Rewards",
    arxiv="2503.11240",
    year=2025,
    processes=("flow",),
    differs="ddpo-is on the last steps first, a part that grows; only each state's best and worst branches count.",
    note=f"{RATIO}.",
    proof=("gaussian_gradient", "branch_gradient", "mean_ratio"),
)
def b2_diffurl(
    steps: Size = 20,
    least: int = 14,
    hold: int = 10,
    branches: Size = 3,
    clip: float | None = None,
    variant: str = "corrected",
) -> Recipe:
    policy = clipped(variant, 0.1 if clip is None else clip, BranchExtremes())
    planner = Backward(size=branches, steps=steps, least=least, hold=hold)
    return Recipe(policy, planner, sampler=ancestral(1.0, steps))


@method(
    "flow-dppo",
    title="Flow-DPPO",
    processes=("flow",),
    differs="flow-grpo whose clip is a bound on each step's divergence from the old policy instead of on its ratio.",
    proof=("gaussian_gradient", "policy_moment_gradient", "mean_ratio", "divergence_bound"),
)
def flow_dppo(level: NotNegative = 0.7, steps: Size = 10, threshold: float = 1e-4) -> Recipe:
    return flow_grpo(level, steps).replace(surrogate=Plain(), gates=(DivergenceBound(threshold),))


@method(
    "loop",
    title="LOOP",
    paper="A Simple and Effective Reinforcement Learning Method for Text-to-Image Diffusion Fine-tuning",
    arxiv="2503.00897",
    year=2025,
    processes=("flow",),
    differs="ddpo-is with the mean reward of a prompt's other samples as each one's baseline.",
    proof=("gaussian_gradient", "policy_moment_gradient", "mean_ratio"),
)
def loop(steps: Size = 10, eta: NotNegative = 1.0, clip: float = 0.2) -> Recipe:
    policy = clipped("corrected", clip, GroupCredit("leave-one-out"), reduction=Reduction("row-sum"))
    return Recipe(policy, Groups(), sampler=ancestral(eta, steps))


@method(
    "draft-k",
    title="DRaFT-K",
    paper="Directly Fine-Tuning Diffusion Models on Differentiable Rewards",
    arxiv="2309.17400",
    year=2023,
    processes=("flow",),
    differs="The reward's own gradient, through the last `depth` steps of the sampler; 0 is all of them.",
    proof=("truncated_sum",),
)
def draft_k(depth: int = 1, steps: Size = 10, solver: str = "ddim") -> Recipe:
    return Recipe(DirectReward(depth or None), Groups(), sampler={"solver": solver, "steps": steps})


@method(
    "draft-lv",
    title="DRaFT-LV",
    paper="Directly Fine-Tuning Diffusion Models on Differentiable Rewards",
    arxiv="2309.17400",
    year=2023,
    processes=("flow",),
    differs="draft-k through one step, averaged over fresh noisings of the sample at the last time.",
    proof=("renoised_gradient",),
)
def draft_lv(noises: Size = 2, steps: Size = 10, solver: str = "ddim") -> Recipe:
    return Recipe(DirectReward(renoised=noises), Groups(), sampler={"solver": solver, "steps": steps})


@method(
    "alignprop",
    title="AlignProp",
    paper="Aligning Text-to-Image Diffusion Models with Reward Backpropagation",
    arxiv="2310.03739",
    year=2023,
    processes=("flow",),
    differs="draft-k with a random number of steps for each row, up to all of them.",
    proof=("truncated_sum",),
)
def alignprop(least: int = 1, steps: Size = 10, solver: str = "ddim") -> Recipe:
    return Recipe(DirectReward(least, steps), Groups(), sampler={"solver": solver, "steps": steps})


@method(
    "spo",
    title="Step-aware Preference Optimization",
    paper="Step-aware Preference Optimization: Aligning Preference with Denoising Performance at Each Step",
    arxiv="2406.04314",
    year=2024,
    processes=("flow",),
    differs="At every step candidates of one state are judged; the best against the worst, by a logistic loss.",
    proof=("step_preference",),
)
def spo(
    beta: float = 10.0, candidates: int = 4, steps: Size = 10, eta: NotNegative = 1.0, go_on: str = "random"
) -> Recipe:
    pairing = Pairing("extremes", keys=("prompt", "origin"))
    planner = Candidates(size=candidates, steps=steps - 1, go_on=go_on)  # type: ignore[arg-type]
    law = ancestral(eta, steps)
    return Recipe(Pairs(Logistic(beta), pairing=pairing), planner, sampler=law)


@method(
    "diffusion-dpo",
    title="Diffusion-DPO, online",
    paper="Diffusion Model Alignment Using Direct Preference Optimization",
    arxiv="2311.12908",
    year=2023,
    processes=("flow",),
    differs="dpo with denoising errors at shared times and noises for log-densities, on pairs of one prompt's samples.",
    proof=("denoising_preference",),
)
def diffusion_dpo(beta: float = 2000.0, points: int = 4, steps: Size = 10, solver: str = "ddim") -> Recipe:
    noised = Noised(points, grid=True, shared=True)
    pairs = ForwardPairs(Logistic(beta), DenoisingScore("uniform"), Pairing("extremes"), noised=noised)
    return Recipe(pairs, Groups(), sampler={"solver": solver, "steps": steps})


@method(
    "diffusion-nft",
    title="DiffusionNFT",
    paper="DiffusionNFT: Online Diffusion Reinforcement with Forward Process",
    arxiv="2509.16117",
    year=2025,
    processes=("flow",),
    differs="Flow matching towards good samples and away from bad ones, around the sampler's own velocity.",
    proof=("negative_aware_minimum",),
)
def diffusion_nft(
    beta: float = 1.0, bound: float = 1.0, points: int = 4, steps: Size = 10, solver: str = "ddim"
) -> Recipe:
    term = NegativeAware(GroupCredit("mean", "std"), beta, bound, noised=Noised(points))
    return Recipe(term, Groups(), sampler={"solver": solver, "steps": steps})


@method(
    "awm",
    title="Advantage Weighted Matching",
    paper="Advantage Weighted Matching: Aligning RL with Pretraining in Diffusion Models",
    arxiv="2509.25050",
    year=2025,
    processes=("flow",),
    differs="A clipped policy loss in which flow matching's own error around a sample stands for its log-density.",
    proof=("weighted_matching",),
)
def awm(clip: float = 0.2, weight: str = "uniform", points: int = 4, steps: Size = 10, solver: str = "ddim") -> Recipe:
    credit = GroupCredit("mean", "std")
    term = ForwardPolicy(credit, Clip(clip, clip), weight, Noised(points))  # type: ignore[arg-type]
    return Recipe(term, Groups(), sampler={"solver": solver, "steps": steps})


@method(
    "ctrl",
    title="CTRL",
    paper="Adding Conditional Control to Diffusion Models with Reinforcement Learning",
    arxiv="2406.12120",
    year=2024,
    processes=("flow",),
    differs="REINFORCE on the reward less `kl` times the path's divergence: with many steps its optimum is the tilt.",
    proof=("gaussian_gradient", "path_divergence"),
)
def ctrl(kl: NotNegative = 0.1, level: NotNegative = 0.7, steps: Size = 10) -> Recipe:
    credit = GroupCredit("leave-one-out", reward=Outcome() + DivergencePenalty(kl))
    policy = Policy(credit, surrogate=Score(), reduction=Reduction("row-sum"))
    return Recipe(policy, Groups(), sampler=flow_sde(level, steps, "corrected"))


@method(
    "implicit-diffusion",
    title="Implicit Diffusion",
    paper="Implicit Diffusion: Efficient Optimization through Stochastic Sampling",
    arxiv="2402.05468",
    year=2024,
    processes=("flow",),
    differs="draft-k in one loop: each update moves all samples under way by a step, and learns from those that end.",
    proof=("adjoint_gradient",),
)
def implicit_diffusion(steps: Size = 10, solver: str = "ddim") -> Recipe:
    return Recipe(DirectReward(pinned=True), Queue(steps=steps), sampler={"solver": solver, "steps": steps})
