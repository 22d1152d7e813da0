"""The command that trains: `stepwell train`, for language models, pipelines of diffusers and models of one's own."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from stepwell.cli.command import Appended, Command, Flag, in_own_file, named, removed_if_empty
from stepwell.cli.processes.base import Kind, given, kind_of, refuse_unused
from stepwell.cli.processes.language import ConversationOptions, LanguageOptions
from stepwell.cli.processes.options import AdapterOptions, File, LoadingOptions, Numbers, Text, WeightsOptions, Whole
from stepwell.cli.processes.own import FunctionOptions
from stepwell.cli.processes.pipeline import ImageOptions
from stepwell.cli.processes.solver import SolverOptions
from stepwell.errors import InputError
from stepwell.recipe.options import options_from

if TYPE_CHECKING:
    from stepwell.process.base import Process
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
    checkpoint_every: int = 0  # updates between checkpoints; 0 for one at the end only
    keep: int = 2  # the number of checkpoints that are kept, the newest
    completions_logged: int = 4  # completions written to the log in each step
    trackers: Trackers = ()  # where metrics are sent as well
    progress: Flag = True  # do not show the progress of the run


@dataclass(kw_only=True)
class TrainedSolverOptions(SolverOptions):
    """The sampler of a flow or a pipeline, where the method does not choose its own."""

    solver_steps: Whole = None  # the steps in which a sample is drawn


@dataclass(kw_only=True)
class Train(Command):
    """Train a language model, a flow or a diffusion model from rewards, with any method."""

    model: str  # a causal language model, a pipeline of diffusers (a folder or a hub id), or your own as my.py:NAME
    data: str  # prompts: .jsonl, .json, .csv, .parquet or a folder of `datasets`
    reward: Appended = ()  # my.py:function, exact_match, numeric, math_equal or regular_expression:PATTERN
    reward_weights: Numbers = ()  # one for each reward; all 1 unless given
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

    def run(self) -> None:
        self.load_plugins()
        from stepwell.methods import catalogue

        if ":" in self.method:
            name, _, option = self.method.partition(":")
            raise InputError(
                f"--method must be an id, got '{self.method}'; set options by --method {name} --set {option}."
            )
        card, options = catalogue.get(self.method), options_from(self.set)  # refused before torch is loaded
        recipe = card.recipe(**options)
        kind = kind_of(self.model, card.processes)
        catalogue.check_kind(card, kind.process)
        refuse_unused(self, kind)
        self.sampler_settings()
        self._check_teacher(card.id, recipe, kind)
        from stepwell import api
        from stepwell.reward.mixing import Rewards
        from stepwell.training import loop
        from stepwell.training import resume as saved
        from stepwell.training.distribute import World

        chosen = {name: value for name, value in vars(self.training).items() if value is not None}
        settings = api.settings_from(**chosen)
        prompts, evaluation = self._prompts(anything=kind.process != "language")
        rewards = Rewards([reward_named(address) for address in self._rewards()], self.reward_weights or None)
        config = {"method": card.id, "options": options, "card": card.as_dict()} | self._described(kind)
        if self.out is not None and Path(named(self.out)).resolve() == Path(self.model).resolve():
            raise InputError(f"--out must not be the model's own folder, '{self.model}', which would be overwritten.")
        with removed_if_empty(self.out), self._own_files():
            saved.prepare(self.out, self.resume)
            process = kind.build(self.model, self, self.adapter.settings())
            catalogue.check_kind(card, process.kind)
            api.check_prompts(process, prompts, self.data)
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

    def _prompts(self, anything: bool) -> tuple[list[Prompt], list[Prompt] | None]:
        """The prompts to train on, and those to evaluate on; `anything`: they may be other than texts and chats."""
        from stepwell.data.prompts import load_prompts
        from stepwell.process.language.prompts import is_chat

        prompts = load_prompts(self.data, self.prompt_column, anything=anything)
        evaluation = None
        if self.evaluation is not None:
            evaluation = load_prompts(self.evaluation, self.prompt_column, anything=anything)
        if bool(self.training.evaluate_every) != (evaluation is not None):
            raise InputError("--evaluation and --evaluate-every must be given together: prompts, and steps between.")
        chats = any(is_chat(prompt.value) for prompt in [*prompts, *(evaluation or [])])
        if self.conversation.turn_role is not None and not chats:
            raise InputError("--turn-role must be left out: no prompt is a chat.")
        return prompts, evaluation

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
        if run.history:
            first, last = run.history[0]["reward"], run.history[-1]["reward"]
            steps = "1 step" if run.steps == 1 else f"{run.steps} steps"
            print(f"{steps} of {method}: the mean reward went from {first:.3g} to {last:.3g}.")
        if run.out is not None:
            print(f"The trained model and the log are in {run.out}; `stepwell report {run.out}` draws the curves.")

    @contextmanager
    def _own_files(self) -> Iterator[None]:
        """Name the line of a user's own file that raises, the model's or the teacher's."""
        with in_own_file(self.model), in_own_file(self.teacher):
            yield

    def _rewards(self) -> tuple[str, ...]:
        """The rewards that were named, else the one that the environment pays."""
        paid = "environment_return"
        if self.conversation.environment is None and paid in self.reward:
            raise InputError(f"--reward {paid} needs --environment: it is the reward that an environment pays.")
        if self.conversation.environment is None and not self.reward:
            raise InputError("--reward must be given, such as my.py:function; see `stepwell train --help` for others.")
        return self.reward or (paid,)

    def _described(self, kind: Kind) -> dict[str, Any]:
        """The arguments in run.json: model, data and rewards, and those that this kind of model uses."""
        about = {name: getattr(self, name) for name in ("model", "data", "reward_weights")}
        about |= {"reward": self._rewards()} | ({} if self.teacher is None else {"teacher": self.teacher})
        used = {entry.name: value for entry, value in given(self) if entry.name in kind.arguments}
        return about | {name: used[name] for name in sorted(used) if used[name] not in (None, ())}


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
