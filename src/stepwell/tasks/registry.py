"""Tasks: a process to start from, prompts to learn on, held-out prompts to be judged by, and a reward."""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from stepwell.errors import InputError, StepwellError, UnknownName

if TYPE_CHECKING:  # tasks are listed without torch: what builds them is imported when one is built
    from stepwell.process.base import Process
    from stepwell.reward.mixing import Rewards
    from stepwell.sampling.request import Prompt

Measure: TypeAlias = "Callable[[list[Prompt], list[Any]], float]"
"""measure(prompts, samples): one number for a set of samples, with the prompt that each of them answers."""


def plainly(prompt: Prompt, completion: Any) -> str:
    """A completion as it is, the content of its chat message, a conversation line by line, or a tensor in a few words.

    Example:
        >>> from stepwell.sampling.request import Prompt
        >>> said = [{"role": "assistant", "content": "?c"}, {"role": "user", "content": ":7"}]
        >>> plainly(Prompt(0, None), said[:1]), plainly(Prompt(0, None), said)
        ('?c', 'assistant: ?c\\nuser: :7')
    """
    from torch import Tensor

    from stepwell.figures.pictures import described

    if isinstance(completion, Tensor):
        return str(described(completion))
    if isinstance(completion, list) and completion and all(isinstance(message, Mapping) for message in completion):
        if len(completion) == 1:
            return str(completion[0].get("content"))
        return "\n".join(f"{message.get('role')}: {message.get('content')}" for message in completion)
    return str(completion)


@dataclass(frozen=True)
class Task:
    """A problem to compare methods on: a start, prompts, a reward, and held-out prompts to be judged by.

    `process()` gives a fresh process each time, always from the same start. The score of a completion is its reward,
    and `unit` says what that counts (with `solved`, a mean of 0.4 reads 40 %). No prompt is in both `prompts` and
    `evaluation`, except with `same_prompts`: a generator of few classes has no others to hold out, and is judged on
    samples from random numbers that training does not draw; the report says so. `settings` are the training settings
    that fit the task, by field of `stepwell.training.settings`; `show(prompt, completion)` is a completion as a report
    prints it, unless it is an image. `threads` limits the processor's threads: for a small model more of them only
    wait for each other.

    `measures` are further numbers of the held-out samples, taken before and after each trial's training, by a name that
    says which way is better where one is. `figure(start, ends)` draws the report's picture of the whole comparison as
    an `<svg>` (see `stepwell.figures.charts.svg`) from the samples of the first seed: the start's, a list, and each
    method's by its label; `caption` explains it. Both get the samples that the reward gets.
    """

    name: str
    title: str
    description: str
    process: Callable[[], Process]
    prompts: list[Prompt]
    evaluation: list[Prompt]
    rewards: Rewards
    settings: Mapping[str, Any] = field(default_factory=dict)
    show: Callable[[Prompt, Any], str] = plainly
    unit: str = "reward"
    threads: int | None = None
    measures: Mapping[str, Measure] = field(default_factory=dict)
    figure: Callable[[list[Any], dict[str, list[Any]]], str] | None = None
    caption: str = ""
    same_prompts: bool = False

    def __post_init__(self) -> None:
        """Raise `InputError` for a field that is not what its type says, and for prompts that stand on both sides."""
        self._check_fields()
        for kind, prompts in (("prompts", self.prompts), ("evaluation", self.evaluation)):
            if not prompts:
                raise InputError(f"Task.{kind} must hold at least one prompt, got none (task '{self.name}').")
        if self.same_prompts:
            return
        held_out = {repr(prompt.value) for prompt in self.evaluation}
        for prompt in self.prompts:
            if repr(prompt.value) in held_out:
                raise InputError(
                    f"Task.evaluation must hold no prompt that is trained on, got {prompt.value!r} in both (task "
                    f"'{self.name}'); keep them apart, or set same_prompts."
                )

    def _check_fields(self) -> None:
        from stepwell.foreign.names import setting_hint
        from stepwell.reward.mixing import Rewards
        from stepwell.sampling.request import Prompt
        from stepwell.training.settings import Settings

        for name in ("name", "title", "description", "unit", "caption"):
            self._refuse(name, "a text", isinstance(getattr(self, name), str))
        for name in ("prompts", "evaluation"):
            found = getattr(self, name)
            right = isinstance(found, list | tuple) and all(isinstance(prompt, Prompt) for prompt in found)
            self._refuse(name, "a list of prompts, such as load_prompts(file) gives", right)
        self._refuse("process", "a function that returns a fresh process each time", callable(self.process))
        self._refuse("rewards", "Rewards, as in Rewards(function)", isinstance(self.rewards, Rewards))
        self._refuse("show", "a function of a prompt and a completion", callable(self.show))
        self._refuse("figure", "a function, or None", self.figure is None or callable(self.figure))
        counted = isinstance(self.threads, int) and not isinstance(self.threads, bool) and self.threads > 0
        self._refuse("threads", "a whole number of at least 1, or None", self.threads is None or counted)
        self._refuse("same_prompts", "True or False", isinstance(self.same_prompts, bool))
        right = isinstance(self.measures, Mapping) and all(map(callable, self.measures.values()))
        self._refuse("measures", "functions by name", right)
        self._refuse("settings", "settings of training by name", isinstance(self.settings, Mapping))
        for name in self.settings:
            if name not in Settings.__dataclass_fields__:
                raise UnknownName("setting", str(name), Settings.__dataclass_fields__, hint=setting_hint(str(name)))

    def _refuse(self, name: str, words: str, right: bool) -> None:
        """Raise `InputError` for a field that is not right."""
        if not right:
            found = getattr(self, name)
            raise InputError(f"Task.{name} must be {words}, got {found!r:.60} (task {self.name!r:.40}).")


