"""The tools task: look values up and use a calculator, in a tiny protocol of turns, before giving the answer."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepwell.errors import InputError
from stepwell.tasks import warm_start
from stepwell.tasks.cache import cached_folder
from stepwell.tasks.countdown import value_of
from stepwell.tasks.registry import Task, task
from stepwell.tasks.warm_start import Piece, WarmStart

if TYPE_CHECKING:  # tasks are listed without torch
    from stepwell.process.base import Process
    from stepwell.rng import Rng
    from stepwell.sampling.request import Prompt

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
class ToolsProblem:
    """An expression in names, and the value of each name, which the model cannot know."""

    expression: str
    values: Mapping[str, int]

    @property
    def prompt(self) -> str:
        """The text that the model reads.

        Example:
            >>> problem = ToolsProblem("c*a-f", {"c": 7, "a": 3, "f": 12})
            >>> problem.prompt, problem.in_numbers, problem.answer
            ('c*a-f;', '7*3-12', 9)
        """
        return self.expression + ";"

    @property
    def names(self) -> list[str]:
        """The names, in the order of the expression."""
        return [letter for letter in self.expression if letter in self.values]

    @property
    def in_numbers(self) -> str:
        """The expression with values in place of names."""
        return "".join(str(self.values.get(letter, letter)) for letter in self.expression)

    @property
    def answer(self) -> int:
        """The value of the expression."""
        value = value_of(self.in_numbers)
        assert value is not None
        return value


@dataclass
class Desk:
    """The environment: `?name` looks a value up, `=7*3-12` computes, `!9` answers and ends; every call costs `cost`.

    The reply to anything else is a question mark. The right answer earns 1.

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
        order, text = message[:1], message[1:]
        if order == "!":
            return "", float(text == str(self.answer)), True, False, {}
        value = self.values.get(text) if order == "?" else value_of(text) if order == "=" else None
        return f":{'?' if value is None else value};", 0.0 - self.cost, False, False, {}


def demonstration(problem: ToolsProblem, guessed: Mapping[str, int]) -> list[Piece]:
    """The solution of a problem, in pieces; names in `guessed` are not looked up but taken to have that value.

    Example:
        >>> pieces = demonstration(ToolsProblem("c*a-f", {"c": 7, "a": 3, "f": 12}), {"a": 5})
        >>> "".join(text for text, _ in pieces).replace("<end>", " ")
        'c*a-f;?c :7;?f :12;=7*5-12 :23;!23 '
    """
    pieces: list[Piece] = [(problem.prompt, False)]
    for name in problem.names:
        if name not in guessed:
            pieces += [(f"?{name}{END}", True), (f":{problem.values[name]};", False)]
    believed = ToolsProblem(problem.expression, {**problem.values, **guessed})
    pieces += [(f"={believed.in_numbers}{END}", True), (f":{believed.answer};", False)]
    return [*pieces, (f"!{believed.answer}{END}", True)]


def all_expressions(names: int) -> list[str]:
    """Every expression of `names` different names with + - * between them, in order.

    Example:
        >>> all_expressions(2)[:4], len(all_expressions(2))
        (['a*b', 'a+b', 'a-b', 'a*c'], 168)
    """
    chosen = itertools.permutations(LETTERS, names)
    signs = list(itertools.product("*+-", repeat=names - 1))
    return ["".join(itertools.chain.from_iterable(zip(each, (*s, ""), strict=True))) for each in chosen for s in signs]


def problems_for(expressions: Sequence[str], highest: int, rng: Rng) -> list[ToolsProblem]:
    """Each expression with values from 1 to `highest` drawn for its names."""
    names = [[letter for letter in expression if letter in LETTERS] for expression in expressions]
    values = iter(_numbers(sum(map(len, names)), highest, rng))
    return [
        ToolsProblem(expression, {name: next(values) for name in own})
        for expression, own in zip(expressions, names, strict=True)
    ]


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
        from stepwell.rng import Rng

        rng = Rng(start.seed).split("tools")
        warm_start.imitate(folder, start, CHARACTERS, demonstrations(expressions, highest, haste, count, rng))

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

    Each of the `names` unknowns has a value from 1 to `highest`; `cost` is what every call of a tool costs. The 0.3 M
    transformer is warm-started, once, on demonstrations that guess an unknown instead of looking it up with probability
    `haste`. `evaluation` expressions are held out from the demonstrations and from training. `seed` draws them, the
    values, and the model's start.
    """
    from stepwell.process.conversation.environment import environment_return
    from stepwell.reward.mixing import Rewards
    from stepwell.rng import Rng

    for name, given, holds, right in (
        ("names", names, 2 <= names <= 4, "2, 3 or 4"),
        ("highest", highest, highest >= 2, "at least 2"),
        ("haste", haste, 0 <= haste <= 1, "from 0 to 1"),
        ("cost", cost, cost >= 0, "0 or more"),
    ):
        if not holds:
            raise InputError(f"{name} of task tools must be {right}, got {given}.")
    expressions = all_expressions(names)
    if not 0 < evaluation < len(expressions):
        raise InputError(
            f"evaluation of task tools must be from 1 to {len(expressions) - 1}, got {evaluation}: there are "
            f"{len(expressions)} expressions."
        )
    order = Rng(seed).split("tools").permutation(len(expressions)).tolist()
    held_out, rest = ([expressions[i] for i in sorted(part)] for part in (order[:evaluation], order[evaluation:]))
    digits = len(str(highest))
    longest = names * (digits + 5) + names * (digits + 1) + 4 + 2 * (names * digits + 1) + 2
    start = WarmStart(steps=warm_steps, batch=64, seed=seed, positions=max(64, longest + 2 * names))

    def process() -> Process:
        from stepwell.process.conversation.build import conversation
        from stepwell.process.language.build import language

        folder = warm_model(start, rest, highest, haste, start.steps * start.batch)
        model = language(folder, max_new_tokens=longest)
        return conversation(model, lambda: Desk(cost), max_turns=names + 3)

    problems = problems_for([*rest, *held_out], highest, Rng(seed).split("values"))
    prompts = [_prompt(number, problem) for number, problem in enumerate(problems)]
    return Task(
        name="tools",
        title="Tools",
        description=(
            f"Given an expression of {names} names, look each value up (`?c`), compute (`=7*3-12`) and "
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
    """A conversation with its mistake, as a report prints it."""
    right = prompt.columns["answer"]
    if "!" not in completion:
        return f"{completion} (no answer)"
    return completion if completion.rpartition("!")[2] == str(right) else f"{completion} (it is {right})"


def _prompt(number: int, problem: ToolsProblem) -> Prompt:
    from stepwell.sampling.request import Prompt

    return Prompt(number, problem.prompt, {"values": dict(problem.values), "answer": problem.answer})
