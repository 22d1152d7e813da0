"""What a flow says of given trajectories: densities of their trained steps, and predictions around their ends."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stepwell.columns import Columns
from stepwell.distributions import Gaussian
from stepwell.errors import InputError, MissingAbility
from stepwell.process.base import Scores
from stepwell.solver.exponential import coefficients
from stepwell.trajectories import Trajectories

if TYPE_CHECKING:
    from stepwell.process.flow.process import Flow


@dataclass(frozen=True)
class Steps:
    """The trained steps of a batch, one after another: (M,) row and step, and their laws, mean and scale (M, *D)."""

    row: Tensor
    step: Tensor
    law: Gaussian

    def table(self, values: Tensor, rows: Trajectories) -> Tensor:
        """(M, ...) as (N, T, ...), 0 elsewhere."""
        return values.new_zeros(*rows.mask.shape, *values.shape[1:]).index_put((self.row, self.step), values)


def scores(
    flow: Flow, rows: Trajectories, needs: Collection[str], context: Columns | None, reference: Flow | None = None
) -> Scores:
    """Everything that `Flow.score` offers, computed together where it can be."""
    condition = rows.condition if context is None else context
    if condition is None and flow.encode is not None:
        raise InputError("Trajectories without a condition cannot be scored; give `context=process.condition(...)`.")
    condition = None if condition is None else condition.to(flow.device)
    device, here = rows.mask.device, rows.to(flow.device)
    answer: dict[str, Tensor] = {}
    steps = _steps(flow, here, condition, shared=context is None)
    action = here.action[steps.row, steps.step].to(flow.dtype)
    answer["log_prob"] = steps.table(steps.law.log_prob(action).double(), here)
    if "entropy" in needs:
        answer["entropy"] = steps.table(steps.law.entropy(), here)
    if "mean" in needs:
        answer["mean"] = steps.table(steps.law.mean, here)
    if "deviation" in needs:
        scale = steps.law.standard_deviation.reshape(len(steps.row), -1)[:, 0]
        answer["deviation"] = steps.table(scale.detach(), here)
    if "step_size" in needs:
        times = torch.tensor(flow.sampler.times, dtype=torch.float64, device=flow.device)
        answer["step_size"] = steps.table((times[steps.step - 1] - times[steps.step]), here)
    if "kl" in needs:
        assert reference is not None
        with torch.no_grad():
            other = scores(reference, rows, ("mean",), context)["mean"].to(flow.device)
        law = Gaussian(other[steps.row, steps.step], steps.law.standard_deviation)
        answer["kl"] = steps.table(steps.law.kl(law), here)
    if {"forward", "denoised"} & set(needs):
        answer |= _forward(flow, here, condition, needs)
    for need in {"sample", "pinned"} & set(needs):
        answer[need] = _sample(flow, here, condition, pinned=need == "pinned")
    answer = {name: value.to(device) for name, value in answer.items()}
    return Scores(answer.pop("log_prob"), answer)


def _steps(flow: Flow, rows: Trajectories, condition: Columns | None, shared: bool) -> Steps:
    """The laws of all trained steps. The network is asked once for each state, however many rows share it."""
    row, step = rows.mask.nonzero(as_tuple=True)
    if _remembers(flow, (step.unique() - 1).tolist()):
        return _replayed(flow, rows, condition)
    if len(step) and int(step.max()) > len(flow.sampler.tables):
        raise InputError(
            f"A trained step {int(step.max())} lies beyond the {len(flow.sampler.tables)} steps of the sampler it is "
            "scored under; score it with the steps it was drawn with."
        )
    x = rows.action[row, step - 1].to(flow.dtype)
    first, place = _distinct(rows, row, step, x) if shared else (torch.arange(len(row)), torch.arange(len(row)))
    times = torch.tensor(flow.sampler.times, dtype=flow.dtype, device=flow.device)
    owner = row[first]
    raw = _predicted(flow, x[first], times[step[first] - 1], None if condition is None else condition[owner])
    raw = raw[place]
    mean, scale = torch.zeros_like(x), x.new_zeros(len(x))
    parts, order = [], []
    for k in (step.unique() - 1).tolist():
        here = (step == k + 1).nonzero()[:, 0]
        time, target = flow.sampler.times[k], flow.sampler.times[k + 1]
        numbers = coefficients(flow.path, flow.sampler.tables[k], (time,), target)
        if not numbers.noise > 0.0:
            raise InputError(
                f"Step {k + 1} was drawn at random and is scored under a law in which it is deterministic; score it "
                "with the solver it was drawn with."
            )
        told = flow.path.convert(raw[here], x[here], time, flow.predicts, numbers.predicts)
        parts.append(numbers.mean(x[here], (told,)))
        order.append(here)
        scale[here] = numbers.noise
    if parts:
        mean = torch.cat(parts)[torch.cat(order).argsort()]
    return Steps(row, step, Gaussian(mean, scale.reshape(-1, *[1] * (x.dim() - 1))))


def _remembers(flow: Flow, steps: Collection[int]) -> bool:
    """Whether the law of one of these steps depends on more than the state that it leaves."""
    tables = flow.sampler.tables
    return any(tables[k].remembers or (k > 0 and tables[k - 1].corrector) for k in steps if k < len(tables))


def _distinct(rows: Trajectories, row: Tensor, step: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """The first of each set of steps that leave the same state (F,), and where each step finds its own (M,)."""
    node = rows.node[row, step - 1]
    _, place = node.unique(return_inverse=True)
    order = torch.arange(len(node), device=node.device)
    count = int(place.max()) + 1 if len(place) else 0
    first = torch.full((count,), len(node), device=node.device).scatter_reduce(0, place, order, "amin")
    if not torch.equal(x, x[first][place]):  # rows that were put together without renumbering their nodes
        return order, order
    return first, place


def _predicted(flow: Flow, x: Tensor, time: Tensor, condition: Columns | None, guidance: float | None = None) -> Tensor:
    """The network at many states and times, a part at a time where no gradient is kept."""
    guidance = flow.sampler.guidance if guidance is None else guidance
    size = flow.states_at_once
    if size is None or torch.is_grad_enabled() or len(x) <= size:
        return flow.predict(x, time, condition, guidance) if len(x) else x
    pieces = torch.arange(len(x), device=x.device).split(size)
    told = [flow.predict(x[i], time[i], None if condition is None else condition[i], guidance) for i in pieces]
    return torch.cat(told)


def _replayed(flow: Flow, rows: Trajectories, condition: Columns | None) -> Steps:
    """The laws of trained steps of a solver that remembers: every row is gone through from its noise on."""
    past, parts = None, []
    last = int(rows.mask.nonzero()[:, 1].max())
    predict = flow.predictor(condition)
    for k in range(last):
        x, table = rows.action[:, k].to(flow.dtype), flow.sampler.tables[k]
        trained = rows.mask[:, k + 1]
        law, past = flow.sampler.schedule.propose(predict, x, k, flow.path, past, output=flow.predicts)
        if table.corrector and isinstance(law, Gaussian) and bool((~trained & (rows.length > k + 1)).any()):
            raise MissingAbility(
                f"The solver '{table.name}' corrects a step by how it was drawn, so it cannot score rows of which step "
                f"{k + 1} is not trained; train all steps, or choose a solver without a corrector."
            )
        here = trained.nonzero()[:, 0]
        if len(here):
            assert isinstance(law, Gaussian)
            scale = law.standard_deviation.expand(len(x)).reshape(-1, *[1] * (x.dim() - 1))
            parts.append((here, torch.full_like(here, k + 1), law.mean[here], scale[here]))
    row, step, mean, scale = (torch.cat(column) for column in zip(*parts, strict=True))
    return Steps(row, step, Gaussian(mean, scale))


def _points(rows: Trajectories, names: Collection[str], asked_by: str) -> list[Tensor]:
    if rows.points is None or any(name not in rows.points for name in names):
        raise MissingAbility(
            f"A method needs '{asked_by}', which reads {', '.join(sorted(names))} of the rows' points; a term has to "
            "draw them."
        )
    return [rows.points[name] for name in names]


def _forward(flow: Flow, rows: Trajectories, condition: Columns | None, needs: Collection[str]) -> dict[str, Tensor]:
    """Predictions without guidance at points on the forward path, noised from each row's final state."""
    time, noise = (value.to(flow.dtype) for value in _points(rows, ("time", "noise"), "forward"))
    count, points = time.shape
    data = rows.action[torch.arange(count), rows.length - 1].to(flow.dtype)
    t = time.reshape(count, points, *[1] * (data.dim() - 1))
    x = flow.path.noised(data[:, None], noise, t).flatten(0, 1)
    owner = torch.arange(count, device=x.device).repeat_interleave(points)
    t = t.flatten(0, 1)
    raw = _predicted(flow, x, time.flatten(), None if condition is None else condition[owner], 1.0)
    answer = {}
    if "forward" in needs:
        velocity = flow.path.convert(raw, x, t, flow.predicts, "velocity")
        answer["forward"] = velocity.reshape(count, points, *x.shape[1:])
    if "denoised" in needs:
        clean = flow.decoded(flow.path.convert(raw, x, t, flow.predicts, "data"))
        answer["denoised"] = clean.reshape(count, points, *clean.shape[1:])
    return answer


