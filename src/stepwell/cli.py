"""The command line: `stepwell methods`, `train`, `compare`, `report`, `check` and `tasks`.

Arguments are plain dataclasses, and everything heavy is imported inside a command, so that help comes at once.
"""

from __future__ import annotations

import difflib
import os
import sys
import traceback as traces
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

import stepwell
from stepwell.arguments import options_from, parse
from stepwell.errors import InputError, StepwellError

if TYPE_CHECKING:
    from stepwell.methods.registry import Card
    from stepwell.rollout import Prompt

ABOUT = f"""{stepwell.__doc__}

`stepwell COMMAND --help` tells a command's arguments, `stepwell --version` the version."""
Appended = tyro.conf.UseAppendAction[tuple[str, ...]]


@dataclass(kw_only=True)
class Command:
    """What every command understands."""

    plugin: Appended = ()  # a Python file of your own that registers methods or tasks
    traceback: bool = False  # show where in the code an error was raised, instead of one line

    def run(self) -> None:
        """Carry the command out; raises StepwellError for what the user can mend."""
        raise NotImplementedError

    def load_plugins(self) -> None:
        """Run the user's files, after Stepwell's own methods are there: who takes a name of theirs is told so."""
        if self.plugin:
            from stepwell.methods import registry

            registry.names()
            for path in self.plugin:
                registry.load_plugin(os.path.abspath(path))  # its errors then know their line


@dataclass(kw_only=True)
class Methods(Command):
    """List every method, or print the card of one."""

    id: tyro.conf.Positional[str | None] = None  # the method whose card is printed
    json: bool = False  # print JSON: a list of cards, or the one card
    search: str = ""  # list only methods whose card holds all these words

    def run(self) -> None:
        self.load_plugins()
        from stepwell.methods import registry
        from stepwell.printing import print_card, print_json, print_table

        if self.id is not None:
            card = registry.get(self.id)
            print_json(card.as_dict()) if self.json else print_card(card)
            return
        cards = [card for card in map(registry.get, registry.names()) if _found(self.search, card)]
        if self.json:
            print_json([card.as_dict() for card in cards])
        elif not cards:
            raise InputError(f"No method's card holds '{self.search}'; `stepwell methods` lists them all.")
        else:
            rows = [(card.id, card.title, str(card.year or ""), card.differs) for card in cards]
            print_table(("id", "title", "year", "what differs"), rows)


