"""The tools task: look values up and have sums done, in a tiny protocol of turns, before giving the answer."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from stepwell.errors import InputError
from stepwell.process.base import Process
from stepwell.process.conversation import environment_return
from stepwell.reward.mixing import Rewards
from stepwell.rng import Rng
from stepwell.sampling.request import Prompt
from stepwell.tasks import warm_start
from stepwell.tasks.cache import cached_folder
from stepwell.tasks.countdown import value_of
from stepwell.tasks.registry import Task, task
from stepwell.tasks.warm_start import Piece, WarmStart

LETTERS = "abcdefgh"
CHARACTERS = LETTERS + "0123456789+-*?=!:;"
END = "<end>"
SETTINGS: dict[str, Any] = {
    "learning_rate": 1.5e-4,
    "prompts_per_step": 32,
    "group_size": 8,
    "tokens_per_microbatch": 8192,
}
"""Training settings under which plain GRPO learns much in half a minute on two cores."""


@dataclass(frozen=True)
class Problem:
    """An expression in names, and the value of each name that the model cannot know."""

    expression: str
    values: Mapping[str, int]

    @property
    def prompt(self) -> str:
        """As the model reads it.

        Example:
            >>> problem = Problem("c*a-f", {"c": 7, "a": 3, "f": 12})
            >>> problem.prompt, problem.in_numbers, problem.answer
            ('c*a-f;', '7*3-12', 9)
        """
        return self.expression + ";"

    @property
    def names(self) -> list[str]:
        """In the order of the expression."""
        return [letter for letter in self.expression if letter in self.values]

    @property
    def in_numbers(self) -> str:
        return "".join(str(self.values.get(letter, letter)) for letter in self.expression)

    @property
    def answer(self) -> int:
        value = value_of(self.in_numbers)
        assert value is not None
        return value


@dataclass
class Desk:
    """The environment: `?name` looks a value up, `=7*3-12` computes, `!9` answers and ends; every call costs `cost`.

    Whatever cannot be done gets a question mark. The answer earns 1 if it is right.

    Example:
        >>> desk = Desk(cost=0.1)
        >>> desk.reset("c*a-f;", values={"c": 7, "a": 3, "f": 12}, answer=9)
        >>> desk.step("?c"), desk.step("=7*3-12")[:2], desk.step("=c")[0], desk.step("!9")[1:3]
        ((':7;', -0.1, False, False, {}), (':9;', -0.1), ':?;', (1.0, True))
    """

    cost: float = 0.0
    values: Mapping[str, int] = field(default_factory=dict)
    answer: int = 0

    def reset(self, prompt: str, values: Mapping[str, int], answer: int) -> None:
        self.values, self.answer = values, answer

    def step(self, message: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        order, said = message[:1], message[1:]
        if order == "!":
            return "", float(said == str(self.answer)), True, False, {}
        found = self.values.get(said) if order == "?" else value_of(said) if order == "=" else None
        return f":{'?' if found is None else found};", 0.0 - self.cost, False, False, {}


def demonstration(problem: Problem, guessed: Mapping[str, int]) -> list[Piece]:
    """How a problem is solved, in pieces; names in `guessed` are not looked up but taken to have that value.

    Example:
        >>> pieces = demonstration(Problem("c*a-f", {"c": 7, "a": 3, "f": 12}), {"a": 5})
        >>> "".join(text for text, _ in pieces).replace("<end>", " ")
        'c*a-f;?c :7;?f :12;=7*5-12 :23;!23 '
    """
    pieces: list[Piece] = [(problem.prompt, False)]
    for name in problem.names:
        if name not in guessed:
            pieces += [(f"?{name}{END}", True), (f":{problem.values[name]};", False)]
    believed = Problem(problem.expression, {**problem.values, **guessed})
    pieces += [(f"={believed.in_numbers}{END}", True), (f":{believed.answer};", False)]
    return [*pieces, (f"!{believed.answer}{END}", True)]


def all_expressions(names: int) -> list[str]:
    """Every expression of so many different names with + - * between them, in order.

    Example:
        >>> all_expressions(2)[:4], len(all_expressions(2))
        (['a*b', 'a+b', 'a-b', 'a*c'], 168)
    """
    chosen = itertools.permutations(LETTERS, names)
    signs = list(itertools.product("*+-", repeat=names - 1))
    return ["".join(itertools.chain.from_iterable(zip(some, (*s, ""), strict=True))) for some in chosen for s in signs]


def problems_for(expressions: Sequence[str], highest: int, rng: Rng) -> list[Problem]:
    """Each expression with values from 1 to `highest` drawn for its names."""
    names = [[letter for letter in expression if letter in LETTERS] for expression in expressions]
    values = iter(_numbers(sum(len(some) for some in names), highest, rng))
    return [Problem(e, {name: next(values) for name in some}) for e, some in zip(expressions, names, strict=True)]


def demonstrations(expressions: Sequence[str], highest: int, haste: float, count: int, rng: Rng) -> list[list[Piece]]:
    """`count` demonstrations; each name is guessed, instead of looked up, with probability `haste`."""
    problems = problems_for([expressions[i - 1] for i in _numbers(count, len(expressions), rng)], highest, rng)
    names = [(row, name) for row, problem in enumerate(problems) for name in problem.names]
    guessed: list[dict[str, int]] = [{} for _ in problems]
    hasty = (rng.uniform(len(names)) < haste).tolist()
    for (row, name), guesses, value in zip(names, hasty, _numbers(len(names), highest, rng), strict=True):
        if guesses:
            guessed[row][name] = value
    return [demonstration(*pair) for pair in zip(problems, guessed, strict=True)]


def _numbers(count: int, highest: int, rng: Rng) -> list[int]:
    """Whole numbers from 1 to `highest`, drawn independently."""
    return [1 + int(number) for number in (rng.uniform(count) * highest).long().tolist()]


def warm_model(start: WarmStart, expressions: Sequence[str], highest: int, haste: float, count: int) -> Path:
    """The folder of a model that imitated demonstrations on these expressions, with other values each time."""
    shown = hashlib.blake2b(repr(list(expressions)).encode(), digest_size=16).hexdigest()
    code = hashlib.blake2b(digest_size=16)
    for file in (warm_start.__file__, __file__):
        code.update(Path(file).read_bytes())
    key: dict[str, Any] = {"start": asdict(start), "characters": CHARACTERS, "expressions": shown}
    key |= {"code": code.hexdigest(), "highest": highest, "haste": haste, "count": count}

    def make(folder: Path) -> None:
        made = demonstrations(expressions, highest, haste, count, Rng(start.seed).split("tools"))
        warm_start.imitate(folder, start, CHARACTERS, made)

    return cached_folder("tools", key, make)


@task("tools")
def tools(
    names: int = 3,
    highest: int = 9,
    haste: float = 0.15,
    cost: float = 0.0,
    evaluation: int = 300,
    warm_steps: int = 300,
    seed: int = 0,
) -> Task:
    """Sums of unknowns, with a table to look them up in and a calculator: turns, and tool output that is not trained.

    `names` unknowns from 1 to `highest`; `cost` of every call of a tool. The 0.3 M transformer is warm-started, once,
    on demonstrations that guess an unknown instead of looking it up with probability `haste`. `evaluation` expressions
    are held out from the demonstrations and from training. `seed` draws them, the values, and the model's start.
    """
    if not 2 <= names <= 4 or highest < 2 or not 0 <= haste <= 1 or cost < 0:
        raise InputError(
            f"The tools task takes 2 to 4 names, values up to 2 or more, a haste from 0 to 1 and a cost from 0, not "
            f"{names}, {highest}, {haste}, {cost}."
        )
    expressions = all_expressions(names)
    if not 0 < evaluation < len(expressions):
        raise InputError(f"{evaluation} of {len(expressions)} expressions cannot be held out; some have to remain.")
    order = Rng(seed).split("tools").permutation(len(expressions)).tolist()
    held_out, rest = ([expressions[i] for i in sorted(part)] for part in (order[:evaluation], order[evaluation:]))
    digits = len(str(highest))
    longest = names * (digits + 5) + names * (digits + 1) + 4 + 2 * (names * digits + 1) + 2
    start = WarmStart(steps=warm_steps, batch=64, seed=seed, positions=max(64, longest + 2 * names))

    def process() -> Process:
        from stepwell.process.language.process import language

        folder = warm_model(start, rest, highest, haste, start.steps * start.batch)
        model = language(folder, max_new_tokens=longest)
        return model.turns(lambda: Desk(cost), max_turns=names + 3)

    problems = problems_for([*rest, *held_out], highest, Rng(seed).split("values"))
    prompts = [_prompt(number, problem) for number, problem in enumerate(problems)]
    return Task(
        name="tools",
        title="Tools",
        description=(
            f"Given an expression of {names} names, look each value up (`?c`), have the sum done (`=7*3-12`) and "
            f"answer (`!9`). {len(rest)} expressions to learn on, {len(held_out)} held out."
        ),
        process=process,
        prompts=prompts[: len(rest)],
        evaluation=prompts[len(rest) :],
        rewards=Rewards(environment_return),
        settings=SETTINGS,
        show=show,
        unit="solved" if not cost else "reward",
        threads=1,
    )


def show(prompt: Prompt, completion: str) -> str:
    """A conversation with what is wrong about it, as a report prints it."""
    answer = completion.rpartition("!")[2] if "!" in completion else None
    right = prompt.columns["answer"]
    return (
        completion if answer == str(right) else f"{completion} ({'no answer' if answer is None else f'it is {right}'})"
    )


def _prompt(number: int, problem: Problem) -> Prompt:
    return Prompt(number, problem.prompt, {"values": dict(problem.values), "answer": problem.answer})
