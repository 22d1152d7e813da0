"""Scores of given trajectories under a flow: log-densities, entropies, KL, and predictions at drawn points."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from stepwell.columns import Columns
from stepwell.distributions import Gaussian
from stepwell.errors import InputError, MissingAbility
from stepwell.process.base import Process, Scores
from stepwell.process.flow.denoiser import Denoiser
from stepwell.process.flow.sampler import SamplerSettings
from stepwell.solver.exponential import coefficients
from stepwell.trajectories import Trajectories


@dataclass(frozen=True)
class TrainedSteps:
    """The trained steps of a batch, one after another: row and step (M,), and their distributions (M, *D)."""

    row: Tensor
    step: Tensor
    distribution: Gaussian

    def table(self, values: Tensor, rows: Trajectories) -> Tensor:
        """(M, ...) as (N, T, ...), 0 elsewhere."""
        return values.new_zeros(*rows.mask.shape, *values.shape[1:]).index_put((self.row, self.step), values)


def scores(
    denoiser: Denoiser,
    sampler: SamplerSettings,
    rows: Trajectories,
    needs: Collection[str],
    context: Columns | None,
    reference: Process | None = None,
) -> Scores:
    """Everything that `Flow.score` offers, computed together where it can be. `reference` is asked for its means."""
    condition = rows.condition if context is None else context
    if condition is None and denoiser.encode is not None:
        raise InputError("Trajectories without a condition cannot be scored; give `context=process.condition(...)`.")
    condition = None if condition is None else condition.to(denoiser.device)
    device, given = rows.mask.device, rows
    rows = given.to(denoiser.device)
    steps = _steps(denoiser, sampler, rows, condition, shared=context is None)
    action, distribution = rows.action[steps.row, steps.step].to(denoiser.dtype), steps.distribution
    numbers = {"log_prob": steps.table(distribution.log_prob(action).double(), rows)}
    if "entropy" in needs:
        numbers["entropy"] = steps.table(distribution.entropy(), rows)
    if "mean" in needs:
        numbers["mean"] = steps.table(distribution.mean, rows)
    if "deviation" in needs:
        scale = distribution.standard_deviation.reshape(len(steps.row), -1)[:, 0]
        numbers["deviation"] = steps.table(scale.detach(), rows)
    if "step_size" in needs:
        times = torch.tensor(sampler.times, dtype=torch.float64, device=denoiser.device)
        numbers["step_size"] = steps.table((times[steps.step - 1] - times[steps.step]), rows)
    if "kl" in needs:
        assert reference is not None
        with torch.no_grad():
            mean = reference.score(given, ("mean",), context)["mean"].to(denoiser.device)
        other = Gaussian(mean[steps.row, steps.step], distribution.standard_deviation)
        numbers["kl"] = steps.table(distribution.kl(other), rows)
    if {"forward", "denoised"} & set(needs):
        numbers |= _forward(denoiser, rows, condition, needs)
    for need in {"sample", "pinned"} & set(needs):
        numbers[need] = _sample(denoiser, sampler, rows, condition, pinned=need == "pinned")
    numbers = {name: value.to(device) for name, value in numbers.items()}
    return Scores(numbers.pop("log_prob"), numbers)


def _steps(
    denoiser: Denoiser, sampler: SamplerSettings, rows: Trajectories, condition: Columns | None, shared: bool
) -> TrainedSteps:
    """All trained steps. The network is asked once for each state, however many rows share it."""
    row, step = rows.mask.nonzero(as_tuple=True)
    if _remembers(sampler, (step.unique() - 1).tolist()):
        return _replayed(denoiser, sampler, rows, condition)
    if len(step) and int(step.max()) > len(sampler.tables):
        raise InputError(
            f"A trained step {int(step.max())} lies beyond the {len(sampler.tables)} steps of the sampler it is "
            "scored under; score it with the steps it was drawn with."
        )
    x = rows.action[row, step - 1].to(denoiser.dtype)
    first, place = _distinct(rows, row, step, x) if shared else (torch.arange(len(row)), torch.arange(len(row)))
    times = torch.tensor(sampler.times, dtype=denoiser.dtype, device=denoiser.device)
    own = None if condition is None else condition[row[first]]
    raw = denoiser.predict_in_pieces(x[first], times[step[first] - 1], own, sampler.guidance)[place]
    mean, scale = torch.zeros_like(x), x.new_zeros(len(x))
    parts, order = [], []
    for k in (step.unique() - 1).tolist():
        places = (step == k + 1).nonzero()[:, 0]
        time, target = sampler.times[k], sampler.times[k + 1]
        numbers = coefficients(denoiser.path, sampler.tables[k], (time,), target)
        if not numbers.noise > 0.0:
            raise InputError(
                f"Step {k + 1} was drawn at random and is scored under a sampler in which it is deterministic; score "
                "it with the solver it was drawn with."
            )
        prediction = denoiser.convert(raw[places], x[places], time, numbers.predicts)
        parts.append(numbers.mean(x[places], (prediction,)))
        order.append(places)
        scale[places] = numbers.noise
    if parts:
        mean = torch.cat(parts)[torch.cat(order).argsort()]
    return TrainedSteps(row, step, Gaussian(mean, scale.reshape(-1, *[1] * (x.dim() - 1))))


def _remembers(sampler: SamplerSettings, steps: Collection[int]) -> bool:
    """True where the distribution of one of these steps depends on more than the state that it leaves."""
    tables = sampler.tables
    return any(tables[k].remembers or (k > 0 and tables[k - 1].corrector) for k in steps if k < len(tables))


def _distinct(rows: Trajectories, row: Tensor, step: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """The first of each set of steps that leave the same state (F,), and each step's place among these (M,)."""
    node = rows.node[row, step - 1]
    _, place = node.unique(return_inverse=True)
    order = torch.arange(len(node), device=node.device)
    count = int(place.max()) + 1 if len(place) else 0
    first = torch.full((count,), len(node), device=node.device).scatter_reduce(0, place, order, "amin")
    if not torch.equal(x, x[first][place]):  # rows that were put together without renumbering their nodes
        return order, order
    return first, place


