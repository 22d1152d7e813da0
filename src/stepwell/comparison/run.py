"""Methods side by side: the same start, the same seeds, the same prompts, the same budget."""

from __future__ import annotations

import contextlib
import datetime
import os
import platform
import shlex
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepwell.comparison.progress import ComparisonProgress
from stepwell.comparison.results import Comparison, Entry, Trial
from stepwell.comparison.resuming import ENDS, begun_anew, data_of, gone_on_from, keep_ends, kept_ends
from stepwell.comparison.samples import kept, measured
from stepwell.comparison.specs import MethodSpec, parse_specs
from stepwell.errors import InputError, UnknownName
from stepwell.figures.charts import safe
from stepwell.foreign.names import setting_hint
from stepwell.guarded import reason_of
from stepwell.meter import Budget, Cost
from stepwell.methods.catalogue import check_kind
from stepwell.process.base import Process
from stepwell.ranges import Demand, Range, checked
from stepwell.rng import Rng
from stepwell.sampling.record import Drawn
from stepwell.tasks.registry import Task, get_task, source_of
from stepwell.tasks.warm_start import threads
from stepwell.training.log import versions
from stepwell.training.loop import evaluate, train
from stepwell.training.settings import Settings, with_settings
from stepwell.writing import held, writable_folder

SEED = Demand(range=Range("whole numbers", whole=True))
POINTS = 10
"""Evaluations during a run, at equal shares of the budget."""


@checked()
def compare(
    task: Task | str,
    methods: str | Sequence[str],
    *,
    budget: Budget | str = "60s",
    seeds: int | Sequence[int] = 3,
    out: str | Path | None = None,
    options: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    evaluation_samples: int = 8,
    keep_runs: bool = False,
    progress: bool = True,
    resume: bool = False,
) -> Comparison:
    """Train each method from the task's start with the same budget, and judge all on the same held-out prompts.

    `methods` are written as in `parse_specs`; `seeds` are a number of them (0, 1, ...) or the seeds themselves, the
    same for all methods: a seed decides the order of the prompts and the random numbers of rollouts and evaluation.
    Methods take turns, seed by seed, and each turn begins with another of them, so that a machine that slows down slows
    all alike. Every run is evaluated `POINTS` times on the way, which its time does not include; nor does it include
    the first use of the process, for which one step is made beforehand.

    `options` are the task's, where it is given by name; `settings` take precedence over the task's own settings.
    comparison.json is written to `out` after every run, and with `keep_runs` each run's log and model. With `resume`
    the runs in its comparison.json are kept, and the others made; one that was interrupted begins anew, so that the
    results are those of a comparison without an interruption.

    A method that fails loses its own results only; `Comparison.errors` says which and why. Raises `StepwellError` for a
    mistake in the request, before anything is trained, and for a folder that holds another comparison.
    """
    specs = parse_specs(methods)
    whole = Budget.parse(budget) if isinstance(budget, str) else budget
    chosen = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    for seed in chosen:
        SEED.refuse("seeds", seed)
    if not chosen or len(set(chosen)) < len(chosen):
        raise InputError(f"seeds must be at least one, each of them once, got {seeds}.")
    if evaluation_samples < 1:
        raise InputError(f"evaluation_samples must be at least 1, got {evaluation_samples}.")
    if isinstance(task, Task) and options:
        raise InputError("options must be left out for a task that is built already; they are for a task's name.")
    built = task if isinstance(task, Task) else get_task(task, **(options or {}))
    common = _settings(built, settings or {}, whole)
    folder = None if out is None else writable_folder(out)
    if keep_runs and folder is None:
        raise InputError("keep_runs needs a folder to keep the runs in; name one with out.")
    for spec in specs:
        recipe = with_settings(spec.recipe(), common)  # raises before the first method is trained
        if any(read.of == "teacher" for read in recipe.whole.reads):
            raise InputError(
                f"methods must learn from rewards alone, got '{spec.label}', which learns from a teacher; train it by "
                "`stepwell train --teacher`."
            )
        runs = None if folder is None else folder / "runs" / _file_name(spec.label)
        if keep_runs and not resume and runs is not None and runs.exists():
            raise InputError(f"'{runs}' holds runs of an earlier comparison; remove it or choose another folder.")
    command = _command(task, options, settings, specs, whole, seeds, evaluation_samples)
    runner = _Runner(built, whole, common, evaluation_samples, folder if keep_runs else None)
    fresh = Comparison(
        task=_described(built) | {"options": dict(options or {}), "data": data_of(built)},
        budget=str(whole),
        budget_unit=whole.unit,
        seeds=chosen,
        entries=[Entry(spec.label, spec.card.id, spec.options, _card(spec)) for spec in specs],
        settings={k: v for k, v in common.as_dict().items() if k not in ("seed", "budget", "progress", "trackers")},
        evaluation={"prompts": len(built.evaluation), "samples": evaluation_samples},
        made=_made(built.threads) | {"command": command},
    )
    total = len(specs) * len(chosen)
    with contextlib.ExitStack() as around:
        if folder is not None:
            around.enter_context(held(folder))
        result = gone_on_from(folder, fresh, resume)
        labels = [entry.label for entry in result.entries]
        runner.ends = kept_ends(folder, labels)
        around.enter_context(threads(built.threads))
        view = around.enter_context(ComparisonProgress(progress, built.title, str(whole), total))
        view.say("starting the process")
        process = built.process()
        for spec in specs:
            check_kind(spec.card, process.kind)
        if process.work != "tokens":
            result.task["work"] = process.work
        if folder is not None:
            result.save(folder)  # from now on the folder says which comparison it is of
        if any(not entry.has(seed) for entry in result.entries for seed in chosen):
            runner.warm(specs[0], whole)
        for turn, seed in enumerate(chosen):
            if all(entry.has(seed) for entry in result.entries):
                view.next(len(specs))
                continue
            view.say(f"seed {seed}: judging the start")
            before = runner.look(built.process(), seed, "start")
            for place in range(len(specs)):
                number = (turn + place) % len(specs)
                entry = result.entries[number]
                if entry.error is None and not entry.has(seed):
                    done = runner.run(entry, specs[number], seed, before, view)
                    result = replace(result, entries=[done if e is entry else e for e in result.entries])
                    if turn == 0 and done.error is None:
                        result = replace(result, figure=runner.figure(labels, before))
                        if folder is not None and runner.ends:
                            keep_ends(folder, runner.ends, labels)
                    if folder is not None:
                        result.save(folder)
                view.next()
        if folder is not None:
            (folder / ENDS).unlink(missing_ok=True)
    return result


