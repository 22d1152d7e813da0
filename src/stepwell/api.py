"""The few functions most users call, which take names and files where the rooms take objects."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from stepwell.data import load_prompts
from stepwell.errors import InputError, UnknownName
from stepwell.meter import Budget
from stepwell.methods import registry
from stepwell.process.base import Process
from stepwell.recipe import Recipe
from stepwell.reward.mixing import Rewards
from stepwell.train import loop
from stepwell.train.settings import Settings

if TYPE_CHECKING:
    from stepwell.compare.tasks import Task


def settings_from(**given: Any) -> Settings:
    """Settings by name; an unknown name is an error that names the nearest, and a budget may be text like `60s`."""
    for name in given:
        if name not in Settings.__dataclass_fields__:
            raise UnknownName("setting", name, Settings.__dataclass_fields__)
    if isinstance(given.get("budget"), str):
        given["budget"] = Budget.parse(given["budget"])
        given.setdefault("steps", None)
    return Settings(**given)


def train(
    process: Process,
    prompts: Any,
    reward: Callable[..., Any] | Sequence[Callable[..., Any]] | Rewards,
    method: str | Recipe = "grpo",
    *,
    options: Mapping[str, Any] | None = None,
    out: str | Path | None = None,
    evaluation: Any = None,
    on_step: Callable[[dict[str, Any]], None] | None = None,
    resume: bool = False,
    **settings: Any,
) -> loop.Run:
    """Train a process from rewards with a method, by id or as a recipe.

    `prompts` and `evaluation` are whatever `load_prompts` takes; `options` are the method's; every other keyword is a
    field of `Settings` (steps, budget, learning_rate, group_size, ...).

    Example:
        >>> import stepwell as sw
        >>> model = sw.exact.markov(symbols=3, length=3)
        >>> def shorter(completions, **columns):
        ...     return [-len(text) for text in completions]
        >>> run = train(model, [{"prompt": 0}], shorter, "rloo", steps=2, learning_rate=0.1)
        >>> run.steps
        2
    """
    given = settings_from(**settings)
    if not isinstance(getattr(process, "module", None), torch.nn.Module):
        raise InputError(f"What is trained is a process, such as language(FOLDER), not {process!r:.60}.")
    if bool(given.evaluate_every) != (evaluation is not None):
        raise InputError("Evaluation needs both `evaluation` (what on) and `evaluate_every` (how often).")
    if not isinstance(method, str | Recipe):
        raise InputError(f"A method is the id of one or a Recipe, not a {type(method).__name__}.")
    if options and isinstance(method, Recipe):
        raise InputError("Options belong to a method that is given by id; a recipe has them already.")
    recipe, config = method, {"method": "a recipe", "options": dict(options or {})}
    if isinstance(method, str):
        card = registry.get(method)
        recipe, config = card.recipe(**(options or {})), config | {"method": method, "card": card.as_dict()}
    assert isinstance(recipe, Recipe)
    rewards = reward if isinstance(reward, Rewards) else Rewards(reward)
    return loop.train(
        process,
        recipe,
        load_prompts(prompts),
        rewards,
        given,
        out=out,
        evaluation=None if evaluation is None else load_prompts(evaluation),
        on_step=on_step,
        resume=resume,
        config=config,
    )


def compare(task: Task | str, methods: str | Sequence[str], budget: str = "60s", **options: Any) -> Any:
    """Train each method from the same start at equal budget; see `stepwell.compare.run.compare`."""
    from stepwell.compare import run

    return run.compare(task, methods, budget=budget, **options)
