"""The identity of a run: everything that has to be the same for a checkpoint of it to be gone on from."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import types
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from stepwell.digests import stored, weights_digest
from stepwell.origin import is_own, origin
from stepwell.parts import parts_of
from stepwell.process.base import Process
from stepwell.process.models import Models
from stepwell.recipe.recipe import Recipe
from stepwell.reward.mixing import Rewards
from stepwell.sampling.request import Prompt
from stepwell.training.checkpoint import AnotherRun
from stepwell.training.log import versions
from stepwell.training.settings import Settings

FREE = frozenset(
    {
        *("steps", "budget"),  # a longer run is the same one
        *("prompts_per_step", "group_size", "epochs", "minibatches"),  # they are in the method's parts
        *("tokens_per_microbatch", "checkpoint_every", "checkpoint_seconds", "keep"),
        *("evaluate_every", "evaluation_samples", "completions_logged", "trackers", "progress"),
    }
)
"""The settings that may change when a run is resumed; every other one decides its numbers."""

STARTED_WITH = {
    "model": "the model",
    "base": "the weights that do not learn",
    "data": "the prompts and their columns",
    "evaluation": "the prompts to evaluate on",
    "process": "the process",
    "teacher": "the teacher",
    "reward": "the rewards and weights",
    "method": "the method and options",
    "code": "the code",
}
"""The entries of a fingerprint besides the settings, in words."""


def fingerprint(
    evaluated: Process,
    models: Models,
    recipe: Recipe,
    prompts: Sequence[Prompt],
    rewards: Rewards,
    settings: Settings,
    evaluation: Sequence[Prompt] | None = None,
) -> dict[str, Any]:
    """The identity of a run as values for JSON.

    It is taken before anything is drawn: a process may count its own steps in an attribute that `describe` gives.
    """
    trained, teacher = models.policy, models.teacher
    shapes = [f"{name}:{tuple(p.shape)}:{p.dtype}" for name, p in trained.module.named_parameters() if p.requires_grad]
    return {
        "model": hashlib.sha256("\n".join(shapes).encode()).hexdigest(),
        "base": _base_digest(trained.module),
        "data": rows_digest(prompts),
        "evaluation": None if evaluation is None else rows_digest(evaluation),
        "process": {"trained": trained.describe(), "evaluated": evaluated.describe()},
        "teacher": None if teacher is None else [teacher.describe(), weights_digest(stored(teacher.module))],
        "method": "\n".join(recipe.parts()),
        "reward": [
            {"name": name, "weight": weight, "source": "".join(origin(function))}
            for name, weight, function in zip(rewards.names, rewards.weights, rewards.functions, strict=True)
        ],
        "code": dict(sorted(_own_code(recipe, trained.module))),
        "settings": {
            entry.name: getattr(settings, entry.name)
            for entry in dataclasses.fields(settings)
            if entry.name not in FREE
        },
        "made with": {**versions(), "device": _device(trained.module), "threads": torch.get_num_threads()},
    }


def refuse_another_model(folder: Path, saved: Mapping[str, Any], process: Process) -> None:
    """Raise `AnotherRun`, saying what differs, where a process is not made as the one that a run has trained."""
    made = {"evaluated": process.describe()}
    before = {"evaluated": saved["process"]["evaluated"]}
    if _text(made) != _text(before):
        raise _another(folder, "process", before, made, "export it")
    if saved["base"] != _base_digest(process.module):
        raise _another(folder, "base", None, None, "export it")


def refuse_another(folder: Path, saved: Mapping[str, Any], present: Mapping[str, Any]) -> None:
    """Raise `AnotherRun`, saying what differs, where a checkpoint's fingerprint is not the present run's.

    Other versions of libraries and another device are warned of: they change numbers in the last places.
    """
    others = [entry for entry in STARTED_WITH if _text(saved.get(entry)) != _text(present[entry])]
    if "evaluation" in others and None in (saved.get("evaluation"), present["evaluation"]):
        others.remove("evaluation")  # evaluating or not changes nothing else
    if "method" in others and "process" not in others:
        others.insert(0, "method")  # a critic makes it another model, too
    if others:
        raise _another(folder, others[0], saved.get(others[0]), present[others[0]])
    for name, value in present["settings"].items():
        before = saved["settings"].get(name)
        if _text(before) != _text(value):
            raise AnotherRun(
                f"The checkpoint '{folder}' is of a run with {name}={before}, not {value}; "
                "resume with the settings it was started with."
            )
    made = saved.get("made with") or {}
    changed = [
        f"{name} was {made[name]}, now {now}"
        for name, now in present["made with"].items()
        if name in made and made[name] != now
    ]
    if changed:
        warnings.warn(
            f"The run goes on in another way than it began ({'; '.join(changed)}), so that its numbers may differ in "
            "the last places from those of a run without a stop.",
            stacklevel=2,
        )


def _another(folder: Path, entry: str, saved: Any, present: Any, way: str = "resume") -> AnotherRun:
    """The error for an entry of a fingerprint that differs, with the parts that do in words."""
    differences = dict.fromkeys(_differences(entry, saved, present))
    details = f" ({'; '.join(differences)})" if differences else ""
    return AnotherRun(
        f"The checkpoint '{folder}' is of another {entry}{details}; {way} with {STARTED_WITH[entry]} it was "
        "started with."
    )


def _base_digest(module: nn.Module) -> str:
    """A digest of what does not learn: frozen parameters, and buffers."""
    learning = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    return weights_digest({name: value for name, value in stored(module).items() if name not in learning})


def rows_digest(prompts: Iterable[Prompt]) -> str:
    """A digest of prompts with their columns, which are never all in memory."""
    digest = hashlib.sha256()
    for prompt in prompts:
        text = f"{prompt.id!r} {_told(prompt.value)} {_told(prompt.columns)}\n"
        digest.update(text.encode(errors="backslashreplace"))
    return digest.hexdigest()


PLAIN = frozenset({str, int, float, bool, type(None)})
"""The types of values that write themselves whole."""


def _told(value: Any) -> str:
    """A value of the data as a text, of which tensors, arrays and pictures, which write themselves in part, are the
    digest of their numbers."""
    if type(value) in PLAIN:
        return repr(value)
    if isinstance(value, Mapping):
        if PLAIN.issuperset(map(type, value.values())):
            return repr(dict(value))
        return f"{{{', '.join(f'{key!r}: {_told(entry)}' for key, entry in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_told, value))}]"
    if isinstance(value, torch.Tensor):
        return weights_digest({"": value})
    if isinstance(value, Bytes):
        form = [str(getattr(value, name, "")) for name in ("shape", "dtype", "size", "mode")]
        return f"{form} {hashlib.sha256(value.tobytes()).hexdigest()}"
    return repr(value)


@runtime_checkable
class Bytes(Protocol):
    """Can give its numbers as bytes: arrays and pictures."""

    def tobytes(self) -> bytes: ...


def _own_code(recipe: Recipe, module: nn.Module) -> Iterator[tuple[str, str]]:
    """The digests of a user's own classes and functions among a method's parts and a model's modules, and of those
    that they hold."""
    roots = (recipe.whole.terms, recipe.planner, recipe.transforms, recipe.guide)
    things = [*(part for root in roots for part in parts_of(root)), *module.modules()]
    settings = [value for thing in things for value in vars(thing).values() if isinstance(value, types.FunctionType)]
    kinds = {type(thing) for thing in things}
    for thing in (*kinds, *settings):
        if is_own(thing):
            yield origin(thing)


def _device(module: nn.Module) -> str:
    return next((parameter.device.type for parameter in module.parameters()), "cpu")


def _text(value: Any) -> str:
    """A value as the checkpoint has it, in which tuples are lists."""
    return json.dumps(value, sort_keys=True)


def _differences(entry: str, saved: Any, present: Any) -> Iterator[str]:
    """The parts of an entry that differ, in words."""
    if entry == "process":
        for role, entries in present.items():
            yield from differences((saved or {}).get(role, {}), entries)
    elif entry == "code":
        names = sorted({*(saved or {}), *present})
        yield from (f"that of {name} has changed" for name in names if (saved or {}).get(name) != present.get(name))
    elif entry == "reward" and isinstance(saved, list):
        before = {reward["name"]: reward for reward in saved}
        for reward in present:
            earlier = before.get(reward["name"])
            if earlier is None:
                yield f"{reward['name']} was not among them"
            elif earlier["weight"] != reward["weight"]:
                yield f"the weight of {reward['name']} was {earlier['weight']}, now {reward['weight']}"
            elif earlier != reward:
                yield f"the code of {reward['name']} or what it was made with has changed"
    elif entry == "teacher" and isinstance(saved, list) and isinstance(present, list):
        yield from differences(saved[0], present[0])


def differences(saved: Mapping[str, Any], present: Mapping[str, Any]) -> Iterator[str]:
    """The entries that differ between two descriptions (`Process.describe`), in words; those of tables one by one."""
    for name in sorted(saved.keys() | present.keys()):
        before, after = saved.get(name), present.get(name)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            yield from (f"{name}'s {words}" for words in differences(before, after))
        elif _text(before) == _text(after):
            continue
        elif name == "source":  # a digest, which says nothing to a reader
            yield "its code has changed"
        else:
            words, both = name.replace("_", " "), f"{_text(before)}, now {_text(after)}"
            yield f"{words} was {both}" if len(both) < 90 else f"{words} was another"
