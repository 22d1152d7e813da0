"""The command that draws: `stepwell sample`, from a pipeline of diffusers, a function of one's own, or a task."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from stepwell.cli.command import Appended, Command, absolute, in_own_file, named, removed_if_empty, unused
from stepwell.cli.processes.base import Kind, kind_called, kind_of, refuse_unused
from stepwell.cli.processes.options import File, LoadingOptions, Text, WeightsOptions, Whole
from stepwell.cli.processes.own import FunctionOptions
from stepwell.cli.processes.pipeline import ImageOptions
from stepwell.cli.processes.solver import SolverOptions
from stepwell.errors import InputError
from stepwell.recipe.options import options_from, value_from

if TYPE_CHECKING:
    from stepwell.process.abilities import Denoising
    from stepwell.tasks.registry import Task

Format = Annotated[
    Literal["png", "npy", "safetensors", "json"] | None,
    tyro.conf.arg(metavar="{png,npy,safetensors,json}", help_behavior_hint=""),
]


@dataclass(kw_only=True)
class Sample(Command):
    """Draw samples from a flow or a diffusion model, with any solver."""

    pipeline: File = None  # a text-to-image pipeline of diffusers: a folder or a hub id
    model: Text = None  # your own: my.py:velocity with its --shape, or my.py:make_process
    task: Text = None  # the start of a task, see `stepwell tasks`
    set: Appended = ()  # an option of the task, as name=value
    lora: File = None  # a folder with an adapter for the pipeline, such as a run's
    prompt: Appended = ()  # a prompt to draw samples of
    data: File = None  # prompts from a file instead: .jsonl, .json, .csv, .parquet or a folder of `datasets`
    prompt_column: str = "prompt"  # the column of the data that holds the prompts
    samples: int = 4  # samples for each prompt
    steps: Whole = None  # steps of the solver; the model's own number unless given
    seed: int = 0  # decides every random number
    rows_at_once: Whole = None  # use less memory; other random numbers, the same distribution
    format: Format = None  # the format of the files; png for images and npy for anything else unless given
    out: File = None  # the folder for the samples; a new one below runs/ unless given
    solver: tyro.conf.OmitArgPrefixes[SolverOptions] = field(default_factory=SolverOptions)
    image: tyro.conf.OmitArgPrefixes[ImageOptions] = field(default_factory=ImageOptions)
    loading: tyro.conf.OmitArgPrefixes[LoadingOptions] = field(default_factory=LoadingOptions)
    function: tyro.conf.OmitArgPrefixes[FunctionOptions] = field(default_factory=FunctionOptions)
    start: tyro.conf.OmitArgPrefixes[WeightsOptions] = field(default_factory=WeightsOptions)

    prints = False

    def folder(self) -> Path | None:
        return absolute(self.out)

    def run(self) -> None:
        self.load_plugins()
        kind, model = self._named()  # refused before torch is loaded
        refuse_unused(self, kind)
        self.sampler_settings()
        from stepwell import api
        from stepwell.data.prompts import load_prompts
        from stepwell.sampling import export

        api.check_count("--samples", self.samples)
        api.check_count("--rows-at-once", self.rows_at_once)
        api.check_seed("--seed", self.seed)
        if self.set and self.task is None:
            raise InputError("--set needs --task: it sets an option of a task.")
        if self.prompt and self.data is not None:
            raise InputError("--prompt and --data must not be given together: both are the prompts.")
        prompts: Any = [word if kind.name == "pipeline" else value_from(word) for word in self.prompt] or None
        if self.data is not None:
            prompts = [row.value for row in load_prompts(self.data, self.prompt_column, anything=True)]
        out = Path(named(self.out)) if self.out is not None else unused(Path("runs") / "sample")
        with removed_if_empty(str(out)), in_own_file(self.model):
            export.check_place(out)
            process = self._flow(kind, model)
            prompts = self._prompts(process, prompts)
            begin = time.monotonic()
            drawn = api.sample(process, prompts, self.samples, seed=self.seed, rows_at_once=self.rows_at_once)
            seconds = time.monotonic() - begin
            about = {"model": model} | self._about(process)
            files = drawn.save(out, self.format, **about)
        self._print(drawn, about, seconds)
        self.say(f"{self._written(files)} in {out}.")

    def sampler_settings(self) -> dict[str, Any]:
        """The settings of the flow's sampler that were given."""
        return self.solver.settings(self.steps)

    def built_task(self) -> Task:
        """The task that --task names."""
        from stepwell.tasks.registry import get_task

        return get_task(self.task or "", **options_from(self.set))

    def _named(self) -> tuple[Kind, str]:
        """The kind of model, and its name: the value of --pipeline, --model or --task."""
        models = {name: getattr(self, name) for name in ("pipeline", "model", "task")}
        models = {name: value for name, value in models.items() if value is not None}
        if len(models) != 1:
            words = " and ".join(f"--{name}" for name in models) or "none of them"
            raise InputError(f"Exactly one of --pipeline, --model and --task must be given, got {words}.")
        ((name, model),) = models.items()
        if name == "task":
            from stepwell.tasks.registry import entry_of

            entry_of(model)  # raises for an unknown one
        if name != "model":
            return kind_called(name), model
        kind = kind_of(model)
        if kind.process not in ("flow", None):
            raise InputError(f"--model must be a flow, as my.py:NAME or the folder of a pipeline, got '{model}'.")
        return kind, model

    def _flow(self, kind: Kind, model: str) -> Any:
        """The process to draw from; raises `InputError` for one that is not a flow."""
        from stepwell.process.abilities import Denoising

        process = kind.build(model, self, self.lora)
        if not isinstance(process, Denoising):
            raise InputError(f"`stepwell sample` draws from flows, got a {type(process).__name__} from '{model}'.")
        return process

    def _prompts(self, process: Denoising, prompts: list[Any] | None) -> list[Any]:
        """The prompts given, else the task's evaluation prompts, else [None] for an unconditional flow."""
        if process.encode is None:
            if prompts:
                raise InputError("--prompt and --data must be left out: this flow is unconditional.")
            return [None]
        if prompts:
            return prompts
        if self.task is None:
            raise InputError("--prompt or --data must be given: this flow is conditioned on prompts.")
        return list({repr(prompt.value): prompt.value for prompt in self.built_task().evaluation}.values())

    def _about(self, process: Denoising) -> dict[str, Any]:
        """The sampler in samples.json."""
        sampler = process.sampler
        names = ", ".join(dict.fromkeys(table.name for table in sampler.tables))
        about = {"solver": names, "steps": len(sampler.tables), "times": list(sampler.times)}
        return about | {"guidance": sampler.guidance, "seed": self.seed}

    def _print(self, drawn: Any, about: dict[str, Any], seconds: float) -> None:
        from stepwell.cli.printing import print_table

        each = drawn.cost.model_evaluations / len(drawn)
        columns = ("solver", "steps", "samples", "evaluations", "a sample", "seconds")
        row = (about["solver"], f"{about['steps']}", f"{len(drawn)}", f"{drawn.cost.model_evaluations}", f"{each:g}")
        print_table(columns, [(*row, f"{seconds:.2f}")])

    def _written(self, files: list[Path]) -> str:
        names = [file.name for file in files if file.name != "samples.json"]
        if "grid.png" in names:
            return f"{len(names) - 1} images, and all of them in grid.png, are"
        return f"{names[0] if names else 'samples.json'} is"
