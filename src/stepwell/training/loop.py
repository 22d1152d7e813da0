"""The training loop, on one page: plan, roll out, reward, credit, objective, update, log, checkpoint."""

from __future__ import annotations

import contextlib
import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepwell.columns import Columns
from stepwell.data.stream import PromptStream
from stepwell.errors import InputError, RewardError, StepwellError
from stepwell.meter import Cost
from stepwell.objective.gradient import ClipByNorm, global_norm
from stepwell.parts import Batch
from stepwell.process.abilities import Redrawn, Valued, ability
from stepwell.process.base import AT_POINTS, Process
from stepwell.process.models import Models
from stepwell.recipe.recipe import Recipe
from stepwell.reward.differentiable import Judge
from stepwell.reward.mixing import Rewards
from stepwell.rng import Rng
from stepwell.sampling.record import Drawn
from stepwell.sampling.request import Prompt
from stepwell.training import resume as saved
from stepwell.training.admission import admit
from stepwell.training.collect import collect, evaluate, fill, score_everywhere
from stepwell.training.distribute import World
from stepwell.training.log import RunLog
from stepwell.training.progress import make_progress
from stepwell.training.settings import Settings, with_settings
from stepwell.training.stopping import StopRequested
from stepwell.training.summary import completions, row_metrics
from stepwell.training.update import accumulate
from stepwell.trajectories import Counts, count

__all__ = ["Run", "evaluate", "train"]


@dataclass(frozen=True)
class Run:
    """A finished run: the trained process, the metrics of every step made, and what it cost."""

    process: Process
    recipe: Recipe
    settings: Settings
    history: list[dict[str, Any]]
    cost: Cost
    steps: int
    out: Path | None = None


@dataclass
class Position:
    """Where a run stands. Everything here is in its checkpoints; nothing else decides what comes next."""

    step: int = 0
    update: int = 0
    part: int = 0  # minibatches of the present rollout that are behind us
    made: int = 0  # updates made on it; fewer, where a minibatch was empty
    states: dict[str, float] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)  # summed over the updates on the present rollout
    drawn: Drawn | None = None
    targets: Columns | None = None
    names: tuple[str, ...] = ()
    history: list[dict[str, Any]] = field(default_factory=list)


