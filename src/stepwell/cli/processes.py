"""From a command's words to the process it works on: a language model, a pipeline, or a model of one's own."""

from __future__ import annotations

import inspect
import json
import types
import typing
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from stepwell.errors import InputError, UnknownName

if TYPE_CHECKING:
    from stepwell.solver.table import Table

Kind = Literal["language", "pipeline", "own", "task"]
LAW = ("solver", "level", "steps", "times", "shift", "guidance")
"""How a flow is drawn; among the arguments of `train`, `steps` is called `solver_steps`."""
_LAW = {*LAW, "solver_steps"} - {"steps"}
_LOADING = {"dtype", "device"}
_ADAPTER = {"lora_rank", "lora_alpha", "lora_targets", "lora"}
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "max_new_tokens")
TURNS = {"max_turns": "max_turns", "turn_role": "role", "turn_stop": "stop"}
"""The arguments about conversations, which need an environment, and what `Turns` calls them."""
USED: Mapping[Kind, set[str]] = {
    "language": {*SAMPLING, "system", "compile", "environment", *TURNS} | _LOADING | _ADAPTER,
    "pipeline": {"height", "width", "negative_prompt"} | _LAW | _LOADING | _ADAPTER,
    "own": {"shape", "path", "predicts", "encode", "weights"} | _LAW,
    "task": {"weights"} | _LAW,
}
_CALLED = {"language": "a language model", "pipeline": "a pipeline", "own": "a model of your own", "task": "a task"}


@dataclass(kw_only=True)
class FlowOptions:
    """How a flow is drawn, and what a function of one's own is."""

    solver: str | None = None  # of a flow: a name, see `stepwell solvers`, or your own in a .json file
    level: float | None = None  # the noise level of the solver
    times: tuple[float, ...] = ()  # the grid itself, from 1 (noise) to 0 (data), in place of steps and shift
    shift: float | None = None  # the factor of the time shift; above 1 for more steps near noise
    guidance: float | None = None  # the scale of classifier-free guidance; 1 for none
    negative_prompt: str | None = None  # of a pipeline: what guidance compares with
    height: int | None = None  # of a pipeline's images, in pixels
    width: int | None = None  # of a pipeline's images, in pixels
    shape: tuple[int, ...] = ()  # of one sample, where --model is f(x, t) in a file of yours
    path: str | None = None  # from data to noise, for such a function; linear unless given
    predicts: str | None = None  # what it returns: velocity, noise, data or score; velocity unless given
    encode: str | None = None  # the keyword under which it is told prompts, which are whole numbers
    weights: str | None = None  # of a model of your own: the folder of an earlier run, or its model.safetensors

    def law(self, steps: int | None) -> dict[str, Any]:
        """The settings of the law that were given; raises `InputError` for a grid that is given twice."""
        if self.times and (steps is not None or self.shift is not None):
            raise InputError("The grid is given by --times already; leave the number of steps and --shift out.")
        given: dict[str, Any] = {"level": self.level, "steps": steps, "shift": self.shift, "guidance": self.guidance}
        given |= {"times": self.times or None, "solver": None if self.solver is None else solver_from(self.solver)}
        return {name: value for name, value in given.items() if value is not None}


def kind_of(model: str) -> Kind:
    """What --model names: `file.py:name`, the folder of a pipeline of diffusers, or else a language model."""
    if not Path(model).exists():
        if ":" in model:
            return "own"
        if model.endswith(".py"):
            raise InputError(f"There is no file '{model}'; a model of your own is written as my.py:NAME.")
    if model.endswith(".py"):
        raise InputError(f"--model is the file '{model}'; say which function in it, as {model}:NAME.")
    return "pipeline" if (Path(model) / "model_index.json").is_file() else "language"


def refuse_unused(command: Any, kind: Kind) -> None:
    """Raise `InputError` for an argument that was given and means nothing for this kind of process."""
    known = {name for names in USED.values() for name in names}
    given = [(entry, getattr(group, entry.name)) for group in (command, command.flow) for entry in fields(group)]
    for entry, value in given:
        if entry.name in known - USED[kind] and value != entry.default:
            flag = f"--{entry.name.replace('_', '-')}"
            raise InputError(f"{flag} has no meaning for {_CALLED[kind]}; leave it out.")
        if entry.name in TURNS and value != entry.default and command.environment is None:
            flag = f"--{entry.name.replace('_', '-')}"
            raise InputError(f"{flag} is about conversations; name what is talked to with --environment as well.")


def environment_from(address: str) -> Any:
    """The class or function of a user's file that makes environments; it is called without arguments."""
    from stepwell.reward.loading import load_function

    found = load_function(address, "environment", classes=True)
    if not _takes(found):
        raise InputError(
            f"'{address}' takes the arguments {inspect.signature(found)}; environments are made by a class or a "
            "function that needs none."
        )
    return found


