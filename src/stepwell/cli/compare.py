"""The commands that compare methods and check them: `stepwell compare`, `report` and `check`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from stepwell.cli.command import Appended, Command, Flag, named, removed_if_empty, unused
from stepwell.cli.processes.options import File
from stepwell.errors import StepwellError
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
    set: Appended = ()  # an option of the task, as name=value
    setting: Appended = ()  # a setting of `stepwell train` to use instead of the task's, as name=value
    evaluation_samples: int = 8  # samples for each held-out prompt
    keep_runs: Flag = False  # keep each run's log and model
    out: File = None  # the folder for the results and their page; a new one below runs/ unless given
    progress: Flag = True  # do not show the progress

    def run(self) -> None:
        self.load_plugins()
        from stepwell.comparison.specs import parse_specs
        from stepwell.tasks.registry import entry_of

        parse_specs(self.methods), entry_of(self.task)  # refused before torch is loaded
        from stepwell.comparison.report.page import write_report
        from stepwell.comparison.report.table import print_comparison
        from stepwell.comparison.run import compare

        out = Path(named(self.out)) if self.out is not None else unused(Path("runs") / f"compare-{self.task}")
        with removed_if_empty(str(out)):
            result = compare(
                self.task,
                self.methods,
                budget=self.budget,
                seeds=self.seeds,
                out=out,
                options=options_from(self.set),
                settings=options_from(self.setting),
                evaluation_samples=self.evaluation_samples,
                keep_runs=self.keep_runs,
                progress=self.progress,
            )
        print_comparison(result)
        if not result.complete:
            label, error = next(iter(result.errors.items()))
            raise StepwellError(f"Every method failed; the first, {label}, at {error}")
        print(f"The page is {write_report(result, out / 'report.html')}.")
        if result.errors:
            failed = "; ".join(f"{label} at {error}" for label, error in result.errors.items())
            raise StepwellError(f"Some methods failed: {failed}")


@dataclass(kw_only=True)
class ReportRuns(Command):
    """Draw the curves of runs, or a comparison, on one self-contained page."""

    runs: Folders  # the folders of runs, or of one comparison
    out: str = "report.html"  # the file of the page

    def run(self) -> None:
        self.load_plugins()
        from stepwell.comparison.report.runs import report_runs

        print(f"The page is {report_runs(self.runs, named(self.out))}.")


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