@dataclass(frozen=True)
class _Look:
    """The held-out samples of a process: the mean reward on each prompt (P,), the samples, the task's measures."""

    each: Tensor
    drawn: Drawn
    measures: dict[str, float | None]


class _Runner:
    """The settings that all runs of a comparison share, and the last samples of each method's first run."""

    def __init__(self, task: Task, budget: Budget, settings: Settings, samples: int, folder: Path | None):
        self.task, self.budget, self.settings, self.samples, self.folder = task, budget, settings, samples, folder
        self.ends: dict[str, list[Any]] = {}

    def warm(self, spec: MethodSpec, budget: Budget) -> None:
        """Make one step that is not counted, so that the first method's time has no work that is done only once."""
        if budget.unit == "seconds":
            settings = replace(self.settings, budget=None, steps=1)
            train(self.task.process(), spec.recipe(), self.task.prompts, self.task.rewards, settings)

    def judge(self, process: Process, seed: int, *when: object, samples: int | None = None) -> tuple[Tensor, Drawn]:
        """The mean reward on each held-out prompt (P,), and the samples; the meter does not count them."""
        rng = Rng(seed).split("comparison", *when)
        evaluation = evaluate(process, self.task.evaluation, self.task.rewards, rng, samples or self.samples)
        return evaluation.each, evaluation.drawn

    def look(self, process: Process, seed: int, when: str) -> _Look:
        """The evaluation of a process before or after its training, with measures."""
        each, drawn = self.judge(process, seed, when)
        return _Look(each, drawn, measured(self.task, drawn))

    def figure(self, labels: Sequence[str], before: _Look) -> str:
        """The task's figure of the first runs so far; empty where the task has none, or where drawing it fails."""
        if self.task.figure is None:
            return ""
        ends = {label: self.ends[label] for label in labels if label in self.ends}
        try:
            return safe(self.task.figure(before.drawn.samples.values, ends))
        except Exception as error:  # a picture must not cost hours of training
            warnings.warn(f"The figure of task '{self.task.name}' is left out: {error}", stacklevel=2)
            return ""

    def run(self, entry: Entry, spec: MethodSpec, seed: int, before: _Look, view: ComparisonProgress) -> Entry:
        """The entry with one trial more, or with the error that ended it."""
        try:
            return self._run(entry, spec, seed, before, view)
        except Exception as error:
            return replace(entry, error=f"seed {seed}: {type(error).__name__}: {reason_of(error, 2000)}")

    def _run(self, entry: Entry, spec: MethodSpec, seed: int, before: _Look, view: ComparisonProgress) -> Entry:
        process = self.task.process()
        history: list[dict[str, Any]] = []
        curve: list[dict[str, Any]] = [{"share": 0.0, "step": 0} | _score(before.each) | _costs(Cost())]
        view.say(f"seed {seed}: {spec.label}")

        def on_step(metrics: dict[str, Any]) -> None:
            cost = process.meter.read()
            share = self.budget.fraction(cost, metrics["step"])
            history.append(metrics)
            reached = len(curve) - 1
            if share < 1.0 and share >= (reached + 1) / POINTS:
                each, _ = self.judge(process, seed, "curve", metrics["step"], samples=1)
                curve.append({"share": share, "step": metrics["step"]} | _score(each) | _costs(cost))
            view.share(share, f"{self.task.unit} {curve[-1]['score']:.3f}")

        out = None
        if self.folder is not None:
            out = begun_anew(self.folder / "runs" / _file_name(spec.label) / f"seed-{seed}")
        run = train(
            process,
            spec.recipe(),
            self.task.prompts,
            self.task.rewards,
            replace(self.settings, seed=seed),
            out=out,
            on_step=on_step,
            config={
                "method": spec.card.id,
                "options": spec.options,
                "card": spec.card.as_dict(),
                "task": self.task.name,
            },
        )
        after = self.look(process, seed, "end")
        end = {"share": self.budget.fraction(run.cost, run.steps), "step": run.steps}
        curve.append(end | _score(after.each) | _costs(run.cost))
        trial = Trial(
            seed=seed,
            start=before.each.tolist(),
            end=after.each.tolist(),
            curve=curve,
            history=history,
            cost=asdict(run.cost),
            steps=run.steps,
            model=None if out is None else str(out),
            measures={name: [value, after.measures[name]] for name, value in before.measures.items()},
        )
        samples = entry.samples or kept(self.task, before.drawn, after.drawn, self.samples)
        if not entry.trials and self.task.figure is not None:
            self.ends[entry.label] = after.drawn.samples.values
        return replace(entry, trials=[*entry.trials, trial], samples=samples)


