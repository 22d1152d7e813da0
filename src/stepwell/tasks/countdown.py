"""The countdown task: combine the given numbers with + - * into the target; small enough to learn in a minute."""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepwell.errors import InputError
from stepwell.tasks import warm_start
from stepwell.tasks.cache import cached_folder
from stepwell.tasks.registry import Task, task
from stepwell.tasks.warm_start import WarmStart

if TYPE_CHECKING:  # tasks are listed without torch
    from stepwell.process.base import Process
    from stepwell.sampling.request import Prompt

CHARACTERS = "0123456789+-* =:"
_EXPRESSION = re.compile(r"(?:0|[1-9][0-9]{0,5})(?:[+*-](?:0|[1-9][0-9]{0,5})){0,15}")
_MOST_EXPRESSIONS = 2_000_000
SETTINGS: dict[str, Any] = {
    "learning_rate": 1.5e-4,
    "prompts_per_step": 32,
    "group_size": 8,
    "tokens_per_microbatch": 8192,
}
"""Training settings under which plain GRPO learns much in half a minute on two cores."""


@dataclass(frozen=True)
class CountdownProblem:
    """Numbers in ascending order, the target, and every expression that solves it."""

    numbers: tuple[int, ...]
    target: int
    solutions: tuple[str, ...]

    @property
    def prompt(self) -> str:
        """The text that the model reads.

        Example:
            >>> CountdownProblem((2, 5, 9), 47, ("5*9+2",)).prompt
            '2 5 9=47:'
        """
        return f"{' '.join(map(str, self.numbers))}={self.target}:"


def value_of(expression: str) -> int | None:
    """The value of whole numbers joined by + - *, `*` first and then from left to right; None for anything else.

    No parentheses, no signs, no spaces, no leading zeros; at most 16 numbers of at most 6 digits.

    Example:
        >>> value_of("2+3*4"), value_of("2+"), value_of("__import__('os')")
        (14, None, None)
    """
    if _EXPRESSION.fullmatch(expression) is None:
        return None
    total = 0
    for sign, product in re.findall(r"([+-]?)([^+-]+)", expression):
        term = math.prod(int(number) for number in product.split("*"))
        total += -term if sign == "-" else term
    return total


def verdict(expression: str, numbers: Sequence[int], target: int) -> str:
    """The reason that an expression does not solve the problem, or '' where it does.

    The rules: an expression as `value_of` reads it, which uses each of the numbers exactly as often as it is given
    and equals the target.

    Example:
        >>> verdict("5*9+2", [2, 5, 9], 47), verdict("5*9+5", [2, 5, 9], 50), verdict("5*9-2", [2, 5, 9], 47)
        ('', 'not the given numbers', '= 43')
    """
    value = value_of(expression)
    if value is None:
        return "no expression"
    if sorted(int(number) for number in re.findall("[0-9]+", expression)) != sorted(numbers):
        return "not the given numbers"
    return "" if value == target else f"= {value}"


def solved(completions: Sequence[str], numbers: Sequence[Sequence[int]], target: Sequence[int]) -> list[float]:
    """The reward: 1.0 for a solution, 0.0 for anything else."""
    rows = zip(completions, numbers, target, strict=True)
    return [float(verdict(text, given, wanted) == "") for text, given, wanted in rows]


def well_formed(completions: Sequence[str], numbers: Sequence[Sequence[int]]) -> list[float]:
    """A reward for form alone: 1.0 where an expression uses the given numbers, whatever it equals."""
    rows = zip(completions, numbers, strict=True)
    return [float((v := value_of(text)) is not None and verdict(text, given, v) == "") for text, given in rows]


def show(prompt: Prompt, completion: str) -> str:
    """A completion with its mistake, as a report prints it."""
    wrong = verdict(completion, prompt.columns["numbers"], prompt.columns["target"])
    if not wrong:
        return f"{completion} = {prompt.columns['target']}"
    return f"{completion} {wrong}" if wrong.startswith("=") else f"{completion} ({wrong})"


