"""The command that draws: `stepwell sample`, from a pipeline of diffusers, a function of one's own, or a task."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import tyro

from stepwell.cli import processes
from stepwell.cli.command import Appended, Command, in_own_file, named, removed_if_empty, unused
from stepwell.cli.processes import FlowOptions, Kind
from stepwell.errors import InputError
from stepwell.recipe.options import options_from, value_from


@dataclass(kw_only=True)
class Sample(Command):
    """Draw samples from a flow or a diffusion model, with any solver."""

    pipeline: str | None = None  # a folder or hub id of a text-to-image pipeline of diffusers
    model: str | None = None  # your own: my.py:velocity with its --shape, or my.py:make_process
    task: str | None = None  # or what a task starts from, see `stepwell tasks`
    set: Appended = ()  # an option of the task, as name=value
    lora: str | None = None  # a folder with an adapter for the pipeline, such as a run's
    prompt: Appended = ()  # what to draw; repeat it for several
    data: str | None = None  # prompts from a file instead: .jsonl, .json, .csv, .parquet or a folder of `datasets`
    prompt_column: str = "prompt"  # the column of the data that holds the prompts
    samples: int = 4  # for each prompt
    steps: int | None = None  # of the solver
    seed: int = 0  # decides every number
    rows_at_once: int | None = None  # less memory; other random numbers, from the same law
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # what a pipeline's parameters are held in
    device: str | None = None  # of a pipeline: cpu, cuda, ...; the accelerator, if there is one, unless given
    format: Literal["png", "npy", "safetensors", "json"] | None = None  # png for images, else npy, unless given
    out: str | None = None  # the folder for the samples; a new one below runs/ unless given
    flow: tyro.conf.OmitArgPrefixes[FlowOptions] = field(default_factory=FlowOptions)

    def run(self) -> None:
        self.load_plugins()
        from stepwell import api
        from stepwell.data.prompts import load_prompts
        from stepwell.sampling import export

        kind = self._kind()
        processes.refuse_unused(self, kind)
        law = self.flow.law(self.steps)
        api.check_amounts(self.samples, self.seed, self.rows_at_once)
        if self.set and kind != "task":
            raise InputError("--set is an option of a task; name one with --task, or leave it out.")
        if self.prompt and self.data is not None:
            raise InputError("Prompts come from --prompt or from --data, not from both.")
        prompts: Any = [word if kind == "pipeline" else value_from(word) for word in self.prompt] or None
        if self.data is not None:
            prompts = [row.value for row in load_prompts(self.data, self.prompt_column, anything=True)]
        out = Path(named(self.out)) if self.out is not None else unused(Path("runs") / "sample")
        with removed_if_empty(str(out)), in_own_file(self.model if kind == "own" else None):
            export.check_place(out)
            process = self._process(kind, law)
            prompts = self._prompts(process, prompts)
            begin = time.monotonic()
            drawn = api.sample(process, prompts, self.samples, seed=self.seed, rows_at_once=self.rows_at_once)
            seconds = time.monotonic() - begin
            about = self._about(process, kind)
            files = drawn.save(out, self.format, **about)
        self._print(drawn, about, seconds)
        print(f"{self._written(files)} in {out}.")

    def _kind(self) -> Kind:
        """Which of --pipeline, --model and --task says what is drawn from."""
        given = [name for name in ("pipeline", "model", "task") if getattr(self, name) is not None]
        if len(given) != 1:
            raise InputError("Name what to draw from with one of --pipeline, --model and --task.")
        if given[0] == "model" and processes.kind_of(self.model or "") == "language":
            raise InputError(f"--model is '{self.model}', which is no flow; my.py:NAME or --pipeline FOLDER is right.")
        if given[0] == "model":
            return processes.kind_of(self.model or "")
        return "pipeline" if given[0] == "pipeline" else "task"

    def _process(self, kind: Kind, law: dict[str, Any]) -> Any:
        from stepwell.process.flow.process import Flow

        if kind == "pipeline":
            processes.quieten_transformers()
            return processes.pipeline_process(self.pipeline or self.model or "", self, law, lora=self.lora)
        if kind == "own":
            process = processes.own_process(self.model or "", self.flow, law)
        else:
            from stepwell.tasks.registry import get_task

            self._task = get_task(self.task or "", **options_from(self.set))
            process = processes.ready(self._task.process(), self.flow, law)
        if not isinstance(process, Flow):
            raise InputError(f"`stepwell sample` draws from flows; this is a {type(process).__name__}.")
        return process

    def _prompts(self, process: Any, given: list[Any] | None) -> list[Any]:
        """What was asked for; else every prompt that a task is judged on, or none where the flow is told none."""
        if process.encode is None:
            if given:
                raise InputError("This flow is told no prompt; leave --prompt and --data out.")
            return [None]
        if given:
            return given
        if self.task is None:
            raise InputError("There is nothing to draw; give --prompt, once for each, or --data FILE.")
        return list({repr(prompt.value): prompt.value for prompt in self._task.evaluation}.values())

    def _about(self, process: Any, kind: Kind) -> dict[str, Any]:
        """What samples.json says of how they were drawn."""
        law = process.sampler
        names = list(dict.fromkeys(table.name for table in law.tables))
        model = {"pipeline": self.pipeline or self.model, "own": self.model}.get(kind, self.task)
        about = {"model": model, "solver": ", ".join(names), "steps": len(law.tables), "times": list(law.times)}
        return about | {"guidance": law.guidance, "seed": self.seed}

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
