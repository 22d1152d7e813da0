"""Stepwell: sample, steer and train anything that makes its sample one random step at a time."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Public names by the module they come from; each is imported when it is first asked for, so that `import stepwell`
# costs nothing.
_HOMES = {
    "Rng": "stepwell.rng",
    "Replay": "stepwell.rng",
    "Meter": "stepwell.meter",
    "Budget": "stepwell.meter",
    "StepwellError": "stepwell.errors",
    "Request": "stepwell.sampling.request",
    "Prompt": "stepwell.sampling.request",
    "rollout": "stepwell.sampling.rollout",
    "Recipe": "stepwell.recipe.recipe",
    "Rewards": "stepwell.reward.mixing",
    "load_prompts": "stepwell.data.prompts",
    "language": "stepwell.process.language.process",
    "flow": "stepwell.process.flow.process",
    "pipeline": "stepwell.process.pipeline.build",
    "environment_return": "stepwell.process.conversation",
    "sample": "stepwell.api",
    "solvers": "stepwell.api",
    "method": "stepwell.recipe.registry",
    "task": "stepwell.tasks.registry",
    "train": "stepwell.api",
    "compare": "stepwell.api",
}
_ROOMS = {"exact": "stepwell.process.exact", "check": "stepwell.check", "methods": "stepwell.methods"}

if TYPE_CHECKING:
    from stepwell import check as check
    from stepwell import methods as methods
    from stepwell.api import compare as compare
    from stepwell.api import sample as sample
    from stepwell.api import solvers as solvers
    from stepwell.api import train as train
    from stepwell.data.prompts import load_prompts as load_prompts
    from stepwell.errors import StepwellError as StepwellError
    from stepwell.meter import Budget as Budget
    from stepwell.meter import Meter as Meter
    from stepwell.process import exact as exact
    from stepwell.process.conversation import environment_return as environment_return
    from stepwell.process.flow.process import flow as flow
    from stepwell.process.language.process import language as language
    from stepwell.process.pipeline.build import pipeline as pipeline
    from stepwell.recipe.recipe import Recipe as Recipe
    from stepwell.recipe.registry import method as method
    from stepwell.reward.mixing import Rewards as Rewards
    from stepwell.rng import Replay as Replay
    from stepwell.rng import Rng as Rng
    from stepwell.sampling.request import Prompt as Prompt
    from stepwell.sampling.request import Request as Request
    from stepwell.sampling.rollout import rollout as rollout

__all__ = sorted([*_HOMES, *_ROOMS])


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(_ROOMS[name])
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"stepwell has no '{name}'; it offers {', '.join(__all__)}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
