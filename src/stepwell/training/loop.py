"""The training loop, on one page: plan, roll out, reward, credit, objective, update, log, checkpoint."""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepwell.batch import Batch
from stepwell.errors import RewardError, StepwellError
from stepwell.guarded import Guarded
from stepwell.meter import Cost
from stepwell.objective.gradient import ClipByNorm, global_norm
from stepwell.process.base import AT_POINTS, Process
from stepwell.recipe.recipe import Recipe
from stepwell.reward.differentiable import Judge
from stepwell.reward.mixing import Rewards
from stepwell.rng import Rng
from stepwell.sampling.record import Drawn
from stepwell.sampling.request import Prompt
from stepwell.training.admission import admit, admit_rewards
from stepwell.training.collect import collect
from stepwell.training.evaluation import evaluate
from stepwell.training.log import RunLog
from stepwell.training.progress import View, make_progress
from stepwell.training.resume import description, export, forget, prepare, restore, save
from stepwell.training.scoring import fill, score_everywhere, with_declared_notes
from stepwell.training.settings import Settings
from stepwell.training.state import Run, RunState, begin, reads_of
from stepwell.training.stopping import StopRequested
from stepwell.training.summary import completions, row_metrics, warn_of_ties
from stepwell.training.update import accumulate
from stepwell.trajectories import Counts, Trajectories, count
from stepwell.writing import held

__all__ = ["Run", "evaluate", "train"]


