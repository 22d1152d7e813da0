"""The start of a task as a model: `stepwell sample --task NAME`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stepwell.cli.processes.base import Kind
from stepwell.cli.processes.options import WeightsOptions, load_weights
from stepwell.cli.processes.solver import SolverOptions, drawn_with

if TYPE_CHECKING:
    from stepwell.process.base import Process


class TaskStart(Kind):
    """The process that a task starts from."""

    name = "task"
    called = "a task"
    uses = (SolverOptions, WeightsOptions, "solver_steps")

    def build(self, model: str, command: Any, lora: Any = None) -> Process:
        process = command.built_task().process()
        if command.start.weights is not None:
            load_weights(process, command.start.weights)
        return drawn_with(process, command.sampler_settings())