def _described(task: Task) -> dict[str, Any]:
    """The task's entries in comparison.json; `same_prompts` and `caption` only where they are set."""
    always: dict[str, Any] = {name: getattr(task, name) for name in ("name", "title", "description", "unit")}
    return always | {name: getattr(task, name) for name in ("same_prompts", "caption") if getattr(task, name)}


def _settings(task: Task, changes: Mapping[str, Any], budget: Budget) -> Settings:
    """The task's settings with the user's changes; the budget says when to stop, and each trial has its own seed."""
    fields = Settings.__dataclass_fields__
    for name in (*task.settings, *changes):
        if name not in fields:
            raise UnknownName("setting", name, fields, hint=setting_hint(name))
    for name in ("steps", "budget", "seed"):
        if name in changes:
            raise InputError(f"settings must not hold '{name}'; use the comparison's own budget and seeds.")
    chosen = {**task.settings, **changes}
    return Settings(**{**chosen, "steps": None, "budget": budget, "evaluate_every": 0, "progress": False})


def _score(each: Tensor) -> dict[str, float]:
    """The mean over held-out prompts (P,) and its standard error, as an entry of a curve."""
    return {"score": float(each.mean()), "error": float(each.std() / len(each) ** 0.5) if len(each) > 1 else 0.0}


def _costs(cost: Cost) -> dict[str, float]:
    """A cost as an entry of a curve."""
    amounts = {f"cost/{unit}": value for unit, value in asdict(cost).items() if unit != "wall_time"}
    return amounts | {"wall_time": cost.wall_time}


def _card(spec: MethodSpec) -> dict[str, Any]:
    """The method's card with the options and parts of this spec in place of the defaults."""
    card = spec.card.as_dict()
    return card | {"options": {**card["options"], **spec.options}, "parts": spec.recipe().parts()}


def _file_name(label: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-_.=" else "_" for letter in label)


def _command(
    task: Task | str,
    options: Mapping[str, Any] | None,
    settings: Mapping[str, Any] | None,
    specs: Sequence[MethodSpec],
    budget: Budget,
    seeds: int | Sequence[int],
    samples: int,
) -> str:
    """The command that repeats the comparison; empty where no command can."""
    if isinstance(task, Task) or not isinstance(seeds, int):
        return ""
    amount = f"{budget.amount:g}s" if budget.unit == "seconds" else f"{budget.amount:.0f}-{budget.unit}"
    words = ["stepwell", "compare", task, "--methods", ",".join(spec.label for spec in specs)]
    words += ["--budget", amount, "--seeds", str(seeds), "--evaluation-samples", str(samples)]
    for flag, given in (("--set", options), ("--setting", settings)):
        words += [word for name, value in (given or {}).items() for word in (flag, f"{name}={value}")]
    own = {source_of(task), *(spec.card.source for spec in specs)}
    words += [word for source in sorted(own) if source.endswith(".py") for word in ("--plugin", source)]
    return shlex.join(words)


def _made(cores_used: int | None) -> dict[str, Any]:
    """The time, the machine and the versions."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    cores: Callable[[], set[int]] | None = getattr(os, "sched_getaffinity", None) and (lambda: os.sched_getaffinity(0))
    return {
        "when": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": device,
        "cores": len(cores()) if cores else os.cpu_count(),
        "threads": cores_used or torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": versions(),
    }
