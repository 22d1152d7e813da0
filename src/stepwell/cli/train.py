"""The command that trains: `stepwell train`, for language models, pipelines of diffusers and models of one's own."""

from __future__ import annotations

import difflib
import itertools
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from stepwell.cli.command import Appended, Command, Flag, absolute, in_own_file, named, removed_if_empty
from stepwell.cli.naming import refuse_settings
from stepwell.cli.processes.base import Kind, given, kind_of, refuse_unused
from stepwell.cli.processes.language import ConversationOptions, LanguageOptions
from stepwell.cli.processes.options import (
    AdapterOptions,
    File,
    LoadingOptions,
    Number,
    Numbers,
    Text,
    WeightsOptions,
    Whole,
)
from stepwell.cli.processes.own import FunctionOptions
from stepwell.cli.processes.pipeline import ImageOptions
from stepwell.cli.processes.solver import SolverOptions
from stepwell.errors import InputError
from stepwell.recipe.options import options_from

if TYPE_CHECKING:
    from stepwell.process.base import Process
    from stepwell.recipe.card import Card
    from stepwell.recipe.recipe import Recipe
    from stepwell.sampling.request import Prompt
    from stepwell.training.state import Run

Trackers = Annotated[
    tuple[Literal["tensorboard", "wandb", "trackio"], ...],
    tyro.conf.arg(metavar="{tensorboard,wandb,trackio} ...", help_behavior_hint=""),
]


@dataclass(kw_only=True)
class TrainingOptions:
    """The length, the sizes and the optimiser of the run (`stepwell.training.settings`)."""

    steps: Whole = None  # rollouts to make; 100 unless given, or with --budget as many as it allows
    budget: Text = None  # when to stop: 60s, 5m, 1h, 2M-tokens, 50k-reward-calls, ...
    seed: int = 0  # decides every random number of the run
    learning_rate: float = 1e-6  # of AdamW
    schedule: Literal["constant", "linear", "cosine"] = "constant"  # of the learning rate, after the warmup
    warmup: int = 0  # updates over which the learning rate rises
    weight_decay: float = 0.0  # of AdamW
    max_gradient_norm: float = 1.0  # larger gradients are scaled down to this norm
    prompts_per_step: Whole = None  # prompts of a rollout; the method's own number unless given
    group_size: Whole = None  # samples for each prompt; the method's own number unless given
    epochs: Whole = None  # passes over a rollout; the method's own number unless given
    minibatches: Whole = None  # updates in a pass; the method's own number unless given
    tokens_per_microbatch: Whole = None  # use less memory in updates; the results are the same
    rows_at_once: Whole = None  # use less memory in rollouts; other random numbers, the same distribution
    precision: Literal["fp32", "bf16"] = "fp32"  # the number format that the network computes in
    shuffle: Flag = True  # take the prompts in the order of the data, not in a random one
    evaluate_every: int = 0  # steps between evaluations; 0 for none
    evaluation_samples: int = 1  # samples for each prompt of an evaluation
    checkpoint_every: int = 0  # updates between checkpoints; 0 for those by time alone
    checkpoint_seconds: float = 300.0  # seconds between checkpoints; 0 for none but the first and the last
    keep: int = 2  # the number of checkpoints that are kept, the newest
    completions_logged: int = 4  # completions written to the log in each step
    trackers: Trackers = ()  # where metrics are sent as well
    progress: Flag = True  # do not show the progress of the run


SETTINGS = frozenset(entry.name for entry in fields(TrainingOptions))
"""The names of a run's settings."""


@dataclass(kw_only=True)
class TrainedSolverOptions(SolverOptions):
    """The sampler of a flow or a pipeline, where the method does not choose its own."""

    solver_steps: Whole = None  # the steps in which a sample is drawn


