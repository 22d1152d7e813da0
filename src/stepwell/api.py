"""The few functions that most users call, which take names and files in place of objects."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stepwell.data.prompts import load_prompts
from stepwell.data.rows import sizes_of
from stepwell.errors import InputError, StepwellError, UnknownName
from stepwell.foreign.names import setting_hint
from stepwell.meter import Budget, Cost
from stepwell.methods import catalogue
from stepwell.process.abilities import Redrawn, ability
from stepwell.process.base import Process, Samples, check_process
from stepwell.ranges import checked
from stepwell.recipe.recipe import Recipe
from stepwell.reward.absent import NoRewards
from stepwell.reward.mixing import Rewards
from stepwell.rng import Rng
from stepwell.sampling.export import write_samples
from stepwell.sampling.request import Prompt, Request
from stepwell.sampling.rollout import rollout
from stepwell.solver.table import TABLES, Table
from stepwell.training import loop
from stepwell.training.settings import Settings

if TYPE_CHECKING:
    from stepwell.tasks.registry import Task


def settings_from(**given: Any) -> Settings:
    """Settings by name; a budget may be text like `60s`. Raises `UnknownName`, with the nearest name, for others."""
    for name in given:
        if name not in Settings.__dataclass_fields__:
            raise UnknownName("setting", name, Settings.__dataclass_fields__, hint=setting_hint(name))
    if isinstance(given.get("budget"), str):
        given["budget"] = Budget.parse(given["budget"])
        given.setdefault("steps", None)
    return Settings(**given)


@checked("process", "reward", "method", "teacher")
def train(
    process: Process,
    prompts: Any,
    reward: Callable[..., Any] | Sequence[Callable[..., Any]] | Rewards | None = None,
    method: str | Recipe = "grpo",
    *,
    options: Mapping[str, Any] | None = None,
    out: str | Path | None = None,
    evaluation: Any = None,
    on_step: Callable[[dict[str, Any]], None] | None = None,
    resume: bool = False,
    teacher: Process | None = None,
    **settings: Any,
) -> loop.Run:
    """Train a process from rewards with a method, by id or as a recipe; without any where the method reads none.

    `prompts` and `evaluation` are anything that `load_prompts` takes; for flows they may be any values that the flow is
    conditioned on (class numbers), rows of data without prompts, and None where it is conditioned on nothing. `options`
    are the method's; `teacher` is the process that distillation learns from; every other keyword is a field of
    `Settings` (steps, budget, learning_rate, group_size, ...). The process itself learns; `run.process` is the same
    object, or with a critic a twin on the same parameters.

    Example:
        >>> import stepwell as sw
        >>> model = sw.exact.markov(symbols=3, length=3)
        >>> def shorter(completions, **columns):
        ...     return [-len(text) for text in completions]
        >>> run = train(model, [{"prompt": 0}], shorter, "rloo", steps=2, learning_rate=0.1)
        >>> run.steps
        2
    """
    card = None
    if isinstance(method, str):
        if ":" in method:
            raise InputError(f"method must be an id, got {method!r}; give its options as options={{'name': value}}.")
        card = catalogue.get(method)
        for name in settings.keys() - Settings.__dataclass_fields__.keys():
            if name in card.options:
                raise InputError(f"{name} must be given as options={{'{name}': ...}}: it is an option of '{method}'.")
    for name in options or {}:
        if not isinstance(name, str):
            raise InputError(f"options must be named by texts, got {name!r:.60}.")
    given = settings_from(**settings)
    check_process(process, "The model to train")
    if teacher is not None:
        check_process(teacher, "The teacher")
    if bool(given.evaluate_every) != (evaluation is not None):
        raise InputError("evaluation and evaluate_every must be given together: prompts, and the steps between.")
    if card is None and not isinstance(method, Recipe):
        raise InputError(f"method must be an id or a Recipe, got a {type(method).__name__}.")
    if options and isinstance(method, Recipe):
        raise InputError("options must be left out for a Recipe; they are for a method that is given by id.")
    recipe, config = method, {"method": "a recipe", "options": dict(options or {})}
    if card is not None:
        catalogue.check_kind(card, process.kind)
        recipe, config = card.recipe(**(options or {})), config | {"method": card.id, "card": card.as_dict()}
    assert isinstance(recipe, Recipe)
    rewards = reward if isinstance(reward, Rewards) else NoRewards() if reward in (None, [], ()) else Rewards(reward)
    return loop.train(
        process,
        recipe,
        prompts_for(process, [None] if prompts is None else prompts),
        rewards,
        given,
        out=out,
        evaluation=None if evaluation is None else prompts_for(process, evaluation),
        on_step=on_step,
        resume=resume,
        config=config,
        teacher=teacher,
    )


@dataclass(frozen=True)
class CostedSamples(Samples):
    """Samples with the prompt of each, and their cost together."""

    prompts: list[Any] = field(default_factory=list)
    cost: Cost = field(default_factory=Cost)

    def save(self, folder: str | os.PathLike[str], format: str | None = None, **about: Any) -> list[Path]:
        """Write them into a new or empty folder (`stepwell.sampling.export.write_samples`); returns the files."""
        cost = {unit: amount for unit, amount in vars(self.cost).items() if unit != "wall_time"}  # which may vary
        return write_samples(folder, self.values, self.prompts, format, {**about, "cost": cost})


@checked("process", "n", "seed", "rows_at_once")
def sample(
    process: Process,
    prompts: Any = None,
    n: int = 1,
    *,
    seed: int = 0,
    rows_at_once: int | None = None,
    **sampler: Any,
) -> CostedSamples:
    """Draw `n` samples for each prompt, those of a prompt side by side.

    `prompts` are as for `train`; None is for processes without prompts. `sampler` are settings of a flow's sampler
    (solver, steps, guidance, ...: `process.flow.sampler.SETTINGS`). At most `rows_at_once` samples are drawn side by
    side, which changes the random numbers that a sample gets, and not its distribution.

    Raises `InputError` for settings and prompts that do not fit, and for samples that are not finite.

    Example:
        >>> import stepwell as sw
        >>> points = sw.flow(lambda x, t: x / t, shape=(2,))  # all data is at the origin
        >>> drawn = sample(points, n=3, solver="dpmpp-2m", steps=5)
        >>> len(drawn), drawn.cost.model_evaluations, float(drawn.values[0].abs().max()) < 1e-6
        (3, 15, True)
    """
    check_count("n", n)
    check_count("rows_at_once", rows_at_once)
    check_seed("seed", seed)
    check_process(process, "The model to sample")
    if sampler:
        process = ability(process, Redrawn, f"The sampler's setting '{next(iter(sampler))}'").with_sampler(**sampler)
    whole = prompts_for(process, [None] if prompts is None else prompts)
    most = rows_at_once or n
    pieces = [(prompt, min(most, n - begin)) for prompt in whole for begin in range(0, n, most)]
    before = process.meter.read()
    drawn = rollout(process, [Request(*piece) for piece in pieces], Rng(seed), rows_at_once=rows_at_once)
    cost = process.meter.read() - before
    for prompt, value in zip(drawn.prompts, drawn.samples.values, strict=True):
        if isinstance(value, Tensor) and not bool(torch.isfinite(value).all()):
            raise InputError(
                f"Samples must be finite, got NaN or infinity for prompt {prompt.id} ({prompt.value!r:.60}): the "
                "states diverged."
            )
    prompts = [prompt.value for prompt in drawn.prompts]
    truncated = drawn.trajectories.truncated.tolist()
    return CostedSamples(drawn.samples.values, drawn.samples.columns, truncated, prompts=prompts, cost=cost)


def check_count(name: str, value: int | None) -> None:
    """Raise `InputError` for a number of samples below 1; None passes."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise InputError(f"{name} must be a whole number of at least 1, got {value!r}.")


