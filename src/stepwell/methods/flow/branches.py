"""Policy gradients on some steps of a flow: in windows, on branches of one state, and on trees."""

from __future__ import annotations

from typing import Any

from stepwell.credit.branches import BranchExtremes, Pooled, TreeCredit
from stepwell.credit.group import GroupCredit
from stepwell.credit.shaping import Bounded
from stepwell.methods.flow.samplers import ancestral, check_steps, flow_sde
from stepwell.methods.flow.variants import FIRST, RATIO, WINDOW, clipped, near
from stepwell.objective.flow.gaussian import NoiseAware
from stepwell.objective.preference.pairs import Logistic, Pairing, Pairs
from stepwell.objective.reduction import Reduction
from stepwell.planning.branches import Branches, Candidates, Tree
from stepwell.planning.windows import Backward, Tail, Windows
from stepwell.ranges import NotNegative, Share, Size
from stepwell.recipe.recipe import Recipe
from stepwell.recipe.registry import method


@method(
    "mix-grpo",
    title="MixGRPO",
    paper="MixGRPO: Unlocking Flow-based GRPO Efficiency with Mixed ODE-SDE",
    arxiv="2507.21802",
    year=2025,
    catalogue=256,
    processes=("flow",),
    differs="flow-grpo in a window that moves from noise to data; `flash` finishes by DPM-Solver++ in fewer steps.",
    when="When flow-grpo is too slow: only a window of steps is random, and trained.",
    note=f"As published, {RATIO}; {FIRST}; {WINDOW}.",
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
    catalogue=267,
    processes=("flow",),
    differs="Each step is judged by children that part there and nowhere else; steps weigh by the noise they draw.",
    when="When each step should be judged by itself, at the price of more rollouts.",
    note=f"As published, {RATIO}; {FIRST}.",
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
    catalogue=30,
    processes=("flow",),
    differs="One random step a row, judged at several strides of what follows; their standardised rewards add up.",
    when="When one reward for all steps is too coarse, and the early steps matter most.",
    note=f"As published, {RATIO}; {FIRST}.",
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
    "dynamic-treerpo",
    title="Dynamic-TreeRPO",
    paper="Dynamic-TreeRPO: Breaking the Independent Trajectory Bottleneck with Structured Sampling",
    arxiv="2509.23352",
    year=2025,
    catalogue=255,
    processes=("flow",),
    differs="A tree of random steps in a sliding window; each step earns its leaves' mean less its siblings'.",
    when="When rollouts are the cost: the leaves of a tree share their first steps.",
    note=f"As published, {RATIO}; {FIRST}.",
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
    catalogue=26,
    processes=("flow",),
    differs="ddpo-is on the last steps first, a part that grows; only each state's best and worst branches count.",
    when="When rewards are sparse: the last steps are learned first, by comparing branches of one state.",
    note=f"As published, {RATIO}.",
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
    "spo",
    title="Step-aware Preference Optimization",
    paper="Step-aware Preference Optimization: Aligning Preference with Denoising Performance at Each Step",
    arxiv="2406.04314",
    year=2024,
    catalogue=47,
    processes=("flow",),
    differs="At every step candidates of one state are judged; the best against the worst, by a logistic loss.",
    when="When samples can be compared at every step, by what each would become.",
    proof=("step_preference",),
)
def spo(
    beta: float = 10.0, candidates: int = 4, steps: Size = 10, eta: NotNegative = 1.0, go_on: str = "random"
) -> Recipe:
    pairing = Pairing("extremes", keys=("prompt", "origin"))
    planner = Candidates(size=candidates, steps=steps - 1, go_on=go_on)  # type: ignore[arg-type]
    return Recipe(Pairs(Logistic(beta), pairing=pairing), planner, sampler=ancestral(eta, steps))
