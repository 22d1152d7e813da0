"""The laws that every process must obey, as one call that anybody can make on a process of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from stepwell.check.processes import laws, states
from stepwell.check.processes.bench import Bench, trainable
from stepwell.check.tolerance import tolerance as tolerance_of
from stepwell.errors import InputError, Unenumerable
from stepwell.process.base import Process, check_process
from stepwell.ranges import checked
from stepwell.rng import Rng


@dataclass(frozen=True)
class Report:
    """The largest deviation found for each law that was measured, and for each that was skipped the reason."""

    tolerance: float
    measured: Mapping[str, float]
    skipped: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{name}: {value:.2g}" for name, value in self.measured.items()]
        return "\n".join([*lines, *(f"{name}: not checked, {why}" for name, why in self.skipped.items())])


@checked()
def process(
    process: Process,
    prompts: Sequence[Any],
    *,
    rng: Rng | None = None,
    tolerance: float | None = None,
    group: int = 3,
    horizon: int | None = None,
    evaluations_per_step: int | None = None,
) -> Report:
    """Hold a process against the laws of the contract; raise `LawBroken` for the first that it breaks.

    1. *ratio*: the log-probability stored while drawing is what `score` says afterwards, for groups, mixed prompts
       and branches.
    2. *fork*: `state[index]` proposes as the rows it was taken from; continuing a fork leaves the original as it was.
       *absorbing*: advancing a row that is done, by any action, changes neither what `finish` gives of it nor what it
       proposes, and rows that are done change no other row. *rows*: the order and number of rows change no proposal
       and no score. *padding*: neither do more steps on the right or, where prompts differ in length, a wider
       condition on the left.
    3. *seed*: the same call with the same seed gives the same trajectories, bit for bit.
    4. *meter*: counts are whole and additive; a rollout counts each of its steps (rows that share their whole past
       may share its cost) and nothing backward, padding costs nothing, gradients only where they are asked for.
       What one step costs is the process's own matter; where each proposal takes a fixed number of network
       evaluations a row, state it as `evaluations_per_step`.
    5. *gradient*: scores are differentiable in the parameters (held against a finite difference in float64) and 0
       where the mask is False.
    6. *frozen*: the frozen twin has the same scores, cannot learn, spends on the same meter, and stays what it is
       while the original learns.
    7. *exact law*: where one row has at most a thousand outcomes, the probability of each under `rollout` is the one
       that `score` states.

    Give prompts of different lengths where the process knows lengths. `group` rows are drawn for each, of at most
    `horizon` steps. Deviations are relative to 1 + |number|; `tolerance` is by default the rounding of the process's
    network (`stepwell.check.tolerance`). Parameters are perturbed during the check and then restored.

    Example:
        >>> from stepwell.process.exact.table import markov
        >>> report = process(markov(symbols=3, length=3, prompts=2), prompts=[0, 1], evaluations_per_step=1)
        >>> max(report.measured.values()) < report.tolerance
        True
        >>> sorted(report.measured)
        ['absorbing', 'exact law', 'fork', 'frozen', 'gradient', 'meter', 'padding', 'ratio', 'rows', 'seed']
    """
    check_process(process, "process")
    if not prompts:
        raise InputError("prompts must hold at least one prompt to start from, got none.")
    bench = Bench(process, list(prompts), rng or Rng(0), 0.0, group, horizon)
    forks = bench.can_fork()
    bench = replace(bench, group=group if forks else 1)
    drawn = bench.draw()
    if tolerance is None:
        tolerance = tolerance_of(process.module, drawn.trajectories.log_prob.dtype)
    bench = replace(bench, tolerance=tolerance)
    measured: dict[str, float] = {}
    skipped: dict[str, str] = {}
    measured["seed"] = laws.seed(bench, drawn)
    determined = True
    if forks:
        measured["fork"], rows_apart, determined = states.fork(bench)
    else:
        rows_apart = 0.0
        skipped["fork"] = "the process cannot fork"
    found = states.absorbing(bench, forks, determined)
    if isinstance(found, str):
        skipped["absorbing"] = found
    else:
        measured["absorbing"] = found
    rows = bench.with_branch(drawn) if forks and determined else drawn.trajectories
    measured["ratio"] = laws.ratio(bench, rows)
    measured["rows"] = max(rows_apart, laws.rows(bench, rows))
    measured["padding"] = laws.padding(bench, drawn.trajectories)
    measured["meter"] = laws.meter(bench, rows, evaluations_per_step)
    if not trainable(process.module):
        skipped["gradient"] = "no parameter of the module requires a gradient"
    elif not bool(rows.mask.any()):
        skipped["gradient"] = "no step is random, so none is trained"
    else:
        measured["gradient"] = laws.gradient(bench, rows)
    measured["frozen"] = laws.frozen(bench, rows)
    if determined:
        try:
            measured["exact law"] = laws.exact_law(bench)
        except Unenumerable as reason:
            skipped["exact law"] = f"{reason}"
    else:
        skipped["exact law"] = "the process draws more than its actions"
    return Report(bench.tolerance, measured, skipped)