def check_seed(name: str, value: int) -> None:
    """Raise `InputError` for a seed that does not fit 64 bits."""
    if isinstance(value, bool) or not isinstance(value, int) or not -(2**63) <= value < 2**64:
        raise InputError(f"{name} must be a whole number of 64 bits, got {value!r}.")


def prompts_for(process: Process, source: Any, column: str = "prompt") -> Sequence[Prompt]:
    """The prompts in `source` (`load_prompts`); raises `InputError` for one that this process cannot read."""
    prompts = load_prompts(source, column, anything=process.any_prompt)
    check_prompts(process, prompts, f"{source}" if isinstance(source, str | os.PathLike) else "The list of prompts")
    return prompts


def check_prompts(process: Process, prompts: Sequence[Prompt], place: str) -> None:
    """Raise `InputError`, naming the row, for a prompt that the process cannot read and that would end a run later.

    Of more than `CHECKED` prompts, the longest are looked at and an even share of the others: reading all would take
    longer than training begins to take. One that is missed ends the run, which can go on, when it is drawn.
    """
    for row in _looked_at(prompts):
        prompt = prompts[row]
        try:
            process.check_prompt(prompt.value)
        except StepwellError as error:
            raise InputError(f"{place}, row {row}: {error}") from error


CHECKED = 20_000
"""The most prompts that are all read before a run."""
LONGEST = 1_000
"""The longest of more prompts, which are read in any case."""


def _looked_at(prompts: Sequence[Prompt]) -> Sequence[int]:
    """The rows of the prompts that are read before a run."""
    if len(prompts) <= CHECKED:
        return range(len(prompts))
    sizes = torch.tensor(sizes_of(prompts))
    longest = sizes.topk(LONGEST).indices
    spread = torch.linspace(0, len(prompts) - 1, CHECKED - LONGEST, dtype=torch.float64).long()
    return torch.cat([longest, spread]).unique().tolist()


def solvers() -> dict[str, Table]:
    """All solvers by name, each a table that can be printed, changed by `replace` and given to a flow.

    Example:
        >>> import stepwell as sw
        >>> midpoint = sw.solvers()["dpm-2s"]
        >>> midpoint.evaluations, midpoint.replace(name="later", inner=0.7).inner
        (2, 0.7)
    """
    return dict(TABLES)


def compare(task: Task | str, methods: str | Sequence[str], budget: str = "60s", **options: Any) -> Any:
    """Train each method from the same start at equal budget; see `stepwell.comparison.run.compare`."""
    from stepwell.comparison import run

    return run.compare(task, methods, budget=budget, **options)