@dataclass(kw_only=True)
class Train(Command):
    """Train a language model, a flow or a diffusion model from rewards, with any method."""

    model: str  # a causal language model, a pipeline of diffusers (a folder or a hub id), or your own as my.py:NAME
    data: File = None  # prompts: .jsonl, .json, .csv, .parquet or a folder of `datasets`; none for models without
    reward: Appended = ()  # my.py:function, exact_match, numeric, math_equal or regular_expression:PATTERN
    reward_weights: Numbers = ()  # one for each reward; all 1 unless given
    reward_timeout: Number = None  # seconds that one call of a reward may take; no limit unless given
    method: str = "grpo"  # the id of a method, see `stepwell methods`
    set: Appended = ()  # an option of the method, as name=value
    teacher: File = None  # the model to learn from, named like --model; for methods that distil
    out: File = None  # the folder for the log, checkpoints and the trained model
    resume: Flag = False  # continue from the newest checkpoint in the folder
    prompt_column: str = "prompt"  # the column of the data that holds the prompts
    evaluation: File = None  # prompts to evaluate on, with --evaluate-every
    training: tyro.conf.OmitArgPrefixes[TrainingOptions] = field(default_factory=TrainingOptions)
    loading: tyro.conf.OmitArgPrefixes[LoadingOptions] = field(default_factory=LoadingOptions)
    adapter: tyro.conf.OmitArgPrefixes[AdapterOptions] = field(default_factory=AdapterOptions)
    language: tyro.conf.OmitArgPrefixes[LanguageOptions] = field(default_factory=LanguageOptions)
    conversation: tyro.conf.OmitArgPrefixes[ConversationOptions] = field(default_factory=ConversationOptions)
    solver: tyro.conf.OmitArgPrefixes[TrainedSolverOptions] = field(default_factory=TrainedSolverOptions)
    image: tyro.conf.OmitArgPrefixes[ImageOptions] = field(default_factory=ImageOptions)
    function: tyro.conf.OmitArgPrefixes[FunctionOptions] = field(default_factory=FunctionOptions)
    start: tyro.conf.OmitArgPrefixes[WeightsOptions] = field(default_factory=WeightsOptions)

    prints = False
    usual = ("--data",)

    def folder(self) -> Path | None:
        return absolute(self.out)

    def interrupted(self) -> str:
        folder = self.folder()
        saved = folder is not None and any(folder.glob("checkpoints/update-*"))
        ways = "the same command with --resume continues from there, and `stepwell export` writes its model"
        return "interrupted" + (f"; {ways}" if saved else "")

    def run(self) -> None:
        self.load_plugins()
        from stepwell.methods import catalogue

        if ":" in self.method:
            name, _, option = self.method.partition(":")
            raise InputError(
                f"--method must be an id, got '{self.method}'; set options by --method {name} --set {option}."
            )
        card, options = catalogue.get(self.method), options_from(self.set)  # refused before torch is loaded
        refuse_settings(options.keys() - card.options.keys(), card.id, SETTINGS)
        options |= self._sampler_options(card, options)
        recipe = card.recipe(**options)
        kind = kind_of(self.model, card.processes)
        catalogue.check_kind(card, kind.process)
        refuse_unused(self, kind)
        self._check_teacher(card.id, recipe, kind)
        addresses = self._rewards(recipe)
        from stepwell import api
        from stepwell.reward.absent import NoRewards
        from stepwell.reward.mixing import Rewards
        from stepwell.training import loop
        from stepwell.training import resume as saved
        from stepwell.training.distribute import World

        World.join()  # before anything takes long: a rank that ends while it loads is noticed by the others
        chosen = {name: value for name, value in vars(self.training).items() if value is not None}
        settings = api.settings_from(**chosen)
        prompts, evaluation = self._prompts(anything=kind.process != "language")
        functions = [reward_named(address) for address in addresses]
        chosen_weights = self.reward_weights or None
        rewards = Rewards(functions, chosen_weights, self.reward_timeout) if functions else NoRewards()
        config = {"method": card.id, "options": options, "card": card.as_dict()} | self._described(kind, addresses)
        if self.out is not None and Path(named(self.out)).resolve() == Path(self.model).resolve():
            raise InputError(f"--out must not be the model's own folder, '{self.model}', which would be overwritten.")
        with removed_if_empty(self.out), self._own_files():
            saved.prepare(self.out, self.resume)
            process = kind.build(self.model, self, self.adapter.settings())
            catalogue.check_kind(card, process.kind)
            self._check_prompts(process, prompts)
            api.check_prompts(process, evaluation or [], self.evaluation or "")
            run = loop.train(
                process,
                recipe,
                prompts,
                rewards,
                settings,
                out=self.out,
                evaluation=evaluation,
                resume=self.resume,
                config=config,
                teacher=None if self.teacher is None else self._built_teacher(kind),
            )
        if World.join().is_main:
            self._print(run, card.id)

    def sampler_settings(self) -> dict[str, Any]:
        """The settings of a flow's sampler that were given."""
        return self.solver.settings(self.solver.solver_steps)

    def _sampler_options(self, card: Card, options: dict[str, Any]) -> dict[str, Any]:
        """The solver and its steps as options of a method that chooses them by itself while it trains.

        Raises `InputError` for a setting that would be ignored: one that the method has no option for, or that is set
        as an option too. An option `level` may be another number than the solver's, as in flow-grpo.
        """
        own, as_options = card.recipe(**options).sampler, {}
        for name, value in self.sampler_settings().items():
            if name not in own and not (name in ("times", "shift") and "steps" in own):
                continue
            if name == "steps" and value < 1:
                raise InputError(f"steps must be a whole number of at least 1, got {value}.")
            argument = "--solver-steps" if name == "steps" else f"--{name}"
            written = self.solver.solver if name == "solver" else value
            if (
                name not in ("solver", "steps")
                or name not in card.options
                or name in options
                or not isinstance(written, type(card.options[name]))
            ):
                way = f"set it by --set {name}=..." if name in card.options else "it draws in its own steps"
                raise InputError(f"{argument} must be left out for method '{card.id}', which chooses its own; {way}.")
            as_options[name] = written
        return as_options

    def _prompts(self, anything: bool) -> tuple[Sequence[Prompt], Sequence[Prompt] | None]:
        """The prompts to train on, and those to evaluate on; `anything`: they may be other than texts and chats."""
        from stepwell.data.prompts import load_prompts
        from stepwell.process.language.prompts import is_chat

        if self.data is None and not anything:
            raise InputError("--data must be given: a language model is trained on prompts.")
        prompts = load_prompts([None] if self.data is None else self.data, self.prompt_column, anything=anything)
        evaluation = None
        if self.evaluation is not None:
            evaluation = load_prompts(self.evaluation, self.prompt_column, anything=anything)
        if bool(self.training.evaluate_every) != (evaluation is not None):
            raise InputError("--evaluation and --evaluate-every must be given together: prompts, and steps between.")
        every = itertools.chain(prompts, evaluation or [])
        if self.conversation.turn_role is not None and not any(is_chat(prompt.value) for prompt in every):
            raise InputError("--turn-role must be left out: no prompt is a chat.")
        return prompts, evaluation

    def _check_prompts(self, process: Process, prompts: Sequence[Prompt]) -> None:
        """Raise `InputError` for prompts that the process cannot read, and for none where it is conditioned on them."""
        from stepwell import api

        try:
            api.check_prompts(process, prompts, self.data or "")
        except InputError as error:
            if self.data is None:
                raise InputError("--data must be given: this model is conditioned on prompts.") from error
            raise

    def _check_teacher(self, method: str, recipe: Recipe, kind: Kind) -> None:
        """Raise `InputError` for a teacher that is missing, is not read, or is another kind of model."""
        learns_from = any(read.of == "teacher" for read in recipe.whole.reads)
        if self.teacher is None:
            if learns_from:
                raise InputError(f"--teacher must be given for method '{method}': it is the model to learn from.")
            return
        if not learns_from:
            raise InputError(f"--teacher must be left out for method '{method}', which learns from no other model.")
        other = kind_of(self.teacher, [kind.process] if kind.process else [])
        if other is not kind:
            raise InputError(f"--teacher must be {kind.called}, as --model is, got {other.called}.")

    def _built_teacher(self, kind: Kind) -> Process:
        """The teacher, drawing from its whole distribution: a cut one has no probability for much of the model's."""
        whole = replace(self.language, top_k=0, top_p=1.0, min_p=0.0, compile=False)
        command = replace(self, language=whole, start=WeightsOptions())
        return kind.build(self.teacher or "", command).frozen()

    def _print(self, run: Run, method: str) -> None:
        self.say(in_words(run, method))
        if run.out is not None:
            self.say(f"The trained model and the log are in {run.out}; `stepwell report {run.out}` draws the curves.")

    @contextmanager
    def _own_files(self) -> Iterator[None]:
        """Name the line of a user's own file that raises, the model's or the teacher's."""
        with in_own_file(self.model), in_own_file(self.teacher):
            yield

    def _rewards(self, recipe: Recipe) -> tuple[str, ...]:
        """The rewards that were named, else the one that the environment pays; none where the method reads none."""
        paid = "environment_return"
        if self.conversation.environment is None and paid in self.reward:
            raise InputError(f"--reward {paid} needs --environment: it is the reward that an environment pays.")
        if self.reward or self.conversation.environment is not None:
            return self.reward or (paid,)
        if recipe.rewarded:
            raise InputError("--reward must be given, such as my.py:function; see `stepwell train --help` for others.")
        if self.evaluation is not None:
            raise InputError("--reward must be given with --evaluation, which is the mean reward of its prompts.")
        if self.reward_weights or self.reward_timeout is not None:
            name = "--reward-weights" if self.reward_weights else "--reward-timeout"
            raise InputError(f"{name} needs --reward.")
        return ()

    def _described(self, kind: Kind, rewards: tuple[str, ...]) -> dict[str, Any]:
        """The arguments in run.json: model, data and rewards, and those that this kind of model uses."""
        about = {name: getattr(self, name) for name in ("model", "data", "reward_weights")}
        about |= {"reward": rewards} | ({} if self.teacher is None else {"teacher": self.teacher})
        used = {entry.name: value for entry, value in given(self) if entry.name in kind.arguments}
        used = {name: used[name] for name in sorted(used) if used[name] not in (None, ())}
        return about | used | {"kind": kind.process, "command": {"folder": os.getcwd(), "arguments": used}}