def all_problems(count: int, largest: int, highest: int) -> list[CountdownProblem]:
    """Every solvable problem of `count` numbers from 1 to `largest` with a target from 1 to `highest`, in order.

    All expressions are enumerated, so each problem knows all of its solutions. Raises `InputError` for more than two
    million expressions.
    """
    for name, given, least in (("numbers", count, 2), ("largest", largest, 2), ("highest", highest, 1)):
        if given < least:
            raise InputError(f"{name} of task countdown must be at least {least}, got {given}.")
    expressions = largest**count * 3 ** (count - 1)
    if expressions > _MOST_EXPRESSIONS:
        raise InputError(
            f"numbers and largest of task countdown must make at most {_MOST_EXPRESSIONS} expressions, got "
            f"{expressions} from {count} numbers up to {largest}."
        )
    solutions: dict[tuple[tuple[int, ...], int], list[str]] = {}
    for numbers in itertools.product(range(1, largest + 1), repeat=count):
        key = tuple(sorted(numbers))
        for signs in itertools.product("+-*", repeat=count - 1):
            expression = str(numbers[0]) + "".join(f"{s}{n}" for s, n in zip(signs, numbers[1:], strict=True))
            value = value_of(expression)
            if value is not None and 1 <= value <= highest:
                solutions.setdefault((key, value), []).append(expression)
    return [CountdownProblem(*key, tuple(expressions)) for key, expressions in sorted(solutions.items())]


def warm_model(start: WarmStart, problems: Sequence[CountdownProblem]) -> Path:
    """The folder of a model that imitated one solution of each problem: the last in alphabetical order.

    It is always the same one, `9*6+2` rather than `2+6*9`, so that little is left to guess and imitation is quick.
    """
    pairs = [(problem.prompt, max(problem.solutions)) for problem in problems]
    shown = hashlib.blake2b(repr(pairs).encode(), digest_size=16).hexdigest()
    code = hashlib.blake2b(Path(warm_start.__file__).read_bytes(), digest_size=16).hexdigest()
    key = {"start": asdict(start), "characters": CHARACTERS, "pairs": shown, "code": code}
    return cached_folder("countdown", key, lambda folder: warm_start.demonstrate(folder, start, CHARACTERS, pairs))


@task("countdown")
def countdown(
    numbers: int = 3,
    largest: int = 9,
    highest: int = 99,
    evaluation: int = 300,
    warm_steps: int = WarmStart.steps,
    seed: int = 0,
) -> Task:
    """Combine numbers with + - * into a target: a 0.3 M transformer, warm-started in half a minute, then cached.

    `numbers` are given, each from 1 to `largest`; targets go from 1 to `highest`; `evaluation` problems are held out
    from the demonstrations and from training. `seed` draws the held-out problems, the model's weights and the
    demonstrations.
    """
    from stepwell.reward.mixing import Rewards
    from stepwell.rng import Rng

    problems = all_problems(numbers, largest, highest)
    if not 0 < evaluation < len(problems):
        raise InputError(
            f"evaluation of task countdown must be from 1 to {len(problems) - 1}, got {evaluation}: there are "
            f"{len(problems)} problems."
        )
    order = Rng(seed).split("countdown").permutation(len(problems)).tolist()
    held_out, rest = ([problems[i] for i in sorted(part)] for part in (order[:evaluation], order[evaluation:]))
    start = WarmStart(steps=warm_steps, seed=seed)

    def process() -> Process:
        from stepwell.process.language.build import language

        folder = warm_model(start, rest)
        return language(folder, max_new_tokens=numbers * (len(str(largest)) + 1) + 2)

    return Task(
        name="countdown",
        title="Countdown",
        description=(
            f"Given {numbers} numbers and a target, write an expression with + - * that uses each number once and "
            f"equals the target. {len(rest)} problems to learn on, {len(held_out)} held out."
        ),
        process=process,
        prompts=[_prompt(i, problem) for i, problem in enumerate(rest)],
        evaluation=[_prompt(len(rest) + i, problem) for i, problem in enumerate(held_out)],
        rewards=Rewards(solved),
        settings=SETTINGS,
        show=show,
        unit="solved",
        threads=1,
    )


def _prompt(number: int, problem: CountdownProblem) -> Prompt:
    from stepwell.sampling.request import Prompt

    return Prompt(number, problem.prompt, {"numbers": list(problem.numbers), "target": problem.target})
