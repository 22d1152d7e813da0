"""How a run is carried out, whatever the method: how long, how fast, how often it is looked at and saved."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, replace
from numbers import Integral, Real
from typing import Any, Literal

from stepwell.errors import InputError
from stepwell.meter import Budget
from stepwell.parts import parts_of
from stepwell.recipe.recipe import Recipe

FROM_0 = ("steps", "warmup", "evaluate_every", "checkpoint_every", "completions_logged")
SIZES = ("prompts_per_step", "group_size", "epochs", "minibatches")
FROM_1 = (*SIZES, "tokens_per_microbatch", "rows_at_once", "evaluation_samples", "keep")
"""The settings that are whole numbers, by the least they may be; the seed has no least."""


@dataclass(frozen=True)
class Settings:
    """The settings of a run.

    steps: rollouts to make, or None to stop by the budget alone. prompts_per_step, group_size, epochs, minibatches:
    take the place of the method's own where given. schedule: the learning rate after `warmup` updates, over the
    whole run. tokens_per_microbatch: cuts every minibatch to fit memory, and changes nothing else. rows_at_once:
    cuts rollouts, which changes the random numbers that a row gets, and not their law. checkpoint_every: updates
    between checkpoints, 0 for none but the last; `keep` of them stay. evaluate_every: steps between evaluations, 0 for
    none.
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
        self._refuse_other_than_numbers()
        for names, least, words in ((FROM_1, 1, "at least 1"), (FROM_0, 0, "0 or more")):
            for name in names:
                value = getattr(self, name)
                if value is not None and value < least:
                    raise InputError(f"Setting '{name}' is {value}; {words} is right.")
        if not -(2**63) <= self.seed < 2**64:
            raise InputError(f"Setting 'seed' is {self.seed}; a number of 64 bits is right.")
        if not (self.learning_rate > 0 and math.isfinite(self.learning_rate)):
            raise InputError(f"The learning rate is {self.learning_rate}; a number above 0 is right.")
        if not (self.weight_decay >= 0 and math.isfinite(self.weight_decay)):
            raise InputError(f"Setting 'weight_decay' is {self.weight_decay}; 0 or more is right.")
        if not self.max_gradient_norm > 0:
            raise InputError(f"Setting 'max_gradient_norm' is {self.max_gradient_norm}; above 0 is right.")
        if not isinstance(self.budget, Budget | None):
            raise InputError(f"Setting 'budget' is {self.budget!r}; text such as 60s, or a Budget, is right.")
        if not isinstance(self.trackers, list | tuple):
            raise InputError(f"Setting 'trackers' is {self.trackers!r}; a list of names is right.")
        for name, known in (("schedule", ("constant", "linear", "cosine")), ("precision", ("fp32", "bf16"))):
            if getattr(self, name) not in known:
                raise InputError(f"Setting '{name}' is '{getattr(self, name)}'; {', '.join(known)} are right.")

    def _refuse_other_than_numbers(self) -> None:
        """Settings come from code and from name=value as well, where no command line has looked at their type."""
        optional = {entry.name for entry in fields(self) if entry.default is None} | {"steps"}
        whole = dict.fromkeys((*FROM_0, *FROM_1, "seed"), (Integral, "whole number"))
        others = dict.fromkeys(("learning_rate", "weight_decay", "max_gradient_norm"), (Real, "number"))
        for name, (kind, words) in {**whole, **others}.items():
            value = getattr(self, name)
            if (value is not None or name not in optional) and (isinstance(value, bool) or not isinstance(value, kind)):
                raise InputError(f"Setting '{name}' is {value!r}; a {words} is right.")

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
    comparing = [type(part).__name__ for part in parts_of(recipe.whole.terms) if getattr(part, "compares", False)]
    if getattr(planner, "size", None) == 1 and comparing:
        raise InputError(
            f"The group size is 1, but {comparing[0]} compares the samples of a prompt; at least 2 are right."
        )
    return recipe.replace(planner=planner, **{name: value for name, value in changes.items() if value is not None})
