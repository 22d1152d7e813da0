"""How a run is carried out, whatever the method: how long, how fast, how often it is looked at and saved."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from stepwell.errors import InputError
from stepwell.meter import Budget
from stepwell.recipe import Recipe


@dataclass(frozen=True)
class Settings:
    """The settings of a run.

    steps: rollouts to make, or None to stop by the budget alone. prompts_per_step, group_size, epochs, minibatches:
    take the place of the method's own where given. schedule: the learning rate after `warmup` updates, over the
    whole run. tokens_per_microbatch: cuts every minibatch to fit memory, and changes nothing else. rows_at_once:
    likewise for rollouts. checkpoint_every: updates between checkpoints, 0 for none but the last; `keep` of them
    stay. evaluate_every: steps between evaluations, 0 for none.
    """

    steps: int | None = 100
    budget: Budget | None = None
    seed: int = 0
    learning_rate: float = 1e-6
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup: int = 0
    weight_decay: float = 0.0
    max_gradient_norm: float = 1.0
    prompts_per_step: int | None = None
    group_size: int | None = None
    epochs: int | None = None
    minibatches: int | None = None
    tokens_per_microbatch: int | None = None
    rows_at_once: int | None = None
    precision: Literal["fp32", "bf16"] = "fp32"
    shuffle: bool = True
    evaluate_every: int = 0
    evaluation_samples: int = 1
    checkpoint_every: int = 0
    keep: int = 2
    completions_logged: int = 4
    trackers: tuple[str, ...] = ()
    progress: bool = False

    def __post_init__(self) -> None:
        if self.steps is None and self.budget is None:
            raise InputError("A run needs steps or a budget to know when to stop; neither was given.")
        for name in ("prompts_per_step", "group_size", "epochs", "minibatches", "tokens_per_microbatch", "keep"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"Setting '{name}' is {value}; at least 1 is right.")
        for name in ("steps", "warmup", "weight_decay", "evaluate_every", "checkpoint_every"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise InputError(f"Setting '{name}' is {value}; 0 or more is right.")
        if not (self.learning_rate > 0 and math.isfinite(self.learning_rate)):
            raise InputError(f"The learning rate is {self.learning_rate}; a number above 0 is right.")
        for name, known in (("schedule", ("constant", "linear", "cosine")), ("precision", ("fp32", "bf16"))):
            if getattr(self, name) not in known:
                raise InputError(f"Setting '{name}' is '{getattr(self, name)}'; {', '.join(known)} are right.")

    def learning_rate_at(self, update: int, share: float) -> float:
        """The learning rate of an update (from 0), `share` of the run being over."""
        rate = self.learning_rate * min(1.0, (update + 1) / (self.warmup + 1))
        if self.schedule == "linear":
            rate *= max(0.0, 1.0 - share)
        elif self.schedule == "cosine":
            rate *= 0.5 * (1.0 + math.cos(math.pi * min(share, 1.0)))
        return rate

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "budget": None if self.budget is None else str(self.budget)}


def with_settings(recipe: Recipe, settings: Settings) -> Recipe:
    """The recipe with the settings' numbers in place of the method's own."""
    changes = {name: getattr(settings, name) for name in ("epochs", "minibatches")}
    sizes = {"prompts": settings.prompts_per_step, "size": settings.group_size}
    planner: Any = recipe.planner
    for name, value in sizes.items():
        if value is not None:
            if not hasattr(planner, name):
                raise InputError(f"The planner {type(planner).__name__} has no '{name}' to set.")
            planner = replace(planner, **{name: value})
    minibatches = settings.minibatches or recipe.minibatches
    if minibatches > getattr(planner, "prompts", minibatches):
        raise InputError(f"There are {minibatches} minibatches for {planner.prompts} prompts a step; at most one each.")
    return recipe.replace(planner=planner, **{name: value for name, value in changes.items() if value is not None})