def _replayed(
    denoiser: Denoiser, sampler: SamplerSettings, rows: Trajectories, condition: Columns | None
) -> TrainedSteps:
    """The trained steps of a solver that remembers: every row is gone through again from its noise on."""
    history, parts = None, []
    last = int(rows.mask.nonzero()[:, 1].max())
    predict = denoiser.predictor(condition, sampler.guidance)
    for k in range(last):
        x, table = rows.action[:, k].to(denoiser.dtype), sampler.tables[k]
        trained = rows.mask[:, k + 1]
        distribution, history = sampler.schedule.propose(
            predict, x, k, denoiser.path, history, output=denoiser.predicts
        )
        untrained = ~trained & (rows.length > k + 1)
        if table.corrector and isinstance(distribution, Gaussian) and bool(untrained.any()):
            raise MissingAbility(
                f"The solver '{table.name}' corrects a step by how it was drawn, so it cannot score rows of which step "
                f"{k + 1} is not trained; train all steps, or choose a solver without a corrector."
            )
        places = trained.nonzero()[:, 0]
        if len(places):
            assert isinstance(distribution, Gaussian)
            scale = distribution.standard_deviation.expand(len(x)).reshape(-1, *[1] * (x.dim() - 1))
            parts.append((places, torch.full_like(places, k + 1), distribution.mean[places], scale[places]))
    row, step, mean, scale = (torch.cat(column) for column in zip(*parts, strict=True))
    return TrainedSteps(row, step, Gaussian(mean, scale))


def _points(rows: Trajectories, names: Collection[str], asked_by: str) -> list[Tensor]:
    if rows.points is None or any(name not in rows.points for name in names):
        raise MissingAbility(
            f"A method needs '{asked_by}', which reads {', '.join(sorted(names))} of the rows' points; a term has to "
            "draw them."
        )
    return [rows.points[name] for name in names]