@dataclass(kw_only=True)
class Train(Command):
    """Train a language model from rewards, with any method."""

    model: str  # a folder or hub id of a causal language model
    data: str  # prompts: .jsonl, .json, .csv, .parquet or a folder of `datasets`
    reward: Appended = ()  # my.py:function, exact_match, numeric, math_equal or regular_expression:PATTERN
    reward_weights: tuple[float, ...] = ()  # one a reward; all 1 unless given
    method: str = "grpo"  # see `stepwell methods`
    set: Appended = ()  # an option of the method, as name=value
    out: str | None = None  # the folder for log, checkpoints and the trained model
    resume: bool = False  # go on from the newest checkpoint in the folder
    prompt_column: str = "prompt"  # the column of the data that holds the prompts
    evaluation: str | None = None  # prompts to evaluate on, see --evaluate-every
    # the model and how it samples
    temperature: float = 1.0  # the temperature tokens are drawn at, and scored at
    top_k: int = 0  # draw only from this many most probable tokens; 0 for all
    top_p: float = 1.0  # draw only from the fewest tokens that have this probability
    min_p: float = 0.0  # draw only from tokens at least this probable, relative to the most probable
    max_new_tokens: int = 256  # the length at which a completion is cut
    system: str | None = None  # a system message for chats that have none
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # what the parameters are held in
    device: str | None = None  # cpu, cuda, ...; the accelerator, if there is one, unless given
    lora_rank: int | None = None  # train a LoRA adapter of this rank instead of the whole model
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

    def run(self) -> None:
        self.load_plugins()
        from stepwell import api
        from stepwell.data import load_prompts
        from stepwell.methods import registry
        from stepwell.process.language import language
        from stepwell.reward.mixing import Rewards
        from stepwell.train import loop, saved
        from stepwell.train.distribute import World
        from stepwell.train.settings import Settings

        card, options = registry.get(self.method), options_from(self.set)
        recipe = card.recipe(**options)
        given = {entry.name: getattr(self, entry.name) for entry in fields(Settings)}
        settings = api.settings_from(**{name: value for name, value in given.items() if value is not None})
        prompts = load_prompts(self.data, self.prompt_column)
        evaluation = None if self.evaluation is None else load_prompts(self.evaluation, self.prompt_column)
        if bool(settings.evaluate_every) != (evaluation is not None):
            raise InputError("Evaluation needs both --evaluation (what on) and --evaluate-every (how often).")
        if not self.reward:
            raise InputError("There is nothing to learn from; give --reward my.py:function, or see its --help.")
        rewards = Rewards([reward_named(address) for address in self.reward], self.reward_weights or None)
        sampling = {name: getattr(self, name) for name in ("temperature", "top_k", "top_p", "min_p", "max_new_tokens")}
        config = {"method": card.id, "options": options, "card": card.as_dict()}
        config |= {
            name: getattr(self, name) for name in ("model", "data", "reward", "reward_weights", "dtype")
        } | sampling
        if self.out is not None and Path(_named(self.out)).resolve() == Path(self.model).resolve():
            raise InputError(f"--out is the folder of the model, '{self.model}', which would be lost; choose another.")
        with _removed_if_empty(self.out):
            saved.prepare(self.out, self.resume)
            _quieten_transformers()
            process: Any = language(
                self.model, dtype=self.dtype, device=self.device, system=self.system, lora=self._lora(), **sampling
            )
            _read_all(process, self.data, prompts)
            _read_all(process, self.evaluation or "", evaluation or [])
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

    def _lora(self) -> dict[str, Any] | None:
        if self.lora_rank is None:
            if self.lora_alpha is not None or self.lora_targets:
                raise InputError("A LoRA adapter needs its rank; add --lora-rank.")
            return None
        alpha = 2 * self.lora_rank if self.lora_alpha is None else self.lora_alpha
        targets = {"target_modules": list(self.lora_targets)} if self.lora_targets else {}
        return {"r": self.lora_rank, "lora_alpha": alpha, **targets}


@dataclass(kw_only=True)
class Compare(Command):
    """Run methods side by side on a task, from the same start and at equal cost."""

    task: tyro.conf.Positional[str]  # see `stepwell tasks`
    methods: str  # ids with commas between them, with options as in grpo,gspo:low=1e-3,high=2e-3
    budget: str = "60s"  # what each run may spend: 60s, 5m, 200-steps, 2M-tokens, ...
    seeds: int = 3  # runs of each method; the same seeds for all
    set: Appended = ()  # an option of the task, as name=value
    setting: Appended = ()  # a setting of `stepwell train` to use instead of the task's, as name=value
    evaluation_samples: int = 8  # samples for each held-out prompt
    keep_runs: bool = False  # keep each run's log and model
    out: str | None = None  # the folder for results and page; a new one below runs/ unless given
    progress: bool = True  # show how it goes

    def run(self) -> None:
        self.load_plugins()
        from stepwell.compare.report import write_report
        from stepwell.compare.run import compare
        from stepwell.compare.table import print_comparison

        out = Path(_named(self.out)) if self.out is not None else _unused(Path("runs") / f"compare-{self.task}")
        with _removed_if_empty(str(out)):
            found = compare(
                self.task,
                self.methods,
                budget=self.budget,
                seeds=self.seeds,
                out=out,
                options=options_from(self.set),
                settings=options_from(self.setting),
                evaluation_samples=self.evaluation_samples,
                keep_runs=self.keep_runs,
                progress=self.progress,
            )
        print_comparison(found)
        if not found.complete:
            label, error = next(iter(found.errors.items()))
            raise StepwellError(f"Every method failed; the first, {label}, at {error}")
        print(f"The page is {write_report(found, out / 'report.html')}.")
        if found.errors:
            failed = "; ".join(f"{label} at {error}" for label, error in found.errors.items())
            raise StepwellError(f"Some methods failed: {failed}")


@dataclass(kw_only=True)
class Report(Command):
    """Draw runs into one self-contained page."""

    runs: tyro.conf.Positional[tuple[str, ...]]  # folders of runs, or of one comparison
    out: str = "report.html"  # the page

    def run(self) -> None:
        self.load_plugins()
        from stepwell.compare.runs import report_runs

        print(f"The page is {report_runs(self.runs, _named(self.out))}.")


