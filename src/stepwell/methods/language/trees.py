"""Methods whose credit is measured by rows that part: trees of answers, and vines drawn from a row's states."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from stepwell.credit.prefixes import PrefixValues, SegmentAdvantages, Subtrees
from stepwell.credit.traces import Whitened
from stepwell.objective.policy import Policy
from stepwell.objective.reduction import Reduction
from stepwell.objective.surrogate import Clip
from stepwell.planning.measured import Vines
from stepwell.planning.trees import SegmentTree
from stepwell.ranges import Size
from stepwell.recipe.recipe import Recipe
from stepwell.recipe.registry import method


@method(
    "treepo",
    title="TreePO",
    paper="TreePO: Bridging the Gap of Policy Optimization and Efficacy and Inference Efficiency with Heuristic "
    "Tree-based Modeling",
    arxiv="2508.17445",
    year=2025,
    catalogue=398,
    differs="Rows part after each segment; a segment earns its leaves' mean less its siblings'.",
    when="For long answers: comparing continuations of one beginning says which segment was good.",
    note="Published: a leaf earns its mean advance over its ancestors' leaves, whitened over tokens. Before that, "
    "with two rows from each state and two segments, the first trains with 0.250 and the second with 0.625 of its "
    "policy gradient; corrected, both with all of it. The authors' segments have 512 tokens.",
    proof=("tree_gradient", "tree_without_branches"),
)
def treepo(
    segment: int = 32,
    branching: int = 2,
    depth: Size = 3,
    low: float = 0.2,
    high: float = 0.28,
    dual: float = 10.0,
    variant: Literal["corrected", "published"] = "corrected",
) -> Recipe:
    tree = SegmentTree(size=branching**depth, branching=branching, segment=segment)
    advantages = SegmentAdvantages(segment)
    policy = Policy(advantages, surrogate=Clip(low, high, dual), reduction=Reduction("row-sum"))
    if variant == "published":
        policy = replace(policy, credit_of=Whitened(Subtrees(segment, depth)), reduction=Reduction())
    return Recipe(policy, tree)


@method(
    "vineppo",
    title="VinePPO",
    paper="VinePPO: Refining Credit Assignment in RL Training of LLMs",
    arxiv="2410.01679",
    year=2024,
    differs="ppo whose values are measured: rows drawn from the state before each segment say what it is worth.",
    when="When credit within an answer matters more than the cost of drawing: values are measured, not learned.",
    note="The paper's steps are those of the reasoning; here a segment has a number of tokens.",
    proof=("vine_gradient",),
)
def vineppo(segment: int = 32, vines: int = 4, clip: float = 0.2) -> Recipe:
    policy = Policy(PrefixValues(), surrogate=Clip(clip, clip), reduction=Reduction("fixed"))
    return Recipe(policy, Vines(segment=segment, vines=vines))
