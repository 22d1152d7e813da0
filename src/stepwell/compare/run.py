"""Methods side by side: the same start, the same seeds, the same prompts, the same budget."""

from __future__ import annotations

import datetime
import os
import platform
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepwell.compare.progress import Progress
from stepwell.compare.results import Comparison, Entry, Trial
from stepwell.compare.specs import MethodSpec, parse_specs
from stepwell.compare.tasks import Task, get_task, source_of
from stepwell.compare.warm_start import threads
from stepwell.errors import InputError, UnknownName
from stepwell.meter import Budget, Cost, Meter
from stepwell.process.base import Process
from stepwell.rng import Rng
from stepwell.rollout import Drawn
from stepwell.train.log import versions
from stepwell.train.loop import evaluate, train
from stepwell.train.settings import Settings, with_settings
from stepwell.writing import writable_folder

POINTS = 10
"""Evaluations on the way, at equal shares of the budget."""
SHOWN = 12
"""Held-out prompts whose completions are kept."""


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
) -> Comparison:
    """Train each method from the task's start with the same budget, and judge all on the same held-out prompts.

    `methods` are written as in `parse_specs`; `seeds` are a number of them (0, 1, ...) or the seeds themselves, the
    same for all methods: a seed decides the order of the prompts, the random numbers of rollouts and of evaluation.
    Methods take turns, seed by seed, and the first of the turn moves on each time, so that a machine that slows down
    slows all alike. Every run evaluates `POINTS` times on the way; the time this takes is not the run's, nor
    is the first use of a process, which one step that does not count takes care of.

    `options` are the task's, where it is given by name; `settings` take precedence over the task's own settings.
    `out` receives comparison.json after every run, and with `keep_runs` each run's log and model.

    A method that fails loses its own results only; `Comparison.errors` says which and why. Raises `StepwellError`
    for what is wrong in the request, before anything is trained.
    """
    specs = parse_specs(methods)
    whole = Budget.parse(budget) if isinstance(budget, str) else budget
    chosen = list(range(seeds)) if isinstance(seeds, int) else [int(seed) for seed in seeds]
    if not chosen or len(set(chosen)) < len(chosen):
        raise InputError(f"A comparison needs at least one seed, each once, not {seeds}.")
    if evaluation_samples < 1:
        raise InputError(f"There are {evaluation_samples} samples for each held-out prompt; at least 1 is right.")
    if isinstance(task, Task) and options:
        raise InputError("Options belong to a task that is given by name; this one is built already.")
    built = task if isinstance(task, Task) else get_task(task, **(options or {}))
    common = _settings(built, settings or {}, whole)
    folder = None if out is None else writable_folder(out)
    if keep_runs and folder is None:
        raise InputError("Runs can only be kept in a folder; name one with `out`.")
    for spec in specs:
        with_settings(spec.recipe(), common)  # what a method cannot do is known before the first is trained
        kept = None if folder is None else folder / "runs" / _file_name(spec.label)
        if keep_runs and kept is not None and kept.exists():
            raise InputError(f"'{kept}' holds runs of an earlier comparison; remove it or choose another folder.")
    command = _command(task, options, settings, specs, whole, seeds, evaluation_samples)
    runner = _Runner(built, whole, common, evaluation_samples, folder if keep_runs else None)
    result = Comparison(
        task={name: getattr(built, name) for name in ("name", "title", "description", "unit")}
        | {"options": dict(options or {})},
        budget=str(whole),
        budget_unit=whole.unit,
        seeds=chosen,
        entries=[Entry(spec.label, spec.card.id, spec.options, _card(spec)) for spec in specs],
        settings={k: v for k, v in common.as_dict().items() if k not in ("seed", "budget", "progress", "trackers")},
        evaluation={"prompts": len(built.evaluation), "samples": evaluation_samples},
        made=_made(built.threads) | {"command": command},
    )
    runs = len(specs) * len(chosen)
    with threads(built.threads), Progress(progress, built.title, str(whole), runs) as view:
        view.say("starting the process")
        runner.warm(specs[0], whole)
        for turn, seed in enumerate(chosen):
            view.say(f"seed {seed}: judging the start")
            before = runner.judge(built.process(), seed, "start")
            for place in range(len(specs)):
                number = (turn + place) % len(specs)
                entry = result.entries[number]
                if entry.error is None:
                    done = runner.run(entry, specs[number], seed, before, view)
                    result = replace(result, entries=[done if e is entry else e for e in result.entries])
                    if folder is not None:
                        result.save(folder)
                view.next()
    return result


