"""What every method obeys, checked by registration alone: no number may depend on how a batch is laid out or cut."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from stepwell.check.oracles.registry import Provable, oracle
from stepwell.columns import Columns
from stepwell.data.stream import PromptStream
from stepwell.errors import LawBroken, StepwellError
from stepwell.meter import Meter
from stepwell.parts import Batch
from stepwell.process.exact.table import markov
from stepwell.process.flow.process import flow
from stepwell.process.models import Models
from stepwell.recipe.recipe import Recipe
from stepwell.reward.differentiable import Judge
from stepwell.reward.mixing import Rewards
from stepwell.rng import Rng
from stepwell.sampling.request import Prompt, Request
from stepwell.sampling.rollout import rollout
from stepwell.training.collect import collect, fill
from stepwell.training.settings import Settings, with_settings
from stepwell.training.update import accumulate, score_in_pieces
from stepwell.trajectories import Trajectories, count, pad_steps

TOLERANCE = 1e-9
"""The largest deviation allowed, in float64: sums of a few hundred terms of order one, in another order."""


def bench(recipe: Recipe, kind: str = "language") -> tuple[Models, Trajectories]:
    """A small process, and rows that an earlier version of it drew: real rewards, all fields filled.

    For flows a two-dimensional one that the recipe's own planner draws from under its own law; else a tabular model
    with ragged groups.
    """
    if kind == "flow":
        return _flow_bench(recipe)
    process = markov(symbols=4, length=6, prompts=4, seed=7).with_value_head()
    process.module.get_parameter("value").data.copy_(Rng(8).normal(4, process.contexts, dtype=torch.float64))
    models = Models(process, process.frozen(), markov(symbols=4, length=6, prompts=4, seed=12))
    requests = [Request(Prompt(prompt, prompt), size) for prompt, size in enumerate((5, 2, 4, 3))]
    drawn = rollout(process, requests, Rng(9))
    count_, steps = drawn.trajectories.mask.shape
    rng = Rng(10)
    noise = rng.normal(count_, steps, dtype=torch.float64) * drawn.trajectories.mask
    rows = drawn.trajectories.replace(reward=Rng(19).normal(count_, dtype=torch.float64))
    rows = recipe.whole.draw(rows, models, rng.split("points"))
    rows = fill(models, rows, {"old_log_prob", *recipe.whole.reads}, tokens=None)
    rows = rows.replace(
        log_prob=rows.log_prob + 0.05 * noise,  # the sampler is not quite the old policy
        segment=(torch.arange(steps) // 2).expand(count_, steps).contiguous(),
        source=(torch.isin(torch.arange(count_), torch.tensor([4, 13]))).long(),  # the last of two prompts: one solved
        rewards=Rng(13).normal(count_, 3, dtype=torch.float64).round(decimals=1),
        info=Columns({**_tensors(rows), **_noted(count_, steps)}, count_),
    )
    moved = process.logits + 0.3 * rng.normal(*process.logits.shape, dtype=torch.float64)
    process.logits.data.copy_(moved)  # and the present policy is far enough for clips to bite
    return models, rows


def _tensors(rows: Trajectories) -> dict[str, Any]:
    return {} if rows.info is None else dict(rows.info.items())


def _noted(count_: int, steps: int) -> dict[str, Tensor]:
    """What planners may note of rows, at random; and turns of three steps."""
    rng = Rng(14)
    return {
        "turn": (torch.arange(steps) // 3).expand(count_, steps).contiguous(),
        "greedy": rng.normal(count_, dtype=torch.float64),
        "value_before": rng.normal(count_, steps, dtype=torch.float64),
        "value_after": rng.normal(count_, steps, dtype=torch.float64),
        "ends": rng.bernoulli(torch.full((count_, steps), 0.3)).double(),
    }


class _Velocity(nn.Module):
    """A velocity of two numbers, their time and a prompt's number, with weights from an Rng."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.inner, self.outer = nn.Linear(4, width, dtype=torch.float64), nn.Linear(width, 2, dtype=torch.float64)
        for place, parameter in enumerate(self.parameters()):
            parameter.data.copy_(0.4 * Rng(7).split(place).normal(*parameter.shape, dtype=torch.float64))

    def forward(self, x: Tensor, time: Tensor, label: Tensor) -> Tensor:
        inputs = torch.cat([x, time[:, None], label[:, None].to(x)], 1)
        return x * time[:, None] + self.outer(torch.tanh(self.inner(inputs)))