def own_process(address: str, options: FlowOptions, law: Mapping[str, Any]) -> Any:
    """The process of a user's file: of f(x, t) with --shape, else what a function without arguments returns."""
    from torch import nn

    from stepwell.process.base import Process
    from stepwell.process.flow.process import flow
    from stepwell.reward.loading import load_function

    found = load_function(address, "model")
    if options.shape:
        if min(options.shape) < 1:
            raise InputError(f"The shape of a sample is {options.shape}; every size is at least 1.")
        _check_called(address, found, [options.encode] if options.encode else [])
        given = {"path": options.path, "predicts": options.predicts, "encode": options.encode}
        chosen: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        chosen |= {name: value for name, value in law.items() if name != "level"}
        made = flow(found, options.shape, **chosen)
        return ready(made, options, {"level": law["level"]} if "level" in law else {})
    for name in ("path", "predicts", "encode"):
        if getattr(options, name) is not None:
            raise InputError(f"--{name} describes a function f(x, t) of your own; give its --shape as well.")
    if isinstance(found, nn.Module) or not _takes(found):
        raise InputError(
            f"'{address}' takes arguments; give the --shape of a sample if it is f(x, t), or name a function that "
            "takes none and returns a process."
        )
    made = found()
    if not isinstance(made, Process):
        raise InputError(
            f"'{address}' returned {type(made).__name__}; a process, such as flow(f, shape=(2,)), is right."
        )
    return ready(made, options, law)


def ready(process: Any, options: FlowOptions, law: Mapping[str, Any]) -> Any:
    """The process with the weights and the law that were asked for."""
    if options.weights is not None:
        load_weights(process, options.weights)
    return with_sampler(process, law)


def pipeline_process(model: str, command: Any, law: Mapping[str, Any], lora: Any) -> Any:
    """A pipeline of diffusers, with what was said of its images and of how they are drawn."""
    from stepwell.process.pipeline.build import pipeline

    given = {name: getattr(command.flow, name) for name in ("height", "width", "negative_prompt")}
    given |= {"dtype": command.dtype, "device": command.device}
    first = {name: value for name, value in law.items() if name != "level"}
    made = pipeline(model, lora=lora, **given, **first)
    return with_sampler(made, {"level": law["level"]} if "level" in law else {})


def with_sampler(process: Any, law: Mapping[str, Any]) -> Any:
    """The process drawn from otherwise, where anything was asked for."""
    from stepwell.process.abilities import Redrawn, ability

    return ability(process, Redrawn, "A solver").with_sampler(**law) if law else process


def load_weights(process: Any, file: str) -> None:
    """Put the weights of a run (a `model.safetensors`, or the run's folder) into the process's network."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(file) / "model.safetensors" if Path(file).is_dir() else Path(file)
    try:
        process.module.load_state_dict(load_file(path))
    except (OSError, SafetensorError) as error:
        raise InputError(f"There are no weights in '{path}': {' '.join(str(error).split())}.") from error
    except RuntimeError as error:
        said = " ".join(str(error).split())
        raise InputError(f"The weights in '{path}' are those of another network: {said:.160}.") from error


def solver_from(word: str) -> Table:
    """A solver by name, or from a .json file as `stepwell solvers NAME --save FILE` writes it.

    Raises `InputError` for a file that is not there or is no JSON, and for a setting that is unknown or of the wrong
    type, or that contradicts another.
    """
    from stepwell.solver.table import Table, table

    if not word.endswith(".json"):
        return table(word)
    try:
        entries = json.loads(Path(word).expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"The solver '{word}' cannot be read: {error.strerror or error}.") from error
    except ValueError as error:
        raise InputError(
            f"The solver '{word}' is no JSON ({error}); `stepwell solvers NAME --save` writes it."
        ) from error
    if not isinstance(entries, dict) or not isinstance(entries.get("name"), str):
        raise InputError(f"The solver '{word}' is no object with a name; `stepwell solvers NAME --save` writes one.")
    kinds = typing.get_type_hints(Table)
    known = [entry.name for entry in fields(Table)]
    try:
        for name, value in entries.items():
            if name not in known:
                raise UnknownName("setting of a solver", name, known)
            if not _fits(value, kinds[name]):
                kind = kinds[name]
                said = kind.__name__ if kind in (str, int, float, bool) else kind
                raise InputError(f"'{name}' is {value!r}, where {said} is right.")
        return Table(**entries)
    except InputError as error:
        raise InputError(f"The solver '{word}': {error}") from error


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value from JSON is of an annotated type; whole numbers are numbers, and lists stand for tuples."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return any(_fits(value, each) for each in arguments)
    if origin is tuple:
        as_long = arguments[-1] is ... or (isinstance(value, list | tuple) and len(value) == len(arguments))
        return isinstance(value, list | tuple) and as_long and all(_fits(each, arguments[0]) for each in value)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _takes(function: Any, *arguments: Any, **keywords: Any) -> bool:
    try:
        inspect.signature(function).bind(*arguments, **keywords)
    except TypeError:
        return False
    except ValueError:  # some functions written in C do not tell
        return True
    return True


def _check_called(address: str, found: Any, keywords: list[str]) -> None:
    function = getattr(found, "forward", found)
    if not _takes(function, None, None, **dict.fromkeys(keywords)):
        wanted = ", ".join(["x", "t", *keywords])
        raise InputError(f"'{address}' is called as f({wanted}); it takes {inspect.signature(function)}.")


def quieten_transformers() -> None:
    """Bars and advice while weights are loaded hide the one line that matters."""
    from transformers.utils import logging

    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft|diffusers")
    logging.disable_progress_bar()
    logging.set_verbosity_error()