class _Runner:
    """What all runs of a comparison have in common."""

    def __init__(self, task: Task, budget: Budget, settings: Settings, samples: int, folder: Path | None):
        self.task, self.budget, self.settings, self.samples, self.folder = task, budget, settings, samples, folder

    def warm(self, spec: MethodSpec, budget: Budget) -> None:
        """One step that counts for nothing: what a process does only once must not be the first method's time."""
        if budget.unit == "seconds":
            settings = replace(self.settings, budget=None, steps=1)
            train(self.task.process(), spec.recipe(), self.task.prompts, self.task.rewards, settings)

    def judge(self, process: Process, seed: int, *when: object, samples: int | None = None) -> tuple[Tensor, Drawn]:
        """The mean reward on each held-out prompt (P,), and what was drawn; nothing of it is on the meter."""
        rng = Rng(seed).split("comparison", *when)
        found = evaluate(process, self.task.evaluation, self.task.rewards, rng, samples or self.samples)
        return found.each, found.drawn

    def run(self, entry: Entry, spec: MethodSpec, seed: int, before: tuple[Tensor, Drawn], view: Progress) -> Entry:
        """The entry with one trial more, or with what went wrong."""
        try:
            return self._run(entry, spec, seed, before, view)
        except Exception as error:
            said = " ".join(str(error).split())
            return replace(entry, error=f"seed {seed}: {type(error).__name__}: {said}")

    def _run(self, entry: Entry, spec: MethodSpec, seed: int, before: tuple[Tensor, Drawn], view: Progress) -> Entry:
        process = self.task.process()
        history: list[dict[str, Any]] = []
        curve: list[dict[str, Any]] = [{"share": 0.0, "step": 0} | _score(before[0]) | _costs(Cost())]
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

        where = None if self.folder is None else self.folder / "runs" / _file_name(spec.label) / f"seed-{seed}"
        run = train(
            process,
            spec.recipe(),
            self.task.prompts,
            self.task.rewards,
            replace(self.settings, seed=seed),
            out=where,
            on_step=on_step,
            config={
                "method": spec.card.id,
                "options": spec.options,
                "card": spec.card.as_dict(),
                "task": self.task.name,
            },
        )
        after = self.judge(process, seed, "end")
        end = {"share": self.budget.fraction(run.cost, run.steps), "step": run.steps}
        curve.append(end | _score(after[0]) | _costs(run.cost))
        trial = Trial(
            seed=seed,
            start=before[0].tolist(),
            end=after[0].tolist(),
            curve=curve,
            history=history,
            cost=asdict(run.cost),
            steps=run.steps,
            model=None if where is None else str(where),
        )
        samples = entry.samples or self._samples(before[1], after[1])
        return replace(entry, trials=[*entry.trials, trial], samples=samples)

    def _samples(self, before: Drawn, after: Drawn) -> list[dict[str, Any]]:
        """The first completion of a few held-out prompts, spread over all of them, before and after."""
        number = len(self.task.evaluation)
        places = [i * number // min(SHOWN, number) * self.samples for i in range(min(SHOWN, number))]
        found = []
        few = [drawn[torch.tensor(places)] for drawn in (before, after)]
        rewards = [self.task.rewards(drawn, Meter()).total.tolist() for drawn in few]
        for row, prompt in enumerate(few[0].prompts):
            shown = [self.task.show(prompt, drawn.samples.values[row]) for drawn in few]
            found.append(
                {"prompt": prompt.value, "before": shown[0], "before_reward": rewards[0][row]}
                | {"after": shown[1], "after_reward": rewards[1][row]}
            )
        return found


def _settings(task: Task, changes: Mapping[str, Any], budget: Budget) -> Settings:
    """The task's settings with the user's changes; how long to run is the budget's to say, and the seed the trial's."""
    fields = Settings.__dataclass_fields__
    for name in (*task.settings, *changes):
        if name not in fields:
            raise UnknownName("setting", name, fields)
    for name in ("steps", "budget", "seed"):
        if name in changes:
            raise InputError(f"'{name}' is not a setting of a comparison; use its budget and its seeds.")
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
    """The method's card with the options and parts of this spec, not those by default."""
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
    """What to type to do it again; empty where the command line cannot say it."""
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
    """When, on what machine and with which versions."""
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
