"""Models of a user's own: `--model` names a function in a file, f(x, t) or one that returns a process."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepwell.cli.processes.base import Kind, flag
from stepwell.cli.processes.options import Text, WeightsOptions, Wholes, load_weights
from stepwell.cli.processes.solver import SolverOptions, drawn_with
from stepwell.errors import InputError

if TYPE_CHECKING:
    from stepwell.process.base import Process


@dataclass(kw_only=True)
class FunctionOptions:
    """A function f(x, t) in a file of your own, as the model of a flow."""

    shape: Wholes = ()  # the sizes of one sample; needed where --model is such a function
    path: Text = None  # from data to noise; linear unless given
    predicts: Text = None  # velocity, noise, data or score; velocity unless given
    encode: Text = None  # the keyword under which f takes prompts, which are whole numbers; none unless given


class OwnModel(Kind):
    """A function of a user's file."""

    name = "own"
    called = "a model of your own"
    uses = (FunctionOptions, SolverOptions, WeightsOptions, "solver_steps")

    def is_named_by(self, model: str) -> bool:
        if not Path(model).exists():
            if model.endswith(".py"):
                raise InputError(f"There is no file '{model}'; a model of your own is written as my.py:NAME.")
            return ":" in model
        if model.endswith(".py"):
            raise InputError(f"--model must name a function in its file, as {model}:NAME, got the file '{model}'.")
        return False

    def build(self, model: str, command: Any, lora: Any = None) -> Process:
        from torch import nn

        from stepwell.process.base import Process
        from stepwell.process.flow.build import flow
        from stepwell.reward.loading import load_function

        function, options, settings = load_function(model, "model"), command.function, command.sampler_settings()
        if options.shape:
            if min(options.shape) < 1:
                raise InputError(f"--shape must be sizes of at least 1, got {' '.join(map(str, options.shape))}.")
            _check_called(model, function, [options.encode] if options.encode else [])
            chosen = {"path": options.path, "predicts": options.predicts, "encode": options.encode}
            chosen = {name: value for name, value in chosen.items() if value is not None}
            level = {name: settings.pop(name) for name in ("level",) if name in settings}
            return _ready(flow(function, options.shape, **chosen, **settings), command, level)
        for name in ("path", "predicts", "encode"):
            if getattr(options, name) is not None:
                raise InputError(f"{flag(name)} needs --shape: it describes a function f(x, t) of your own.")
        if isinstance(function, nn.Module) or not takes(function):
            raise InputError(
                f"'{model}' must take no arguments and return a process; for a function f(x, t) give the --shape of a "
                "sample."
            )
        made = function()
        if not isinstance(made, Process):
            raise InputError(
                f"'{model}' must return a process, such as flow(f, shape=(2,)), got a value of type "
                f"{type(made).__name__}."
            )
        return _ready(made, command, settings)


def _ready(process: Process, command: Any, settings: dict[str, Any]) -> Process:
    """The process with the weights and the sampler's settings that were asked for."""
    if command.start.weights is not None:
        load_weights(process, command.start.weights)
    return drawn_with(process, settings)


def takes(function: Any, *arguments: Any, **keywords: Any) -> bool:
    """True for a function that can be called with these arguments."""
    try:
        inspect.signature(function).bind(*arguments, **keywords)
    except TypeError:
        return False
    except ValueError:  # some functions written in C have no signature
        return True
    return True


def _check_called(address: str, function: Any, keywords: list[str]) -> None:
    called = getattr(function, "forward", function)
    if not takes(called, None, None, **dict.fromkeys(keywords)):
        wanted = ", ".join(["x", "t", *keywords])
        raise InputError(f"'{address}' must be called as f({wanted}), got a function of {inspect.signature(called)}.")