@dataclass(kw_only=True)
class Check(Command):
    """Hold methods to their laws and to the exact answers their cards name; all methods unless some are given."""

    methods: tyro.conf.Positional[tuple[str, ...]] = ()  # ids

    def run(self) -> None:
        self.load_plugins()
        from stepwell.check.methods import check_method
        from stepwell.methods import registry
        from stepwell.printing import print_table

        for card in [registry.get(name) for name in self.methods or registry.names()]:
            report = check_method(card)  # type: ignore[arg-type]
            print_table(
                (f"{card.id}: law", "largest deviation"), [(law, f"{error:.1e}") for law, error in report.items()]
            )


@dataclass(kw_only=True)
class Tasks(Command):
    """List the tasks that methods are compared on."""

    def run(self) -> None:
        self.load_plugins()
        from stepwell.compare.tasks import tasks
        from stepwell.printing import print_table

        print_table(("task", "what is learnt"), [(entry.name, entry.summary) for entry in tasks()])


COMMANDS: dict[str, type[Command]] = {
    "methods": Methods,
    "train": Train,
    "compare": Compare,
    "report": Report,
    "check": Check,
    "tasks": Tasks,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 2 for what the user can mend, 130 after Ctrl-C."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["--version"]:
        print(f"stepwell {stepwell.__version__}")
        return 0
    try:
        parse(words or ["--help"], COMMANDS, "stepwell", ABOUT).run()
        sys.stdout.flush()
    except StepwellError as error:
        if "--traceback" in words:
            traces.print_exc()
        sentence = " ".join(str(error).split())
        print(f"stepwell: {sentence}{'' if sentence.endswith(('.', '?')) else '.'}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        hint = "; the same command with --resume goes on from there" if _has_checkpoint(words) else ""
        print(f"stepwell: interrupted{hint}.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except SystemExit as end:  # tyro printed the help
        return end.code if isinstance(end.code, int) else 0
    return 0


def reward_named(address: str) -> Any:
    """A reward that comes with Stepwell, by name, or a user's own at `file.py:function`."""
    from stepwell.reward import verifiers
    from stepwell.reward.loading import load_reward

    plain = {"exact_match": verifiers.exact_match, "numeric": verifiers.numeric, "math_equal": verifiers.math_equal}
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


def _named(out: str) -> str:
    """The place to write to; an empty name, as of a shell's variable that is not set, is not the present folder."""
    if not out.strip():
        raise InputError("--out is empty; name a folder or a file, or leave it out.")
    return out


def _has_checkpoint(words: Sequence[str]) -> bool:
    """Whether the run that these words began has left something to resume."""
    after = [words[place + 1] for place, word in enumerate(words[:-1]) if word == "--out"]
    after += [word.removeprefix("--out=") for word in words if word.startswith("--out=")]
    return "train" in words[:1] and any(any(Path(out).glob("checkpoints/update-*")) for out in after)


def _unused(folder: Path) -> Path:
    """The folder itself, or with the first number behind it that is free."""
    number, found = 1, folder
    while found.exists():
        number += 1
        found = folder.with_name(f"{folder.name}-{number}")
    return found


@contextmanager
def _removed_if_empty(out: str | None) -> Iterator[None]:
    """A folder that was made for a run which then could not begin does not stay."""
    made = out is not None and not Path(out).exists()
    try:
        yield
    except BaseException:
        if made and out is not None:
            with suppress(OSError):
                Path(out).rmdir()
        raise


def _read_all(process: Any, data: str, prompts: Sequence[Prompt]) -> None:
    """Every prompt as the model will read it, so that one it cannot read does not end a run hours later."""
    for row, prompt in enumerate(prompts):
        try:
            process.encoder(prompt.value)
        except InputError as error:
            raise InputError(f"{data}, row {row}: {error}") from error


def _quieten_transformers() -> None:
    """Bars and advice while weights are loaded hide the one line that matters."""
    from transformers.utils import logging

    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft")
    logging.disable_progress_bar()
    logging.set_verbosity_error()


def _found(words: str, card: Card) -> bool:
    text = " ".join((card.id, card.title, card.paper, card.arxiv, card.room, card.differs)).casefold()
    return all(word in text for word in words.casefold().split())


if __name__ == "__main__":
    sys.exit(main())
