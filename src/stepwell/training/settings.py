"""The settings of a run, whatever the method: how long, how fast, how often it is evaluated and saved."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

from stepwell.errors import InputError
from stepwell.meter import Budget
from stepwell.parts import compares
from stepwell.ranges import Checked, Count, NotNegative, Positive, Range, Size, check_kinds
from stepwell.recipe.recipe import Recipe

Seed = Annotated[int, Range("a whole number of 64 bits", -(2**63), 2**64 - 1, whole=True)]
Norm = Annotated[float, Range("a number above 0", 0, above=True, endless=True)]


@dataclass(frozen=True)
class Settings(Checked):
    """The settings of a run.

    steps: rollouts to make, or None to stop by the budget alone. prompts_per_step, group_size, epochs, minibatches:
    take the place of the method's own where given. schedule: the learning rate after `warmup` updates, over the
    whole run. tokens_per_microbatch: cuts every minibatch to fit memory, and changes nothing else. rows_at_once:
    cuts rollouts, which changes the random numbers that a row gets, but not its distribution. checkpoint_every:
    updates between checkpoints, checkpoint_seconds: seconds between them, 0 for none but the first and the last; the
    newest `keep` of them stay. evaluate_every: steps between evaluations, 0 for none.

    Raises `InputError` for a number out of its range and for a run that would never stop.
    """

    steps: Count | None = 100
    budget: Budget | None = None
    seed: Seed = 0
    learning_rate: Positive = 1e-6
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup: Count = 0
    weight_decay: NotNegative = 0.0
    max_gradient_norm: Norm = 1.0
    prompts_per_step: Size | None = None
    group_size: Size | None = None
    epochs: Size | None = None
    minibatches: Size | None = None
    tokens_per_microbatch: Size | None = None
    rows_at_once: Size | None = None
    precision: Literal["fp32", "bf16"] = "fp32"
    shuffle: bool = True
    evaluate_every: Count = 0
    evaluation_samples: Size = 1
    checkpoint_every: Count = 0
    checkpoint_seconds: NotNegative = 300.0
    keep: Size = 2
    completions_logged: Count = 4
    trackers: tuple[str, ...] = ()
    progress: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_kinds(type(self), {name: getattr(self, name) for name in ("shuffle", "progress")}, "Settings.")
        if not isinstance(self.budget, Budget | None):
            raise InputError(f"Settings.budget must be text such as 60s, or a Budget, got {self.budget!r:.60}.")
        if not isinstance(self.trackers, list | tuple):
            raise InputError(f"Settings.trackers must be a list of names, got {self.trackers!r:.60}.")
        if self.steps is None and self.budget is None:
            raise InputError("Settings.steps must be a number where there is no budget, got None.")

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
    """The recipe with the settings' numbers in place of the method's own.

    Raises `InputError` for numbers that do not fit the method: more minibatches than prompts, a group of one where
    the samples of a prompt are compared, a number that the planner does not have.
    """
    planner = recipe.planner.resized(settings.prompts_per_step, settings.group_size)
    changes = {name: getattr(settings, name) for name in ("epochs", "minibatches")}
    minibatches = settings.minibatches or recipe.minibatches
    if planner.prompts is not None and minibatches > planner.prompts:
        raise InputError(
            f"Settings.minibatches must be at most the {planner.prompts} prompts of a step, got {minibatches}."
        )
    comparing = compares(recipe.whole.terms)
    if planner.size == 1 and comparing:
        raise InputError(
            f"Settings.group_size must be at least 2 for {comparing[0]}, which compares the samples of a prompt, got 1."
        )
    return recipe.replace(planner=planner, **{name: value for name, value in changes.items() if value is not None})