class Trainer:
    """The steps of a run, from the place where its state stands; `run()` is the loop."""

    def __init__(
        self,
        state: RunState,
        evaluation: Sequence[Prompt] | None = None,
        on_step: Callable[[dict[str, Any]], None] | None = None,
    ):
        self.state, self.at, self.recipe, self.settings = state, state.at, state.recipe, state.settings
        self.objective, self.world = state.objective, state.world
        self.evaluation, self.on_step = list(evaluation or []), on_step
        self.rng = Rng(self.settings.seed)
        self.judge = Judge(state.rewards, state.stream.prompts, state.given.meter)
        self.parameters = state.optimiser.masters
        self.clock = {"begin": time.monotonic()}
        self.whole = True  # the state is that between two updates, of which a checkpoint may be made
        self.saved: tuple[int, ...] = ()  # the place of the newest checkpoint
        self.saved_at = time.monotonic()

    def run(self, log: RunLog, title: str = "training") -> None:
        """Make steps until the settings say stop; a checkpoint between any two updates is enough to go on from."""
        at, updates = self.at, self.recipe.epochs * self.recipe.minibatches
        if at.drawn is None:  # a rollout that was half used up goes on at the share it began with
            at.done = self.state.share_done(at.step)
        progress = make_progress(self.settings.progress and self.world.is_main)
        progress.start(self.settings, title)
        try:
            with StopRequested() as stop:
                stopped = False
                if at.update == 0 and at.drawn is None:
                    self.save(log)  # a run that is killed before the next one has something to go on from
                while at.done < 1.0 and not stopped:
                    if at.drawn is None:
                        self.collect()
                    while at.drawn is not None and not stopped:
                        if at.part < updates:
                            self.update()
                        if at.part == updates:
                            self.finish_step(log, progress)
                        # together, or some ranks would wait for others for ever
                        signals = self.world.gather((bool(stop), self.checkpoint_is_due()))
                        stopped = any(asked for asked, _ in signals)
                        if any(due for _, due in signals):
                            self.save(log)
        except BaseException as error:
            if self.whole and (at.update or not isinstance(error, StepwellError)):  # else there is nothing to keep
                self.save(log, together=False)
            elif at.update == 0 and self.state.out is not None and self.world.is_main:
                forget(self.state.out, log)
            raise
        finally:
            progress.close()
        cost = self.state.given.meter.read()
        with self.state.given.meter.paused():  # the budget is for training
            self.save(log)
        if stopped:
            raise KeyboardInterrupt
        if self.settings.budget is not None and at.step != self.settings.steps:
            missed = self.settings.budget.missed(cost, at.step)
            if missed:
                warnings.warn(missed, stacklevel=2)

    def collect(self) -> None:
        """Plan, roll out, reward, and give credit: the whole batch, no gradient."""
        at, state, settings = self.at, self.state, self.settings
        self.clock = {"begin": time.monotonic()}
        with self.arithmetic(), state.put_back_on_failure():
            rewarded = collect(
                state.models.policy,
                state.planner,
                state.stream,
                state.rewards,
                self.rng,
                at.step,
                version=at.update,
                rows_at_once=settings.rows_at_once,
                world=self.world,
                guide=self.recipe.guide,
            )
            scoring, drawn = time.monotonic(), rewarded.drawn
            rows = with_declared_notes(drawn.trajectories, self.objective.reads)
            rows = self.objective.draw(rows, state.models, self.rng.split("points", at.step))
            reads = reads_of(self.recipe, settings, state.models.policy)
            tokens = settings.tokens_per_microbatch
            rows = fill(state.models, rows, reads, tokens=tokens, world=self.world)
        at.drawn, at.names = Drawn(rows, drawn.samples, drawn.prompts), rewarded.names
        at.targets = self.objective.credit(Batch(rows, self.counts(rows), None, at.states))
        at.part, at.made, at.metrics = 0, 0, {}
        self.clock |= rewarded.seconds | {"score": time.monotonic() - scoring}

    def update(self) -> None:
        """One minibatch: plan on all of it, the gradient of this rank's share, transforms, one optimiser step."""
        at, state = self.at, self.state
        assert at.drawn is not None
        assert at.targets is not None
        chosen = self.minibatch(at.part)
        if len(chosen) == 0:  # a planner gave fewer groups than there are minibatches
            at.part += 1
            return
        rows, targets = at.drawn.trajectories[chosen], at.targets[chosen]
        counts, tokens = self.counts(rows), self.settings.tokens_per_microbatch
        scores = None
        state.optimiser.zero_grad(set_to_none=True)
        with self.arithmetic():
            if self.objective.plans_on_scores:
                scores = score_everywhere(state.models, rows, self.objective.present, tokens, self.world)
            targets = self.objective.plan(Batch(rows, counts, scores, at.states), targets)
            mine = self.share(rows)
            metrics: dict[str, float] = {}
            if len(mine):
                part = Batch(rows[mine], counts, None, at.states, self.judge)
                metrics = accumulate(state.models, self.objective, part, targets[mine], tokens, state.optimiser.gather)
        self.world.sum_gradients(self.parameters)
        if self.objective.needs & AT_POINTS and all(parameter.grad is None for parameter in self.parameters):
            raise RewardError("No parameter has a part in the rewards' gradient; they do not depend on the samples.")
        metrics = self.world.sum_metrics(metrics)
        self.whole = False
        metrics["gradient_norm"] = self.step_optimiser()
        at.metrics = {name: at.metrics.get(name, 0.0) + value for name, value in metrics.items()}
        at.update, at.part, at.made = at.update + 1, at.part + 1, at.made + 1
        signals = {**row_metrics(at.drawn.trajectories, at.names), **metrics}
        at.states = {name: state.update(at.states[name], signals) for name, state in self.objective.states.items()}
        self.whole = True

    def step_optimiser(self) -> float:
        """Transform the gradients and move; the norm before the transforms."""
        held = [p for p in self.parameters if p.grad is not None]
        gradients = [p.grad for p in held if p.grad is not None]
        norm = float(global_norm(gradients))
        for transform in (*self.recipe.transforms, ClipByNorm(self.settings.max_gradient_norm)):
            gradients = transform(gradients)
        for parameter, gradient in zip(held, gradients, strict=True):
            parameter.grad = gradient
        rate = self.settings.learning_rate_at(self.at.update, self.at.done)
        for group in self.state.optimiser.param_groups:
            group["lr"] = rate
        if math.isfinite(norm):  # a gradient that is not finite would end the run for good
            self.state.optimiser.step()
        return norm

    def finish_step(self, log: RunLog, progress: View) -> None:
        """Evaluate, log, learn; the rollout is used up. What may fail comes before anything that cannot be redone."""
        at, state, settings, meter = self.at, self.state, self.settings, self.state.given.meter
        assert at.drawn is not None
        metrics: dict[str, Any] = {"step": at.step + 1, "updates": at.update}
        metrics |= row_metrics(at.drawn.trajectories, at.names)
        metrics |= {name: value / max(at.made, 1) for name, value in at.metrics.items()}
        metrics |= {f"state/{name}": value for name, value in at.states.items()}
        metrics["learning_rate"] = state.optimiser.param_groups[0]["lr"]
        if self.evaluation and settings.evaluate_every and (at.step + 1) % settings.evaluate_every == 0:
            rng, amounts = self.rng.split("evaluation", at.step), (settings.evaluation_samples, settings.rows_at_once)
            metrics["evaluation/reward"] = evaluate(state.given, self.evaluation, state.rewards, rng, *amounts).reward
        cost = sum(self.world.gather(meter.spent), start=Cost())
        metrics |= {f"cost/{unit}": amount for unit, amount in asdict(cost).items() if unit != "wall_time"}
        wall = meter.read().wall_time
        done = state.share_done(at.step + 1)
        clock = {name: value for name, value in self.clock.items() if name != "begin"}
        clock |= {"step": time.monotonic() - self.clock["begin"], "wall_time": wall}
        shown = completions(at.drawn, at.names, at.step + 1, settings.completions_logged)
        if self.world.is_main:
            log.step(metrics, {"step": metrics["step"], "seconds": clock}, shown)
        self.whole = False
        state.planner.learn(at.drawn.trajectories, metrics)
        if self.recipe.reference == "synced" and (at.step + 1) % self.recipe.sync_every == 0:
            state.models = replace(state.models, reference=state.models.policy.frozen())
        at.history.append(metrics)
        warn_of_ties(self.objective, at.history)
        at.step, at.done, at.drawn, at.targets, at.part = at.step + 1, done, None, None, 0
        self.whole = True
        if self.world.is_main:
            progress.step(metrics, clock, shown, at.done)
        if self.on_step is not None:
            with Guarded():  # it may not change how torch computes
                self.on_step(metrics | {"wall_time": wall})

    def checkpoint_is_due(self) -> bool:
        """True after as many updates, or as many seconds, as the settings have between checkpoints."""
        settings = self.settings
        every = bool(settings.checkpoint_every) and self.at.update % settings.checkpoint_every == 0
        late = settings.checkpoint_seconds and time.monotonic() - self.saved_at >= settings.checkpoint_seconds
        return every or bool(late)

    def save(self, log: RunLog, together: bool = True) -> None:
        """A checkpoint of this moment, where there is a folder for it; `together` with the other ranks."""
        place = (self.at.step, self.at.update, self.at.part)
        own = asdict(self.state.given.meter.read())
        meters = self.world.gather(own) if together else [own]
        if self.state.out is not None and self.world.is_main and place != self.saved:
            log.sync()
            save(self.state, meters)
        self.saved, self.saved_at = place, time.monotonic()

    # what the steps above are made of

    def counts(self, rows: Trajectories) -> Counts:
        """The numbers that reductions divide by."""
        return count(rows, self.state.models.policy.horizon)

    def arithmetic(self) -> contextlib.AbstractContextManager[Any]:
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

    def share(self, rows: Trajectories) -> Tensor:
        """(M,) the rows of a minibatch that this rank computes: whole groups."""
        groups = rows.prompt.unique()
        return torch.isin(rows.prompt, groups[self.world.rank :: self.world.size]).nonzero()[:, 0]


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
    checkpoint, bit for bit as if the run had never stopped. `config` goes into run.json. Nothing but the parameters
    and the meter of `process` changes.
    """
    admit(process, prompts)
    admit_rewards(recipe, rewards, evaluation is not None)
    folder = prepare(out, resume)
    process.meter.load_state_dict(asdict(Cost()))  # what was spent before is not this run's
    with contextlib.ExitStack() as held_folder:
        state = begin(process, recipe, prompts, rewards, settings, folder, teacher, evaluation)
        if folder is not None and state.world.is_main:
            held_folder.enter_context(held(folder))
            prepare(out, resume)  # another process may have been writing until now
        log = RunLog(folder if state.world.is_main else None, settings.trackers, config=description(state, config))
        if resume:
            restore(state, log)
        elif folder is not None and state.world.is_main:
            forget(folder, log)
        try:
            Trainer(state, evaluation, on_step).run(log, str((config or {}).get("method", "training")))
        finally:
            log.close()
        if folder is not None and state.world.is_main:
            with process.meter.paused():
                export(state)
        state.world.gather(None)  # no rank leaves while another still writes
    at = state.at
    return Run(state.trained, state.recipe, settings, at.history, process.meter.read(), at.step, folder)