class Trainer:
    """The parts of a run and its position; `run()` is the loop."""

    def __init__(
        self,
        process: Process,
        recipe: Recipe,
        prompts: Sequence[Prompt],
        rewards: Rewards,
        settings: Settings,
        out: Path | None = None,
        evaluation: Sequence[Prompt] | None = None,
        on_step: Callable[[dict[str, Any]], None] | None = None,
        teacher: Process | None = None,
    ):
        self.given, self.settings, self.out, self.rewards = process, settings, out, rewards
        self.recipe = with_settings(recipe, settings)
        if self.recipe.sampler:  # evaluated as it was given, trained under the method's own law
            process = ability(process, Redrawn, "The method").with_sampler(**self.recipe.sampler)
        self.judge = Judge(rewards, prompts, process.meter)
        self.objective = self.recipe.whole
        self.world = World.join()
        self.world.refuse_coupled(self.objective.coupling)
        self.planner = copy.deepcopy(self.recipe.planner)
        self.rng = Rng(settings.seed)
        self.stream = PromptStream(prompts, self.rng.split("prompts"), settings.shuffle)
        self.evaluation, self.on_step = list(evaluation or []), on_step
        self.reads = set(self.objective.reads)
        if self.recipe.old == "recomputed" or settings.precision == "bf16":
            self.reads.add("old_log_prob")
        reference: Process | None = None
        if "value" in self.objective.needs | self.reads:
            process = ability(process, Valued, "A critic").with_value_head()
        if "kl" in self.objective.needs or any(name.startswith("reference_") for name in self.reads):
            reference = process.frozen()
            if self.recipe.reference == "synced" and reference.module is process.module:
                raise InputError(
                    "The reference of an adapted model is its base, which cannot be synced; train it whole."
                )
        if teacher is not None:
            teacher = teacher.metered(process.meter)  # what it spends is this run's
        self.models = Models(process, reference, teacher)
        if any(name.startswith("teacher_") for name in self.reads):
            self.models.of("teacher")
        self.parameters = [p for p in process.module.parameters() if p.requires_grad]
        self.optimiser = torch.optim.AdamW(
            self.parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
        self.horizon: float | None = process.horizon
        self.done = 0.0
        self.at = Position(states={name: state.initial for name, state in self.objective.states.items()})

    @property
    def process(self) -> Process:
        """The policy, as it is trained."""
        return self.models.policy

    @property
    def trained(self) -> Process:
        """The policy, with its value head where it has one, drawing as it was given."""
        return self.given if self.process.module is self.given.module else self.process

    def run(self, log: RunLog, title: str = "training") -> None:
        """Steps until the settings say stop; a checkpoint between any two updates is enough to go on from."""
        if self.at.drawn is None:  # a rollout that was half used up goes on at the share it began with
            self.done = self.share_done()
        progress = make_progress(self.settings.progress and self.world.is_main)
        progress.start(self.settings, title)
        try:
            with StopRequested() as stop:
                stopped = False
                while self.done < 1.0 and not stopped:
                    if self.at.drawn is None:
                        self.collect()
                    while self.at.drawn is not None and not stopped:
                        if self.at.part < self.recipe.epochs * self.recipe.minibatches:
                            self.update()
                        if self.at.part == self.recipe.epochs * self.recipe.minibatches:
                            self.finish_step(log, progress)
                        if self.settings.checkpoint_every and self.at.update % self.settings.checkpoint_every == 0:
                            self.save()
                        stopped = any(self.world.gather(bool(stop)))  # together, or the others would wait for ever
        except Exception as error:
            if self.at.update or not isinstance(error, StepwellError):  # before any update there is nothing to keep
                self.save(together=False)
            raise
        finally:
            progress.close()
        self.save()
        if stopped:
            raise KeyboardInterrupt

    def collect(self) -> None:
        """Plan, roll out, reward, and give credit: the whole batch, no gradient."""
        at, settings = self.at, self.settings
        self.clock = {"begin": time.monotonic()}
        before = self.stream.state_dict(), self.planner.state_dict()
        with self.arithmetic(), _put_back(self.stream, self.planner, before):
            rewarded = collect(
                self.process,
                self.planner,
                self.stream,
                self.rewards,
                self.rng,
                at.step,
                version=at.update,
                rows_at_once=settings.rows_at_once,
                world=self.world,
                guide=self.recipe.guide,
            )
            begin = time.monotonic()
            drawn = rewarded.drawn
            tokens = settings.tokens_per_microbatch
            rows = self.objective.draw(drawn.trajectories, self.models, self.rng.split("points", at.step))
            rows = fill(self.models, rows, self.reads, tokens=tokens, world=self.world)
        at.drawn, at.names = Drawn(rows, drawn.samples, drawn.prompts), rewarded.names
        at.targets = self.objective.credit(Batch(rows, self.counts(rows), None, at.states))
        at.part, at.made, at.metrics = 0, 0, {}
        self.clock |= rewarded.seconds | {"score": time.monotonic() - begin}

    def update(self) -> None:
        """One minibatch: plan on all of it, the gradient of this process's share, transforms, one optimiser step."""
        at, settings = self.at, self.settings
        assert at.drawn is not None
        assert at.targets is not None
        chosen = self.minibatch(at.part)
        if len(chosen) == 0:  # a planner gave fewer groups than there are minibatches
            at.part += 1
            return
        rows, targets = at.drawn.trajectories[chosen], at.targets[chosen]
        counts, tokens = self.counts(rows), settings.tokens_per_microbatch
        scores = None
        self.optimiser.zero_grad(set_to_none=True)
        with self.arithmetic():
            if self.objective.plans_on_scores:
                scores = score_everywhere(self.models, rows, self.objective.present, tokens, self.world)
            targets = self.objective.plan(Batch(rows, counts, scores, at.states), targets)
            mine = self.share(rows)
            metrics: dict[str, float] = {}
            if len(mine):
                part = rows[mine], targets[mine]
                metrics = accumulate(self.models, self.objective, *part, counts, at.states, tokens, self.judge)
        self.world.sum_gradients(self.parameters)
        if self.objective.needs & AT_POINTS and all(parameter.grad is None for parameter in self.parameters):
            raise RewardError("No parameter has a part in the rewards' gradient; they do not depend on the samples.")
        metrics = self.world.sum_metrics(metrics)
        metrics["gradient_norm"] = self.step_optimiser()
        at.metrics = {name: at.metrics.get(name, 0.0) + value for name, value in metrics.items()}
        at.update, at.part, at.made = at.update + 1, at.part + 1, at.made + 1
        known = {**row_metrics(at.drawn.trajectories, at.names), **metrics}
        at.states = {n: state.update(at.states[n], known) for n, state in self.objective.states.items()}

    def step_optimiser(self) -> float:
        """Transform the gradients and move; the norm before the transforms."""
        held = [p for p in self.parameters if p.grad is not None]
        gradients = [p.grad for p in held if p.grad is not None]
        norm = float(global_norm(gradients))
        for transform in (*self.recipe.transforms, ClipByNorm(self.settings.max_gradient_norm)):
            gradients = transform(gradients)
        for parameter, gradient in zip(held, gradients, strict=True):
            parameter.grad = gradient
        rate = self.settings.learning_rate_at(self.at.update, self.done)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        if math.isfinite(norm):  # a gradient that is not finite would end the run for good
            self.optimiser.step()
        return norm

    def finish_step(self, log: RunLog, progress: Any) -> None:
        """Evaluate, log, learn; the rollout is used up. What may fail comes before anything that cannot be redone."""
        at, settings, process = self.at, self.settings, self.process
        assert at.drawn is not None
        metrics: dict[str, Any] = {"step": at.step + 1, "updates": at.update}
        metrics |= row_metrics(at.drawn.trajectories, at.names)
        metrics |= {name: value / max(at.made, 1) for name, value in at.metrics.items()}
        metrics |= {f"state/{name}": value for name, value in at.states.items()}
        metrics["learning_rate"] = self.optimiser.param_groups[0]["lr"]
        if self.evaluation and settings.evaluate_every and (at.step + 1) % settings.evaluate_every == 0:
            stream = self.rng.split("evaluation", at.step)
            samples, rows = settings.evaluation_samples, settings.rows_at_once
            found = evaluate(self.given, self.evaluation, self.rewards, stream, samples, rows)
            metrics["evaluation/reward"] = found.reward
        cost = sum(self.world.gather(process.meter.spent), start=Cost())
        metrics |= {f"cost/{unit}": amount for unit, amount in asdict(cost).items() if unit != "wall_time"}
        wall = process.meter.read().wall_time
        done = self.share_done(at.step + 1)
        clock = {name: value for name, value in self.clock.items() if name != "begin"}
        clock |= {"step": time.monotonic() - self.clock["begin"], "wall_time": wall}
        shown = completions(at.drawn, at.names, at.step + 1, settings.completions_logged)
        if self.world.is_main:
            log.step(metrics, {"step": metrics["step"], "seconds": clock}, shown)
        self.planner.learn(at.drawn.trajectories, metrics)
        if self.recipe.reference == "synced" and (at.step + 1) % self.recipe.sync_every == 0:
            self.models = replace(self.models, reference=process.frozen())
        at.history.append(metrics)
        self.done = done
        at.step, at.drawn, at.targets, at.part = at.step + 1, None, None, 0
        if self.world.is_main:
            progress.step(metrics, clock, shown, self.done)
        if self.on_step is not None:
            self.on_step(metrics | {"wall_time": wall})

    # what the steps above are made of

    def share_done(self, steps: int | None = None) -> float:
        """The share of the run that is over, by steps or by budget, whichever is further; the same in every process."""
        settings, steps = self.settings, self.at.step if steps is None else steps
        shares = [steps / settings.steps if settings.steps else 1.0] if settings.steps is not None else []
        if settings.budget is not None:
            cost = self.process.meter.read()
            if self.world.size > 1:
                total = sum(self.world.gather(self.process.meter.spent), start=Cost())
                cost = replace(total, wall_time=self.world.same(cost.wall_time))
            shares.append(settings.budget.fraction(cost, steps))
        return max(shares)

    def counts(self, rows: Any) -> Counts:
        return count(rows, self.horizon)

    def arithmetic(self) -> Any:
        """The precision that rollouts, scores and losses run in; the parameters stay as they are."""
        if self.settings.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.parameters[0].device.type, dtype=torch.bfloat16)

    def minibatch(self, part: int) -> Tensor:
        """(M,) rows of an update: whole groups, in an order drawn anew for every epoch."""
        assert self.at.drawn is not None
        prompt = self.at.drawn.trajectories.prompt
        epoch, place = divmod(part, self.recipe.minibatches)
        if self.recipe.minibatches == 1:
            return torch.arange(len(prompt))
        groups = prompt.unique()
        order = self.rng.split("minibatches", self.at.step, epoch).permutation(len(groups))
        chosen = groups[order].tensor_split(self.recipe.minibatches)[place]
        return torch.isin(prompt, chosen).nonzero()[:, 0]

    def share(self, rows: Any) -> Tensor:
        """(M,) the rows of a minibatch that this process computes: whole groups."""
        groups = rows.prompt.unique()
        return torch.isin(rows.prompt, groups[self.world.rank :: self.world.size]).nonzero()[:, 0]

    def save(self, together: bool = True) -> None:
        """A checkpoint of this moment, where there is a folder for it; `together` with the other processes."""
        own = asdict(self.process.meter.read())
        meters = self.world.gather(own) if together else [own]
        if self.out is not None and self.world.is_main:
            saved.save(self, meters)