@dataclass(frozen=True)
class TaskEntry:
    """A task in the registry: its name, one line about it, and the function that builds it."""

    name: str
    summary: str
    build: Callable[..., Task]

    @property
    def options(self) -> dict[str, Any]:
        """The task's options with their defaults."""
        return {name: parameter.default for name, parameter in inspect.signature(self.build).parameters.items()}


_TASKS: dict[str, TaskEntry] = {}


def task(name: str) -> Callable[[Callable[..., Task]], Callable[..., Task]]:
    """Register a function that builds a `Task`; its parameters are the task's options and all have defaults.

    A user's own task registers in the user's own file in the same way. `stepwell tasks` shows the first line of the
    docstring. Raises `InputError` for a name that another file has taken, and where the name and the one in the `Task`
    that is built later are not the same.
    """
    if not isinstance(name, str) or not name or any(letter.isspace() for letter in name):
        raise InputError(f"The name of a task must be a text without spaces, as in @task('sums'), got {name!r:.60}.")

    def register(build: Callable[..., Task]) -> Callable[..., Task]:
        taken = _TASKS.get(name)
        if taken is not None and taken.build.__code__.co_filename != build.__code__.co_filename:
            raise InputError(
                f"There is a task '{name}' already, from {taken.build.__code__.co_filename}; rename yours."
            )
        for option, parameter in inspect.signature(build).parameters.items():
            if parameter.default is inspect.Parameter.empty:
                raise InputError(f"Option '{option}' of task '{name}' has no default; every option needs one.")
        summary = (inspect.getdoc(build) or "").split("\n", 1)[0]
        _TASKS[name] = TaskEntry(name, summary, build)
        return build

    return register


def forget_task(name: str) -> None:
    """Take a task out of the registry."""
    _TASKS.pop(name, None)


@functools.cache
def _find() -> None:
    """Import every module of this folder, and every folder in it, whose `__init__` imports its task, once."""
    for module in pkgutil.iter_modules([os.fspath(Path(__file__).parent)], "stepwell.tasks."):
        importlib.import_module(module.name)


def tasks() -> list[TaskEntry]:
    """All tasks, sorted by name: those that come with Stepwell and those registered since."""
    _find()
    return [_TASKS[name] for name in sorted(_TASKS)]


def entry_of(name: str) -> TaskEntry:
    """The entry of a task; raises `UnknownName`, with the nearest name, for one that nobody registered."""
    entries = {entry.name: entry for entry in tasks()}
    if name not in entries:
        raise UnknownName("task", name, entries)
    return entries[name]


def source_of(name: str) -> str:
    """The file that a user's own task is written in, or `stepwell`."""
    build = entry_of(name).build
    return "stepwell" if build.__module__.startswith("stepwell.") else build.__code__.co_filename


def get_task(name: str, **options: Any) -> Task:
    """Build a task by name.

    Raises `UnknownName`, with the nearest one, for an unknown task or option, and `InputError` for an option of another
    kind than its default, and for a function that fails (naming its line) or builds no task of this name.
    """
    from stepwell.recipe.card import check_options
    from stepwell.recipe.source import code_of, line_in

    build = entry_of(name).build
    check_options(f"task {name}", options, build)
    try:
        built: Any = build(**options)
    except StepwellError:
        raise
    except Exception as error:
        line, reason = line_in(error, Path(code_of(build).co_filename)), " ".join(str(error).split())
        raise InputError(
            f"The task '{name}' cannot be built; its function failed{line}: {type(error).__name__}: {reason}"
        ) from error
    if not isinstance(built, Task):
        raise InputError(f"The task '{name}' must return a Task, got a value of type {type(built).__name__}.")
    if built.name != name:
        raise InputError(f"Task.name must be '{name}', the name that the task is registered by, got '{built.name}'.")
    return built