def _forward(
    denoiser: Denoiser, rows: Trajectories, condition: Columns | None, needs: Collection[str]
) -> dict[str, Tensor]:
    """Predictions without guidance at points on the forward path, noised from each row's final state."""
    time, noise = (value.to(denoiser.dtype) for value in _points(rows, ("time", "noise"), "forward"))
    count, points = time.shape
    data = rows.action[torch.arange(count), rows.length - 1].to(denoiser.dtype)
    t = time.reshape(count, points, *[1] * (data.dim() - 1))
    x = denoiser.path.noised(data[:, None], noise, t).flatten(0, 1)
    owner = torch.arange(count, device=x.device).repeat_interleave(points)
    t = t.flatten(0, 1)
    own = None if condition is None else condition[owner]
    raw = denoiser.predict_in_pieces(x, time.flatten(), own, guidance=1.0)
    predictions = {}
    if "forward" in needs:
        predictions["forward"] = denoiser.convert(raw, x, t, "velocity").reshape(count, points, *x.shape[1:])
    if "denoised" in needs:
        clean = denoiser.decoded(denoiser.convert(raw, x, t, "data"))
        predictions["denoised"] = clean.reshape(count, points, *clean.shape[1:])
    return predictions


def _sample(
    denoiser: Denoiser, sampler: SamplerSettings, rows: Trajectories, condition: Columns | None, pinned: bool
) -> Tensor:
    """The final samples, differentiable through each row's last `depth` steps: noise is kept, states move.

    `pinned` states have the values they were drawn with, so that gradients are those of the trajectory as it is.
    """
    (depth,) = _points(rows, ("depth",), "sample")
    ends: list[Tensor] = []
    order: list[Tensor] = []
    for steps in depth.unique().tolist():
        places = (depth == steps).nonzero()[:, 0]
        own = None if condition is None else condition[places]
        ends.append(_chain(denoiser, sampler, rows[places], own, int(steps), pinned))
        order.append(places)
    return denoiser.decoded(torch.cat(ends)[torch.cat(order).argsort()])


def _chain(
    denoiser: Denoiser,
    sampler: SamplerSettings,
    rows: Trajectories,
    condition: Columns | None,
    depth: int,
    pinned: bool,
) -> Tensor:
    """The last state of rows (N, *D) as a function of the parameters through its last `depth` steps."""
    last = len(sampler.times) - 1
    if bool((rows.length != last + 1).any()):
        raise InputError(
            "Only rows drawn to their end by the sampler they are scored under can be differentiated through."
        )
    if not 1 <= depth <= last:
        raise InputError(f"depth must be 1 to {last} steps of this sampler, got {depth}.")
    begin, history = last - depth, None
    predict = denoiser.predictor(condition, sampler.guidance)
    x = rows.action[:, begin].to(denoiser.dtype)
    for k in range(begin, last):
        trained = rows.mask[:, k + 1]
        if bool((trained != trained[0]).any()):
            raise InputError("Rows that are differentiated through together must draw noise in the same steps.")
        schedule = sampler.schedule if bool(trained[0]) else sampler.deterministic
        distribution, history = schedule.propose(predict, x, k, denoiser.path, history, output=denoiser.predicts)
        drawn = rows.action[:, k + 1].to(denoiser.dtype)
        if pinned:
            mean = distribution.mean if isinstance(distribution, Gaussian) else distribution.value
            x = drawn + mean - mean.detach()
        elif isinstance(distribution, Gaussian):  # x' = mean + q z, with z as it was drawn
            x = distribution.mean + (drawn - _settled(distribution.mean, rows, k + 1)).detach()
        else:
            x = distribution.value
    return x


def _settled(mean: Tensor, rows: Trajectories, step: int) -> Tensor:
    """The mean that the stored noise belongs to: the one before the update where it was kept, else the present."""
    if rows.info is not None and "old_mean" in rows.info:
        return rows.info["old_mean"][:, step].to(mean.dtype)
    return mean
