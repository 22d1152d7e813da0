"""Options and settings on the command line: --set is an option, of a method or a task; a setting of the run is none."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from stepwell.errors import InputError, UnknownName
from stepwell.foreign.names import option_hint

if TYPE_CHECKING:
    from stepwell.comparison.specs import MethodSpec
    from stepwell.tasks.registry import TaskEntry


def refuse_settings(options: Iterable[str], owner: str, settings: Collection[str], compared: bool = False) -> None:
    """Raise `InputError` for one of the settings of the run among options that `owner` does not have.

    compared: settings are written as --setting.
    """
    for name in options:
        if name in settings:
            right = f"--setting {name}=..." if compared else f"--{name.replace('_', '-')}"
            raise InputError(
                f"--set {name} must be written as {right}: it is a setting of the run, not an option of {owner}."
            )


def shared_options(
    options: Mapping[str, Any], specs: Sequence[MethodSpec], task: TaskEntry, settings: Collection[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options among those of --set that are the task's, and those that all methods have; `settings` are neither.

    Raises `InputError` for one that both have, that some of the methods lack, or that nobody has.
    """
    of_task: dict[str, Any] = {}
    of_methods: dict[str, Any] = {}
    for name, value in options.items():
        having = [spec.label for spec in specs if name in spec.card.options]
        lacking = [spec.label for spec in specs if name not in spec.card.options]
        if name in task.options and having:
            raise InputError(
                f"--set {name} must mean one thing, and task {task.name} and {having[0]} both have such an option; "
                f"write the method's as --methods {having[0]}:{name}=..."
            )
        if name in task.options:
            of_task[name] = value
        elif having and not lacking:
            of_methods[name] = value
        elif having:
            raise InputError(
                f"--set {name} must be an option of every method, and {lacking[0]} has none; write it as --methods "
                f"{having[0]}:{name}=..."
            )
        else:
            refuse_settings([name], f"task {task.name} or of the methods", settings, compared=True)
            known = [*task.options, *(option for spec in specs for option in spec.card.options)]
            hint = option_hint(name, known)
            raise UnknownName(f"option of task {task.name}", name, task.options, hint=hint)
    return of_task, of_methods


def refuse_options(
    given: Iterable[str], specs: Sequence[MethodSpec], task: TaskEntry, settings: Collection[str]
) -> None:
    """Raise `InputError` for an option of a method or of the task that was given among the settings of the run."""
    for name in given:
        owners = [spec.label for spec in specs if name in spec.card.options]
        owners += [f"task {task.name}"] if name in task.options else []
        if owners and name not in settings:
            raise InputError(
                f"--setting {name} must be written as --set {name}=...: it is an option of {owners[0]}, not a setting "
                "of the run."
            )
