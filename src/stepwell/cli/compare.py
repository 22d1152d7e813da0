"""The commands that hold methods against each other and against the truth: `stepwell compare`, `report`, `check`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from stepwell.cli.command import Appended, Command, named, removed_if_empty, unused
from stepwell.errors import StepwellError
from stepwell.recipe.options import options_from


@dataclass(kw_only=True)
class Compare(Command):
    """Run methods side by side on a task, from the same start and at equal cost."""

    task: tyro.conf.Positional[str]  # see `stepwell tasks`
    methods: str  # ids with commas between them, with options as in grpo,gspo:low=1e-3,high=2e-3
    budget: str = "60s"  # what each run may spend: 60s, 5m, 200-steps, 2M-tokens, ...
    seeds: int = 3  # runs of each method; the same seeds for all
    set: Appended = ()  # an option of the task, as name=value
    setting: Appended = ()  # a setting of `stepwell train` to use instead of the task's, as name=value
    evaluation_samples: int = 8  # samples for each held-out prompt
    keep_runs: bool = False  # keep each run's log and model
    out: str | None = None  # the folder for results and page; a new one below runs/ unless given
    progress: bool = True  # show how it goes

    def run(self) -> None:
        self.load_plugins()
        from stepwell.comparison.report.page import write_report
        from stepwell.comparison.report.table import print_comparison
        from stepwell.comparison.run import compare

        out = Path(named(self.out)) if self.out is not None else unused(Path("runs") / f"compare-{self.task}")
        with removed_if_empty(str(out)):
            found = compare(
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
        print_comparison(found)
        if not found.complete:
            label, error = next(iter(found.errors.items()))
            raise StepwellError(f"Every method failed; the first, {label}, at {error}")
        print(f"The page is {write_report(found, out / 'report.html')}.")
        if found.errors:
            failed = "; ".join(f"{label} at {error}" for label, error in found.errors.items())
            raise StepwellError(f"Some methods failed: {failed}")


@dataclass(kw_only=True)
class Report(Command):
    """Draw runs into one self-contained page."""

    runs: tyro.conf.Positional[tuple[str, ...]]  # folders of runs, or of one comparison
    out: str = "report.html"  # the page

    def run(self) -> None:
        self.load_plugins()
        from stepwell.comparison.report.runs import report_runs

        print(f"The page is {report_runs(self.runs, named(self.out))}.")


@dataclass(kw_only=True)
class Check(Command):
    """Hold methods to their laws and to the exact answers their cards name; all methods unless some are given."""

    methods: tyro.conf.Positional[tuple[str, ...]] = ()  # ids

    def run(self) -> None:
        self.load_plugins()
        from stepwell import methods
        from stepwell.check.methods import check_method
        from stepwell.cli.printing import print_table

        for card in [methods.get(name) for name in self.methods or methods.names()]:
            report = check_method(card)  # type: ignore[arg-type]
            print_table(
                (f"{card.id}: law", "largest deviation"), [(law, f"{error:.1e}") for law, error in report.items()]
            )
