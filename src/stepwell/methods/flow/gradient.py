"""Methods that follow the gradient of a differentiable reward through the sampler."""

from __future__ import annotations

from stepwell.objective.flow.forward import DirectReward
from stepwell.planning.groups import Groups
from stepwell.planning.queue import Queue
from stepwell.ranges import Size
from stepwell.recipe.recipe import Recipe
from stepwell.recipe.registry import method


@method(
    "draft-k",
    title="DRaFT-K",
    paper="Directly Fine-Tuning Diffusion Models on Differentiable Rewards",
    arxiv="2309.17400",
    year=2023,
    catalogue=233,
    processes=("flow",),
    differs="The reward's own gradient, through the last `depth` steps of the sampler; 0 is all of them.",
    when="When the reward is differentiable and memory is short: gradients pass the last steps only.",
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
    catalogue=233,
    processes=("flow",),
    differs="draft-k through one step, averaged over fresh noisings of the sample at the last time.",
    when="As draft-k with one step, when its gradient is too noisy.",
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
    when="When the reward is differentiable and early steps have to learn too.",
    proof=("truncated_sum",),
)
def alignprop(least: int = 1, steps: Size = 10, solver: str = "ddim") -> Recipe:
    return Recipe(DirectReward(least, steps), Groups(), sampler={"solver": solver, "steps": steps})


@method(
    "implicit-diffusion",
    title="Implicit Diffusion",
    paper="Implicit Diffusion: Efficient Optimization through Stochastic Sampling",
    arxiv="2402.05468",
    year=2024,
    catalogue=108,
    processes=("flow",),
    differs="draft-k in one loop: each update moves all samples under way by a step, and learns from those that end.",
    when="When the reward is differentiable and whole rollouts between updates take too long.",
    proof=("adjoint_gradient",),
)
def implicit_diffusion(steps: Size = 10, solver: str = "ddim") -> Recipe:
    return Recipe(DirectReward(pinned=True), Queue(steps=steps), sampler={"solver": solver, "steps": steps})