def nearness(completions: Sequence[Tensor]) -> Tensor:
    """The reward of the bench for flows: minus the squared distance to (1, -1/2)."""
    points = torch.stack(list(completions))
    return -(points - points.new_tensor([1.0, -0.5])).square().sum(1)


FLOW_PROMPTS = [Prompt(number, number) for number in range(3)]


def _flow_bench(recipe: Recipe) -> tuple[Models, Trajectories]:
    process = flow(_Velocity(), (2,), encode="label").with_sampler(**recipe.sampler)
    models = Models(process, process.frozen())
    _move(process, 0.1)
    stream = PromptStream(FLOW_PROMPTS, Rng(9).split("prompts"), shuffle=False)
    planner = with_settings(recipe, Settings(prompts_per_step=3)).planner
    drawn = collect(process, planner, stream, Rewards(nearness), Rng(9), 0, guide=recipe.guide).drawn
    rows = recipe.whole.draw(drawn.trajectories, models, Rng(9).split("points"))
    rows = fill(models, rows, {"old_log_prob", *recipe.whole.reads}, tokens=None)
    noise = Rng(10).normal(*rows.mask.shape, dtype=torch.float64) * rows.mask
    _move(process, 0.05)
    return models, rows.replace(log_prob=rows.log_prob + 0.05 * noise)


def _move(process: Any, width: float) -> None:
    """Every trained parameter by normal noise."""
    for place, parameter in enumerate(p for p in process.module.parameters() if p.requires_grad):
        noise = Rng(11).split(place).normal(*parameter.shape, dtype=torch.float64)
        parameter.data.add_(width * noise)


def gradient(
    models: Models,
    recipe: Recipe,
    rows: Trajectories,
    pieces: list[Tensor] | None = None,
    tokens: int | None = None,
) -> Tensor:
    """The flat gradient of one update on these rows, computed piece by piece with global counts and one plan."""
    objective, counts = recipe.whole, count(rows, models.policy.horizon)
    states = {name: state.initial for name, state in objective.states.items()}
    judge = Judge(Rewards(nearness), FLOW_PROMPTS, Meter())
    scores = None
    if objective.plans_on_scores:
        scores = score_in_pieces(models, rows, sorted(objective.present - {"log_prob"}), None)
    targets = objective.credit(Batch(rows, counts, None, states))
    targets = objective.plan(Batch(rows, counts, scores, states), targets)
    parameters = [p for p in models.policy.module.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.grad = None
    for piece in pieces or [torch.arange(len(rows))]:
        accumulate(models, objective, rows[piece], targets[piece], counts, states, tokens, judge)
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    return torch.cat([part.reshape(-1) for part in parts])


def check_method(card: Provable, tolerance: float = TOLERANCE) -> MappingProxyType[str, float]:
    """Hold a method to its laws: a mapping from each law to the largest deviation found.

    `padding`, `permutation`, `micro-batches` (as small as they get) and `processes` (two that sum their gradients)
    leave the gradient as it is; `moves` says the gradient is not zero; `unknown option` is refused; and every oracle
    that the card names as its proof holds. Raises LawBroken, naming the first that does not.
    """
    recipe = card.recipe()
    models, rows = bench(recipe, card.processes[0])
    whole = gradient(models, recipe, rows)
    size = float(whole.norm())
    if not size > 0 or not bool(whole.isfinite().all()):
        raise LawBroken(f"The method '{card.id}' has a gradient of norm {size} on a batch that is not degenerate.")
    order = Rng(11).permutation(len(rows))
    groups = [(rows.prompt % 2 == parity).nonzero()[:, 0] for parity in (0, 1)]
    laws: dict[str, Callable[[], Tensor]] = {
        "padding": lambda: gradient(models, recipe, pad_steps(rows, rows.mask.shape[1] + 3)),
        "permutation": lambda: gradient(models, recipe, rows[order]),
        "micro-batches": lambda: gradient(models, recipe, rows, tokens=1),
        "processes": lambda: gradient(models, recipe, rows, groups),
    }
    report = {law: float((found() - whole).abs().max()) for law, found in laws.items()}
    report |= {f"oracle {name}": oracle(name)(card) for name in card.proof}
    for law, error in report.items():
        if not error <= tolerance:
            raise LawBroken(
                f"The method '{card.id}' breaks the law '{law}' by {error:.1e}; at most {tolerance:g} is right."
            )
    try:
        card.recipe(**{"an_option_nobody_has": 1})
    except (StepwellError, TypeError):
        report["unknown option"] = 0.0
    else:
        raise LawBroken(f"The method '{card.id}' accepts an option that it does not have.")
    return MappingProxyType(report)
