"""Pipelines of `diffusers`: `--model` names a folder with a model_index.json, or an id of the hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepwell.cli.processes.base import Kind
from stepwell.cli.processes.language import quieten_transformers
from stepwell.cli.processes.options import AdapterOptions, LoadingOptions, Text, Whole
from stepwell.cli.processes.solver import SolverOptions, drawn_with

if TYPE_CHECKING:
    from stepwell.process.base import Process


@dataclass(kw_only=True)
class ImageOptions:
    """The images that a pipeline draws."""

    height: Whole = None  # in pixels; the pipeline's own size unless given
    width: Whole = None  # in pixels; the pipeline's own size unless given
    negative_prompt: Text = None  # the prompt that guidance moves away from; the empty one unless given


class Pipeline(Kind):
    """A pipeline of `diffusers`."""

    name = "pipeline"
    called = "a pipeline"
    uses = (ImageOptions, SolverOptions, LoadingOptions, AdapterOptions, "solver_steps")
    process = "flow"
    on_hub = True

    def is_named_by(self, model: str) -> bool:
        return (Path(model) / "model_index.json").is_file()

    def build(self, model: str, command: Any, lora: Any = None) -> Process:
        from stepwell.process.pipeline.build import pipeline

        quieten_transformers()
        settings = command.sampler_settings()
        level = {name: settings.pop(name) for name in ("level",) if name in settings}
        made = pipeline(model, lora=lora, **vars(command.image), **vars(command.loading), **settings)
        return drawn_with(made, level)
