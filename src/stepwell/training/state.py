"""The state of a run: its models, data and optimiser, and the place that it has reached."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from stepwell.batch import Read
from stepwell.columns import Columns
from stepwell.data.stream import PromptStream
from stepwell.errors import InputError
from stepwell.meter import Cost
from stepwell.objective.term import Objective
from stepwell.planning.base import Planner
from stepwell.process.abilities import Redrawn, Valued, ability
from stepwell.process.base import Process
from stepwell.process.models import Models
from stepwell.recipe.recipe import Recipe
from stepwell.reward.mixing import Rewards
from stepwell.rng import Rng
from stepwell.sampling.record import Drawn
from stepwell.sampling.request import Prompt
from stepwell.training.distribute import World
from stepwell.training.fingerprint import fingerprint
from stepwell.training.optimiser import MasterAdamW, is_half, make_optimiser
from stepwell.training.scoring import VALUE
from stepwell.training.settings import Settings, with_settings


@dataclass(frozen=True)
class Run:
    """A finished run: the trained process, the metrics of every step made, and its cost.

    `process` draws as the process that was given to the run, and has the value head that was trained, if any.
    """

    process: Process
    recipe: Recipe
    settings: Settings
    history: list[dict[str, Any]]
    cost: Cost
    steps: int
    out: Path | None = None


@dataclass
class Position:
    """The place that a run has reached; all of it is in its checkpoints.

    `part`: minibatches of the present rollout that are behind the run; `made`: the updates made on them, fewer where
    a minibatch was empty. `done`: the share of the run that was over as the present rollout began. `states`: the
    values of the method's coefficients. `metrics`: sums over the updates on the present rollout, which is `drawn`,
    with its `targets` and the `names` of its rewards. `history`: the metrics of every step.
    """

    step: int = 0
    update: int = 0
    part: int = 0
    made: int = 0
    done: float = 0.0
    states: dict[str, float] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    drawn: Drawn | None = None
    targets: Columns | None = None
    names: tuple[str, ...] = ()
    history: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class RunState:
    """A run as it stands. Checkpoints hold what changes of it.

    `given`: the process as the caller has it, which is evaluated and never written on. `trained`: the same with a value
    head where the method needs one. `models.policy`: `trained` with the method's own sampler.
    """

    given: Process
    trained: Process
    models: Models
    recipe: Recipe
    settings: Settings
    rewards: Rewards
    stream: PromptStream
    planner: Planner
    optimiser: MasterAdamW
    world: World
    fingerprint: dict[str, Any]
    out: Path | None = None
    at: Position = field(default_factory=Position)

    @property
    def objective(self) -> Objective:
        """The method's objective, as a sum."""
        return self.recipe.whole

    @property
    def learning(self) -> dict[str, nn.Parameter]:
        """The parameters that learn, by name."""
        return {name: p for name, p in self.models.policy.module.named_parameters() if p.requires_grad}

    def share_done(self, steps: int) -> float:
        """The share of the run that is over after `steps`, by steps or by budget, whichever is more; equal on all
        ranks."""
        settings, meter = self.settings, self.models.policy.meter
        shares = [steps / settings.steps if settings.steps else 1.0] if settings.steps is not None else []
        if settings.budget is not None:
            cost = meter.read()
            if self.world.size > 1:
                total = sum(self.world.gather(meter.spent), start=Cost())
                cost = replace(total, wall_time=self.world.same(cost.wall_time))
            shares.append(settings.budget.share(cost, steps))
        return max(shares)

    @contextlib.contextmanager
    def put_back_on_failure(self) -> Iterator[None]:
        """Leave the data where they were if a rollout fails, so that a resumed run draws the same prompts."""
        stream, planner = self.stream.state_dict(), self.planner.state_dict()
        try:
            yield
        except BaseException:
            self.stream.load_state_dict(stream)
            self.planner.load_state_dict(planner)
            raise


def begin(
    process: Process,
    recipe: Recipe,
    prompts: Sequence[Prompt],
    rewards: Rewards,
    settings: Settings,
    out: Path | None = None,
    teacher: Process | None = None,
    evaluation: Sequence[Prompt] | None = None,
) -> RunState:
    """A run before its first step. Nothing is written on `process` or `teacher`; the run makes the twins it needs.

    Raises `InputError` for settings, models and a teacher that do not fit the method, `MissingAbility` for a process
    that cannot do what the method needs.
    """
    recipe, world = with_settings(recipe, settings), World.join()
    world.refuse_coupled(recipe.whole.coupling)
    trained, models = _models(process, recipe, reads_of(recipe, settings, process), teacher)
    learning = [p for p in trained.module.parameters() if p.requires_grad]
    return RunState(
        given=process,
        trained=trained,
        models=models,
        recipe=recipe,
        settings=settings,
        rewards=rewards,
        stream=PromptStream(prompts, Rng(settings.seed).split("prompts"), settings.shuffle),
        planner=copy.deepcopy(recipe.planner),
        optimiser=make_optimiser(learning, settings),
        world=world,
        fingerprint={} if out is None else fingerprint(process, models, recipe, prompts, rewards, settings, evaluation),
        out=out,
        at=Position(states={name: state.initial for name, state in recipe.whole.states.items()}),
    )


def reads_of(recipe: Recipe, settings: Settings, process: Process) -> frozenset[Read]:
    """The scores of a rollout that are filled in before its updates.

    In half precision the log-probabilities of the policy are among them: a rollout, which reads token by token, rounds
    otherwise than a score of the whole, and the first ratio would not be one.
    """
    coarse = settings.precision == "bf16" or is_half(process.module.parameters())
    anew = recipe.old == "recomputed" or coarse
    return recipe.whole.reads | ({Read("policy", "log_prob")} if anew else frozenset())


def _models(
    process: Process, recipe: Recipe, reads: frozenset[Read], teacher: Process | None
) -> tuple[Process, Models]:
    """The process that is trained, drawing as it was given, and the models of the run."""
    needs, roles = recipe.whole.needs, {read.of for read in reads}
    if "value" in needs or VALUE in reads:
        process = ability(process, Valued, "A critic").with_value_head()
    policy = process
    if recipe.sampler:
        policy = ability(process, Redrawn, "The method").with_sampler(**recipe.sampler)
    reference = policy.frozen() if "kl" in needs or "reference" in roles else None
    if reference is not None and recipe.reference == "synced" and reference.module is policy.module:
        raise InputError(
            "Recipe.reference must be 'start' for an adapted model, got 'synced': its reference is its base, which "
            "does not change. Train the model whole to have a reference that follows."
        )
    if teacher is not None and "teacher" not in roles:
        raise InputError("teacher must be left out: no part of the method reads a teacher.")
    models = Models(policy, reference, None if teacher is None else teacher.metered(policy.meter))
    if "teacher" in roles:
        process.check_teacher(models.of("teacher"))
    return process, models