def in_words(run: Run, method: str) -> str:
    """The steps that were made, and what became of the reward of the policy's own rows, where it was measured."""
    steps = "1 step" if run.steps == 1 else f"{run.steps} steps"
    rewards = [metrics["reward"] for metrics in run.history if "reward" in metrics]
    if rewards:
        return f"{steps} of {method}: the mean reward went from {rewards[0]:.3g} to {rewards[-1]:.3g}."
    others = any(name.endswith("/reward") for metrics in run.history[-1:] for name in metrics)
    return f"{steps} of {method} {'on samples that the policy did not draw alone' if others else 'without a reward'}."


def reward_named(address: str) -> Any:
    """A reward that comes with Stepwell, by name, or a user's own at `file.py:function`."""
    from stepwell.process.conversation.environment import environment_return
    from stepwell.reward import verifiers
    from stepwell.reward.loading import load_reward

    plain = {"exact_match": verifiers.exact_match, "numeric": verifiers.numeric, "math_equal": verifiers.math_equal}
    plain["environment_return"] = environment_return
    name, colon, pattern = address.partition(":")
    if name == "regular_expression":
        if not pattern:
            raise InputError("--reward regular_expression needs a pattern, as in regular_expression:PATTERN.")
        return verifiers.regular_expression(pattern)
    if colon:
        return load_reward(address)
    if address not in plain:
        near = difflib.get_close_matches(address, [*plain, "regular_expression"], n=1)
        hint = f"did you mean '{near[0]}'?" if near else "write your own as file.py:function."
        raise InputError(f"There is no reward '{address}'; {hint}")
    return plain[address]
