"""The command that trains: `stepwell train`, for language models, pipelines of diffusers and models of one's own."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import tyro

from stepwell.cli import processes
from stepwell.cli.command import Appended, Command, in_own_file, named, removed_if_empty
from stepwell.cli.processes import FlowOptions, Kind
from stepwell.errors import InputError
from stepwell.recipe.options import options_from


@dataclass(kw_only=True)
class Train(Command):
    """Train a language model, a flow or a diffusion model from rewards, with any method."""

    model: str  # a causal language model or a pipeline of diffusers, or your own as my.py:NAME
    data: str  # prompts: .jsonl, .json, .csv, .parquet or a folder of `datasets`
    reward: Appended = ()  # my.py:function, exact_match, numeric, math_equal or regular_expression:PATTERN
    reward_weights: tuple[float, ...] = ()  # one a reward; all 1 unless given
    method: str = "grpo"  # see `stepwell methods`
    set: Appended = ()  # an option of the method, as name=value
    out: str | None = None  # the folder for log, checkpoints and the trained model
    resume: bool = False  # go on from the newest checkpoint in the folder
    prompt_column: str = "prompt"  # the column of the data that holds the prompts
    evaluation: str | None = None  # prompts to evaluate on, see --evaluate-every
    # a language model and how it samples
    temperature: float = 1.0  # the temperature tokens are drawn at, and scored at
    top_k: int = 0  # draw only from this many most probable tokens; 0 for all
    top_p: float = 1.0  # draw only from the fewest tokens that have this probability
    min_p: float = 0.0  # draw only from tokens at least this probable, relative to the most probable
    max_new_tokens: int = 256  # the length at which a completion is cut
    system: str | None = None  # a system message for chats that have none
    environment: str | None = None  # what it talks to: my.py:Desk, whose objects have gymnasium's reset and step
    max_turns: int | None = None  # turns after which a conversation is cut; 8 unless given
    turn_role: str | None = None  # the role of what the environment says in a chat; user unless given
    turn_stop: tuple[str, ...] = ()  # texts that end the model's turn, besides its end token
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # what the parameters are held in
    device: str | None = None  # cpu, cuda, ...; the accelerator, if there is one, unless given
    compile: bool = False  # compile the model's norms and perceptrons; updates take less memory
    lora: bool = False  # train a LoRA adapter of rank 8 instead of the whole model
    lora_rank: int | None = None  # train a LoRA adapter of this rank
    lora_alpha: int | None = None  # its scale; twice the rank unless given
    lora_targets: tuple[str, ...] = ()  # the layers that get it; peft's choice for the model unless given
    # how the run is carried out: the fields of train/settings.py
    steps: int | None = None  # rollouts to make; 100, or until the budget is spent
    budget: str | None = None  # when to stop: 60s, 5m, 1h, 2M-tokens, 50k-reward-calls, ...
    seed: int = 0  # decides every number of the run
    learning_rate: float = 1e-6  # of AdamW
    schedule: Literal["constant", "linear", "cosine"] = "constant"  # of the learning rate, after the warmup
    warmup: int = 0  # updates over which the learning rate rises
    weight_decay: float = 0.0  # of AdamW
    max_gradient_norm: float = 1.0  # larger gradients are scaled down to it
    prompts_per_step: int | None = None  # prompts of a rollout; the method's own number unless given
    group_size: int | None = None  # samples for each prompt; likewise
    epochs: int | None = None  # passes over a rollout; likewise
    minibatches: int | None = None  # updates a pass; likewise
    tokens_per_microbatch: int | None = None  # less memory in updates, and no other effect
    rows_at_once: int | None = None  # less memory in rollouts; other random numbers, from the same law
    precision: Literal["fp32", "bf16"] = "fp32"  # what the network computes in
    shuffle: bool = True  # draw the prompts in random order
    evaluate_every: int = 0  # steps between evaluations; 0 for none
    evaluation_samples: int = 1  # samples for each prompt of an evaluation
    checkpoint_every: int = 0  # updates between checkpoints; 0 for one at the end only
    keep: int = 2  # checkpoints that are kept
    completions_logged: int = 4  # completions written to the log, a step
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()  # where to send metrics as well
    progress: bool = True  # show how the run goes
    solver_steps: int | None = None  # of a flow: the steps a sample is drawn in, where the method does not say
    flow: tyro.conf.OmitArgPrefixes[FlowOptions] = field(default_factory=FlowOptions)

    def run(self) -> None:
        self.load_plugins()
        from stepwell import api
        from stepwell.data.prompts import load_prompts
        from stepwell.methods import catalogue
        from stepwell.process.language.prompts import is_chat
        from stepwell.reward.mixing import Rewards
        from stepwell.training import loop
        from stepwell.training import resume as saved
        from stepwell.training.distribute import World
        from stepwell.training.settings import Settings

        if ":" in self.method:
            name, _, option = self.method.partition(":")
            raise InputError(
                f"--method is '{self.method}'; options have their own argument, --method {name} --set {option}."
            )
        card, options = catalogue.get(self.method), options_from(self.set)
        recipe = card.recipe(**options)
        kind = processes.kind_of(self.model)
        if kind == "language" and "flow" in card.processes and not Path(self.model).exists():
            kind = "pipeline"  # an id of the hub does not say what it is of
        catalogue.check_kind(card, {"language": "language", "pipeline": "flow"}.get(kind))
        processes.refuse_unused(self, kind)
        law = self.flow.law(self.solver_steps)
        given = {entry.name: getattr(self, entry.name) for entry in fields(Settings)}
        settings = api.settings_from(**{name: value for name, value in given.items() if value is not None})
        anything = kind != "language"
        prompts = load_prompts(self.data, self.prompt_column, anything=anything)
        evaluation = None
        if self.evaluation is not None:
            evaluation = load_prompts(self.evaluation, self.prompt_column, anything=anything)
        if bool(settings.evaluate_every) != (evaluation is not None):
            raise InputError("Evaluation needs both --evaluation (what on) and --evaluate-every (how often).")
        make_environment = None if self.environment is None else processes.environment_from(self.environment)
        if self.turn_role is not None and not any(is_chat(prompt.value) for prompt in [*prompts, *(evaluation or [])]):
            raise InputError("--turn-role is the role of a chat's messages, and no prompt is a chat; leave it out.")
        rewards = Rewards([reward_named(address) for address in self._rewards()], self.reward_weights or None)
        config = {"method": card.id, "options": options, "card": card.as_dict()} | self._described(kind)
        if self.out is not None and Path(named(self.out)).resolve() == Path(self.model).resolve():
            raise InputError(f"--out is the folder of the model, '{self.model}', which would be lost; choose another.")
        with removed_if_empty(self.out), in_own_file(self.model if kind == "own" else None):
            saved.prepare(self.out, self.resume)
            process = self._process(kind, law, make_environment)
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
            )
        if not World.join().is_main:
            return
        if run.history:
            first, last = run.history[0]["reward"], run.history[-1]["reward"]
            print(f"{run.steps} steps of {card.id}: the mean reward went from {first:.3g} to {last:.3g}.")
        if run.out is not None:
            print(f"The trained model and the log are in {run.out}; `stepwell report {run.out}` draws the curves.")

    def _rewards(self) -> tuple[str, ...]:
        """The rewards that were named, or else what the environment pays."""
        paid = "environment_return"
        if self.environment is None and paid in self.reward:
            raise InputError(f"The reward '{paid}' is what an environment pays; name one with --environment.")
        if self.environment is None and not self.reward:
            raise InputError("There is nothing to learn from; give --reward my.py:function, or see its --help.")
        return self.reward or (paid,)

    def _process(self, kind: Kind, law: dict[str, Any], make_environment: Any = None) -> Any:
        """The process that is trained, as it is drawn from while it is evaluated."""
        if kind == "own":
            return processes.own_process(self.model, self.flow, law)
        processes.quieten_transformers()
        if kind == "pipeline":
            return processes.pipeline_process(self.model, self, law, lora=self._lora())
        from stepwell.process.language.process import language

        given = {name: getattr(self, name) for name in (*processes.SAMPLING, "dtype", "device", "system", "compile")}
        model = language(self.model, lora=self._lora(), **given)
        if make_environment is None:
            return model
        talk = {name: getattr(self, argument) for argument, name in processes.TURNS.items()}
        return model.turns(make_environment, **{name: value for name, value in talk.items() if value not in (None, ())})

    def _described(self, kind: Kind) -> dict[str, Any]:
        """What run.json says of the arguments: all of a language model's sampling, of a flow's what was given."""
        about = {name: getattr(self, name) for name in ("model", "data", "reward_weights", "dtype")}
        about["reward"] = self._rewards()
        if kind == "language":
            talk = {"environment": self.environment} if self.environment is not None else {}
            return about | {name: getattr(self, name) for name in (*processes.SAMPLING, "compile")} | talk
        given = {**vars(self), **vars(self.flow)}
        return about | {name: given[name] for name in sorted(processes.USED[kind] & given.keys()) if given[name]}

    def _lora(self) -> dict[str, Any] | None:
        rank = 8 if self.lora and self.lora_rank is None else self.lora_rank  # peft's own default
        if rank is None:
            if self.lora_alpha is not None or self.lora_targets:
                raise InputError("A LoRA adapter needs its rank; add --lora-rank, or --lora for 8.")
            return None
        alpha = 2 * rank if self.lora_alpha is None else self.lora_alpha
        targets = {"target_modules": list(self.lora_targets)} if self.lora_targets else {}
        return {"r": rank, "lora_alpha": alpha, **targets}


def reward_named(address: str) -> Any:
    """A reward that comes with Stepwell, by name, or a user's own at `file.py:function`."""
    from stepwell.process.conversation import environment_return
    from stepwell.reward import verifiers
    from stepwell.reward.loading import load_reward

    plain = {"exact_match": verifiers.exact_match, "numeric": verifiers.numeric, "math_equal": verifiers.math_equal}
    plain["environment_return"] = environment_return
    name, colon, pattern = address.partition(":")
    if name == "regular_expression":
        if not pattern:
            raise InputError("The reward 'regular_expression' needs a pattern; write it as regular_expression:PATTERN.")
        return verifiers.regular_expression(pattern)
    if colon:
        return load_reward(address)
    if address not in plain:
        near = difflib.get_close_matches(address, [*plain, "regular_expression"], n=1)
        hint = f"did you mean '{near[0]}'?" if near else "write your own as file.py:function."
        raise InputError(f"There is no reward '{address}'; {hint}")
    return plain[address]
