"""Needs of a recipe beside a model and prompts, read off its parts: no card lists them by hand."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from stepwell.batch import Read
from stepwell.credit.columns import RewardColumn
from stepwell.parts import Node, compares, parts_of
from stepwell.planning.demonstrations import Demonstrated
from stepwell.planning.hints import Hinted
from stepwell.planning.measured import WithGreedy
from stepwell.recipe.recipe import DIFFERENTIATED, Recipe


@dataclass(frozen=True)
class Need:
    """One need in words, and the arguments of `stepwell train` that meet it, where any do."""

    words: str
    arguments: str = ""


def needs_of(recipe: Recipe) -> Iterator[Need]:
    """Everything that a run of this recipe needs, in the order of what a user has to provide.

    Example:
        >>> from stepwell.objective.policy import Policy
        >>> from stepwell.planning.demonstrations import Demonstrated
        >>> [need.words for need in needs_of(Recipe(Policy(), Demonstrated()))]
        ["a column 'demonstration' in the data, filled in every row", 'at least 2 samples a prompt']
    """
    objective, planner = recipe.whole, recipe.planner
    nodes = [part for part in parts_of(objective.terms) if isinstance(part, Node)]
    rewards = 1 + max((part.column for part in nodes if isinstance(part, RewardColumn)), default=0)
    if any(read.of == "teacher" for read in objective.reads):
        yield Need("a teacher, a second model with the same vocabulary", "--teacher DIR_OR_ID")
    if isinstance(planner, Demonstrated):
        yield Need(f"a column '{planner.column}' in the data, filled in every row")
    if isinstance(planner, Hinted):
        yield Need(f"a column '{planner.column}' in the data, for the prompts that have a hint")
    if rewards > 1:
        yield Need(f"{rewards} reward functions", " ".join(f"--reward my.py:reward_{n}" for n in range(2, rewards + 1)))
    if objective.needs & DIFFERENTIATED or recipe.guide is not None:
        yield Need("a reward that is differentiable in the sample")
    if compares(objective.terms):
        yield Need("at least 2 samples a prompt")
    if isinstance(planner, WithGreedy):
        yield Need("a process that can take its likeliest step")
    if Read("rows", "segment") in objective.reads:
        yield Need("rows in segments: sentences, unless the process marks its own")
    if "kl" in objective.needs or any(read.of == "reference" for read in objective.reads):
        every = "step" if recipe.sync_every == 1 else f"{recipe.sync_every} steps"
        kept = "as training began" if recipe.reference == "start" else f"renewed every {every}"
        yield Need(f"memory for a reference, a frozen copy of the policy {kept}")
    if "value" in objective.needs or Read("policy", "value") in objective.reads:
        yield Need("memory for a value head, which is added to the model and trained with it")
    if "logits" in objective.needs | objective.present or Read("teacher", "logits") in objective.reads:
        yield Need("memory for the logits of every trained step")
    if recipe.epochs > 1 or recipe.minibatches > 1:
        passes = "one pass" if recipe.epochs == 1 else f"{recipe.epochs} passes"
        updates = "one update" if recipe.minibatches == 1 else f"{recipe.minibatches} updates"
        yield Need(f"{passes} over each rollout, in {updates} a pass")