def _sample(flow: Flow, rows: Trajectories, condition: Columns | None, pinned: bool) -> Tensor:
    """The final samples, differentiable through each row's last `depth` steps: noise is kept, states move.

    `pinned` states have the values they were drawn with, so that gradients are those of the trajectory as it is.
    """
    (depth,) = _points(rows, ("depth",), "sample")
    ends: list[Tensor] = []
    order: list[Tensor] = []
    for steps in depth.unique().tolist():
        here = (depth == steps).nonzero()[:, 0]
        ends.append(_chain(flow, rows[here], None if condition is None else condition[here], int(steps), pinned))
        order.append(here)
    return flow.decoded(torch.cat(ends)[torch.cat(order).argsort()])


def _chain(flow: Flow, rows: Trajectories, condition: Columns | None, depth: int, pinned: bool) -> Tensor:
    """The last state of rows (N, *D) as a function of the parameters through its last `depth` steps."""
    last = len(flow.sampler.times) - 1
    if bool((rows.length != last + 1).any()):
        raise InputError("Only rows drawn to their end by the law they are scored under can be differentiated through.")
    if not 1 <= depth <= last:
        raise InputError(f"Gradients pass through 1 to {last} steps of this law, not {depth}.")
    begin, past = last - depth, None
    predict = flow.predictor(condition)
    x = rows.action[:, begin].to(flow.dtype)
    for k in range(begin, last):
        trained = rows.mask[:, k + 1]
        if bool((trained != trained[0]).any()):
            raise InputError("Rows that are differentiated through together draw noise in the same steps.")
        schedule = flow.sampler.schedule if bool(trained[0]) else flow.sampler.deterministic
        law, past = schedule.propose(predict, x, k, flow.path, past, output=flow.predicts)
        drawn = rows.action[:, k + 1].to(flow.dtype)
        if pinned:
            mean = law.mean if isinstance(law, Gaussian) else law.value
            x = drawn + mean - mean.detach()
        elif isinstance(law, Gaussian):  # x' = mean + q z, with z as it was drawn
            x = law.mean + (drawn - _settled(law.mean, rows, k + 1)).detach()
        else:
            x = law.value
    return x


def _settled(mean: Tensor, rows: Trajectories, step: int) -> Tensor:
    """The mean that the stored noise belongs to: the one before the update where it was kept, else the present."""
    if rows.info is not None and "old_mean" in rows.info:
        return rows.info["old_mean"][:, step].to(mean.dtype)
    return mean
