"""The commands that compare methods and check them: `stepwell compare`, `report` and `check`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from stepwell.cli.command import Appended, Command, Flag, absolute, named, removed_if_empty, unused
from stepwell.cli.naming import refuse_options, shared_options
from stepwell.cli.processes.options import File
from stepwell.cli.train import SETTINGS
from stepwell.errors import InputError, StepwellError
from stepwell.recipe.options import options_from

TaskName = tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="TASK")]]
Folders = tyro.conf.Positional[Annotated[tuple[str, ...], tyro.conf.arg(metavar="FOLDER ...", help_behavior_hint="")]]
Ids = tyro.conf.Positional[Annotated[tuple[str, ...], tyro.conf.arg(metavar="ID ...", help_behavior_hint="")]]


@dataclass(kw_only=True)
class Compare(Command):
    """Run methods side by side on a task, from the same start and at equal cost."""

    task: TaskName  # the name of a task, see `stepwell tasks`
    methods: str  # ids with commas between them, and options as in grpo,gspo:low=1e-3,high=2e-3
    budget: str = "60s"  # what each run may spend: 60s, 5m, 200-steps, 2M-tokens, ...
    seeds: int = 3  # runs of each method, with the same seeds for all methods
    set: Appended = ()  # an option as name=value: of all methods, or of the task
    setting: Appended = ()  # a setting of the run, an argument of `stepwell train`, as name=value
    evaluation_samples: int = 8  # samples for each held-out prompt
    keep_runs: Flag = False  # keep each run's log and model
    out: File = None  # the folder for the results and their page; a new one below runs/ unless given
    resume: Flag = False  # go on with the comparison in the folder: the runs that are done are kept
    progress: Flag = True  # do not show the progress

    prints = False

    def folder(self) -> Path | None:
        return absolute(self.out)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._place: Path | None = None

    def interrupted(self) -> str:
        if self._place is None or not (self._place / "comparison.json").is_file():
            return "interrupted"
        from stepwell.comparison.results import Comparison

        done = sum(len(entry.trials) for entry in Comparison.load(self._place).entries)
        kept = "1 finished run is" if done == 1 else f"{done} finished runs are"
        again = "" if self.out is not None else f" --out {self._place}"
        return f"interrupted; {kept} kept in {self._place}; the same command with{again} --resume goes on from there"

    def run(self) -> None:
        self.load_plugins()
        from stepwell.comparison.specs import parse_specs
        from stepwell.tasks.registry import entry_of

        specs, entry = parse_specs(self.methods), entry_of(self.task)  # refused before torch is loaded
        settings = options_from(self.setting)
        options, shared = shared_options(options_from(self.set), specs, entry, SETTINGS)
        refuse_options(settings, specs, entry, SETTINGS)
        methods = [spec.label for spec in parse_specs(self.methods, shared)]
        from stepwell.comparison.report.page import write_report
        from stepwell.comparison.report.table import print_comparison
        from stepwell.comparison.run import compare

        if self.resume and self.out is None:
            raise InputError("--resume needs --out: the folder of the comparison to go on with.")
        out = Path(named(self.out)) if self.out is not None else unused(Path("runs") / f"compare-{self.task}")
        self._place = out
        with removed_if_empty(str(out)):
            result = compare(
                self.task,
                methods,
                budget=self.budget,
                seeds=self.seeds,
                out=out,
                options=options,
                settings=settings,
                evaluation_samples=self.evaluation_samples,
                keep_runs=self.keep_runs,
                progress=self.progress,
                resume=self.resume,
            )
        print_comparison(result)
        if not result.complete:
            label, error = next(iter(result.errors.items()))
            raise StepwellError(f"Every method failed; the first, {label}, at {error}")
        self.say(f"The page is {write_report(result, out / 'report.html')}.")
        if result.errors:
            failed = "; ".join(f"{label} at {error}" for label, error in result.errors.items())
            raise StepwellError(f"Some methods failed: {failed}")


@dataclass(kw_only=True)
class ReportRuns(Command):
    """Draw the curves of runs, or a comparison, on one self-contained page."""

    runs: Folders  # the folders of runs, or of one comparison
    out: str = "report.html"  # the file of the page

    prints = False

    def run(self) -> None:
        self.load_plugins()
        from stepwell.comparison.report.runs import report_runs

        self.say(f"The page is {report_runs(self.runs, named(self.out))}.")


@dataclass(kw_only=True)
class Check(Command):
    """Check methods against their laws and the exact answers on their cards; all methods unless some are given."""

    methods: Ids = ()  # the ids of methods

    def run(self) -> None:
        self.load_plugins()
        from stepwell import methods

        cards = [methods.get(name) for name in self.methods or methods.names()]  # refused before torch is loaded
        from stepwell.check.methods import check_method
        from stepwell.cli.printing import print_table

        for card in cards:
            report = check_method(card)  # type: ignore[arg-type]
            print_table(
                (f"{card.id}: law", "largest deviation"), [(law, f"{error:.1e}") for law, error in report.items()]
            )
