"""Whatever is wrong with an environment, a setting or a chat template is told in one sentence, where it is met."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from stepwell.errors import InputError
from stepwell.process.conversation import Turns
from stepwell.process.language.process import Language, language
from stepwell.rng import Rng
from stepwell.sampling.record import Drawn
from stepwell.sampling.request import Prompt, Request
from stepwell.sampling.rollout import rollout

Build = Callable[..., Language]
PROMPTS = ["a b c d", "e", "f g h a b c d e f g"]
OFTEN = ["a", "b", "c", ".", "<unk>"]  # end tokens enough that a random model takes several turns


class Parrot:
    """Says the first letters of the alphabet, by the length of what it was told; ends after three turns."""

    def __init__(self, turns: int = 3):
        self.turns, self.heard = turns, 0

    def reset(self, prompt: Any) -> str | None:
        return "x y" if "f" in str(prompt) else None

    def step(self, message: str) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.heard += 1
        number = len(message.split())
        return " ".join("d e f g h".split()[: number % 5]), 0.25 * number, self.heard == self.turns, False, {}


def talk(build: Build, architecture: str = "qwen2", chat: bool = False, **options: Any) -> Turns:
    own = {name: options.pop(name) for name in ("max_turns", "stop", "role") if name in options}
    make = options.pop("make", Parrot)
    options = {"max_new_tokens": 30, "eos": OFTEN} | options
    return build(architecture, chat, **options).turns(make, **own)


def draw(process: Any, count: int = 4, prompts: list[Any] = PROMPTS, **columns: Any) -> Drawn:
    return rollout(process, [Request(Prompt(i, text, columns), count) for i, text in enumerate(prompts)], Rng(0))


def environment(**methods: Any) -> Callable[[], Any]:
    return type("Broken", (Parrot,), {name: lambda self, *a, _v=value, **k: _v(*a) for name, value in methods.items()})


def raises(*_: Any) -> Any:
    raise KeyError("the key")


def raises_exit() -> Any:
    raise SystemExit(3)


async def later(*_: Any) -> Any:
    return "", 0.0, True, False, {}


GOOD = ("d", 0.0, False, False, {})
BROKEN: dict[str, tuple[Any, str]] = {
    "factory is no function": ("Parrot", "made by a function without arguments"),
    "factory raises": (
        raises,
        r"raised KeyError \('the key'\) in the environment's factory at test_inputs",
    ),
    "factory takes arguments": (lambda size: Parrot(), "raised TypeError"),
    "factory returns nothing": (lambda: None, "returned None, which has no method 'reset'"),
    "factory returns a class": (lambda: Parrot, "value of type Parrot, which has no method 'reset'"),
    "reset is missing": (type("Mute", (), {"step": lambda self, m: GOOD}), "no method 'reset'"),
    "step is missing": (type("Deaf", (), {"reset": lambda self, p: None}), "no method 'step'"),
    "reset raises": (environment(reset=raises), "raised KeyError .* in reset at test_inputs.py"),
    "reset needs a column": (
        type("Wants", (Parrot,), {"reset": lambda self, prompt, target: None}),
        "The reset of the environment Wants requires 'target', but the data has no such column; it has none besides",
    ),
    "reset returns a number": (environment(reset=lambda p: 3), "returned 3 as the observation of reset"),
    "reset returns three": (environment(reset=lambda p: ("a", {}, 1)), "a tuple of 3 from reset"),
    "reset says too much": (environment(reset=lambda p: "a " * 40), "first words .* take 40 tokens"),
    "step raises": (
        environment(step=raises),
        r"raised KeyError \('the key'\) in step at test_inputs.py, line \d+",
    ),
    "step returns four": (environment(step=lambda m: ("d", 0.0, False, {})), "returned 4 values from step"),
    "step returns a text": (environment(step=lambda m: "hello"), "returned 'hello' from step"),
    "step is a coroutine": (environment(step=later), "The step of the environment Broken is async"),
    "reset is a coroutine": (environment(reset=later), "The reset of the environment Broken is async"),
    "step takes nothing": (
        type("Deaf", (Parrot,), {"step": lambda self: GOOD}),
        r"called as step\(message\), which \(\)",
    ),
    "reset takes nothing": (
        type("Deaf", (Parrot,), {"reset": lambda self: None}),
        r"called as reset\(prompt, \*\*columns\), which \(\) does not take",
    ),
    "observation is half a character": (environment(step=lambda m: ("\ud800", *GOOD[1:])), "holds half a character"),
    "reward is too large": (environment(step=lambda m: ("d", 10**400, *GOOD[2:])), "a finite number is right"),
    "observation is no text": (
        environment(step=lambda m: (torch.ones(3), *GOOD[1:])),
        "type Tensor as the observation",
    ),
    "observation is bytes": (environment(step=lambda m: (b"d", *GOOD[1:])), "type bytes as the observation of step"),
    "observation is a message": (
        environment(step=lambda m: ({"role": "tool", "content": "d"}, *GOOD[1:])),
        "answers a plain text with the message",
    ),
    "reward is NaN": (environment(step=lambda m: ("d", float("nan"), *GOOD[2:])), "the reward nan; a finite number"),
    "reward is infinite": (environment(step=lambda m: ("d", float("inf"), *GOOD[2:])), "the reward inf"),
    "reward is None": (environment(step=lambda m: ("d", None, *GOOD[2:])), "the reward None"),
    "reward is a text": (environment(step=lambda m: ("d", "1", *GOOD[2:])), "the reward '1'"),
    "terminated is a number": (environment(step=lambda m: ("d", 0.0, 1, False, {})), "terminated=1; True or False"),
    "truncated is None": (environment(step=lambda m: ("d", 0.0, False, None, {})), "truncated=None"),
    "info is None": (environment(step=lambda m: ("d", 0.0, False, False, None)), "returned None as info; a dict"),
    "one for all": ((lambda one: lambda: one)(Parrot()), "returned the same Parrot twice"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_environment_is_told_in_one_sentence(small_language: Build, kind: str) -> None:
    make, message = BROKEN[kind]
    with pytest.raises(InputError, match=message) as caught:
        draw(talk(small_language, make=make))
    said = str(caught.value)
    assert said.endswith(".")
    assert "\n" not in said
    assert len(said) < 400


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_turns": 0}, "max_turns=0 is not a whole number from 1"),
        ({"max_turns": 2.0}, "max_turns=2.0 is not"),
        ({"max_turns": True}, "max_turns=True is not"),
        ({"stop": ["", "a"]}, "not a text, nor texts, that end a turn"),
        ({"stop": [3]}, "not a text, nor texts, that end a turn"),
        ({"role": ""}, "role='' is not the name of a chat's role"),
        ({"role": None}, "role=None is not the name of a chat's role"),
    ],
)
def test_settings_that_make_no_sense_are_refused(small_language: Build, settings: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        talk(small_language, **settings)


def test_a_column_in_the_place_of_the_prompt_is_told(small_language: Build) -> None:
    takes = type("Takes", (Parrot,), {"reset": lambda self, answer: None})
    with pytest.raises(InputError, match=r"takes the column 'answer' first, where it is given the prompt"):
        draw(talk(small_language, make=takes), answer="a")


@pytest.mark.parametrize("message", [{"role": "tool", "content": 3}, {"role": None, "content": "d"}, {"role": "tool"}])
def test_a_message_without_a_role_or_a_content_in_words_is_told(small_language: Build, message: Any) -> None:
    says = environment(step=lambda m: (message, *GOOD[1:]))
    with pytest.raises(InputError, match="returned a value of type dict as the observation of step"):
        draw(talk(small_language, chat=True, make=says), 4, [[{"role": "user", "content": "f"}]])


def test_an_environment_that_exits_when_it_is_copied_is_one_that_cannot_be_copied(small_language: Build) -> None:
    exits = type("Exits", (Parrot,), {"__deepcopy__": lambda self, memo: raises_exit()})
    assert draw(talk(small_language, make=exits)).samples.values == draw(talk(small_language)).samples.values


def test_a_conversation_is_held_by_a_language_model_and_only_once(small_language: Build) -> None:
    with pytest.raises(InputError, match="needs a language model"):
        Turns("folder", Parrot)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="needs a language model"):
        talk(small_language).turns(Parrot)


def test_an_environment_that_answers_otherwise_when_asked_again_is_told(small_language: Build) -> None:
    answers = iter("d e f g h i j k l m n o p q r s t u v w x y z".split() * 100)

    class Fickle(Parrot):
        def step(self, message: str) -> Any:
            return next(answers), 0.0, False, False, {}

    process = talk(small_language, make=Fickle, max_new_tokens=40)
    drawn = draw(process, 2)
    rows = drawn.trajectories
    row = next(i for i, turns in enumerate(drawn.samples.columns["turns"]) if len(turns) > 1)
    step = int(rows.length[row]) - 1
    with pytest.raises(InputError, match="has to depend on the prompt and on what it was told alone"):
        rollout(process, [Request(drawn.prompts[row], 2, start=(row, step))], Rng(1), so_far=rows)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{% for m in messages %}{{ m.content }}{% endfor %}{{ raise_exception('no') if messages|length > 1 }}",
            "refuse",
        ),
        ("{{ messages|length }} {% for m in messages %}{{ m.content }} {% endfor %}", "writes the prompt .* otherwise"),
        (
            "{% for m in messages %}{{ m.content if m.role != 'assistant' }} {% endfor %}",
            "leaves out what the assistant",
        ),
    ],
    ids=["refuses", "looks ahead", "leaves out"],
)
def test_a_template_that_cannot_hold_a_conversation_is_told(
    make_model: Any, make_tokenizer: Any, template: str, message: str
) -> None:
    tokenizer = make_tokenizer(chat=True)
    tokenizer.chat_template = template
    process = language(make_model("gpt2"), tokenizer, max_new_tokens=30, eos=OFTEN).turns(Parrot)
    with pytest.raises(InputError, match=message):
        draw(process, 4, [[{"role": "user", "content": "f"}]])
