"""Methods whose loss noises finished samples anew, so that any solver may draw them."""

from __future__ import annotations

from stepwell.credit.group import GroupCredit
from stepwell.objective.flow.forward import DenoisingScore, ForwardPairs, ForwardPolicy, NegativeAware, Noised
from stepwell.objective.preference.pairs import Logistic, Pairing
from stepwell.objective.surrogate import Clip
from stepwell.planning.groups import Groups
from stepwell.ranges import Size
from stepwell.recipe.recipe import Recipe
from stepwell.recipe.registry import method


@method(
    "diffusion-dpo",
    title="Diffusion-DPO, online",
    paper="Diffusion Model Alignment Using Direct Preference Optimization",
    arxiv="2311.12908",
    year=2023,
    processes=("flow",),
    differs="dpo with denoising errors at shared times and noises for log-densities, on pairs of one prompt's samples.",
    when="When rewards order samples better than they measure them; any solver may draw the samples.",
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
    when="When any solver should draw the samples, and no log-densities of steps are wanted.",
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
    when="When any solver should draw the samples, and the loss should stay near that of pretraining.",
    proof=("weighted_matching",),
)
def awm(clip: float = 0.2, weight: str = "uniform", points: int = 4, steps: Size = 10, solver: str = "ddim") -> Recipe:
    credit = GroupCredit("mean", "std")
    term = ForwardPolicy(credit, Clip(clip, clip), weight, Noised(points))  # type: ignore[arg-type]
    return Recipe(term, Groups(), sampler={"solver": solver, "steps": steps})