def train(
    process: Process,
    recipe: Recipe,
    prompts: Sequence[Prompt],
    rewards: Rewards,
    settings: Settings,
    *,
    out: str | Path | None = None,
    evaluation: Sequence[Prompt] | None = None,
    on_step: Callable[[dict[str, Any]], None] | None = None,
    resume: bool = False,
    config: dict[str, Any] | None = None,
    teacher: Process | None = None,
) -> Run:
    """Train a process with a recipe.

    `out` receives metrics, completions, checkpoints and at the end the model; `resume` goes on from its newest
    checkpoint, bit for bit as if the run had never stopped. `config` is what the log keeps about the run.
    """
    admit(process, prompts)
    folder = saved.prepare(out, resume)
    process.meter.load_state_dict(asdict(Cost()))  # what was spent before is not this run's
    trainer = Trainer(process, recipe, prompts, rewards, settings, folder, evaluation, on_step, teacher)
    log = RunLog(
        folder if trainer.world.is_main else None, settings.trackers, config=saved.description(trainer, config)
    )
    if resume:
        saved.restore(trainer, log)
    try:
        trainer.run(log, str((config or {}).get("method", "training")))
    finally:
        log.close()
    if folder is not None and trainer.world.is_main:
        saved.export(trainer)
    trainer.world.gather(None)  # nobody leaves while another still writes
    cost = process.meter.read()
    return Run(trainer.trained, trainer.recipe, settings, trainer.at.history, cost, trainer.at.step, folder)


@contextlib.contextmanager
def _put_back(stream: PromptStream, planner: Any, before: tuple[Any, Any]) -> Iterator[None]:
    """A step that fails leaves the data where it was, so that a resumed run draws the same prompts."""
    try:
        yield
    except BaseException:
        stream.load_state_dict(before[0])
        planner.load_state_dict(before[1])
        raise
