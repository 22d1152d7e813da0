"""Mistakes in an environment, a setting or a chat template are each refused in one sentence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from parrot import OFTEN, Build, Parrot, draw, talk

from stepwell.errors import InputError
from stepwell.process.conversation.build import conversation
from stepwell.process.language.build import language
from stepwell.rng import Rng
from stepwell.sampling.request import Request
from stepwell.sampling.rollout import rollout


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
    "factory is no function": (
        "Parrot",
        "^make_environment must be a class or a function without arguments, got 'Parrot'",
    ),
    "factory raises": (
        raises,
        r"raised KeyError \('the key'\) in the environment's factory at test_inputs",
    ),
    "factory takes arguments": (lambda size: Parrot(), "raised TypeError"),
    "factory returns nothing": (lambda: None, "must return an object with .*, got None, which has no method 'reset'"),
    "factory returns a class": (lambda: Parrot, "value of type Parrot, which has no method 'reset'"),
    "reset is missing": (type("Mute", (), {"step": lambda self, m: GOOD}), "no method 'reset'"),
    "step is missing": (type("Deaf", (), {"reset": lambda self, p: None}), "no method 'step'"),
    "reset raises": (environment(reset=raises), "raised KeyError .* in reset at test_inputs.py"),
    "reset needs a column": (
        type("Wants", (Parrot,), {"reset": lambda self, prompt, target: None}),
        "The reset of the environment Wants requires 'target', but the data has no such column; it has none besides",
    ),
    "reset returns a number": (
        environment(reset=lambda p: 3),
        "returns from reset must be a text, or for a chat .*, got 3",
    ),
    "reset returns three": (
        environment(reset=lambda p: ("a", {}, 1)),
        "The reset of the environment Broken must return an observation, .*, got a tuple of 3",
    ),
    "reset says too much": (
        environment(reset=lambda p: "a " * 70),
        "first words .* take 70 tokens, and after the prompt the model has positions for 61; shorten them",
    ),
    "step raises": (
        environment(step=raises),
        r"raised KeyError \('the key'\) in step at test_inputs.py, line \d+",
    ),
    "step returns four": (
        environment(step=lambda m: ("d", 0.0, False, {})),
        "The step of the environment Broken must return .*, got a tuple of 4",
    ),
    "step returns a text": (
        environment(step=lambda m: "hello"),
        "The step of the environment Broken must return .*, got 'hello'",
    ),
    "step is a coroutine": (
        environment(step=later),
        "The step of the environment Broken must be a plain function, got an async one",
    ),
    "reset is a coroutine": (
        environment(reset=later),
        "The reset of the environment Broken must be a plain function, got an async one",
    ),
    "step takes nothing": (
        type("Deaf", (Parrot,), {"step": lambda self: GOOD}),
        r"must be callable as step\(message\), got the signature \(\)",
    ),
    "reset takes nothing": (
        type("Deaf", (Parrot,), {"reset": lambda self: None}),
        r"must be callable as reset\(prompt, \*\*columns\), got the signature \(\)",
    ),
    "observation is half a character": (environment(step=lambda m: ("\ud800", *GOOD[1:])), "holds half a character"),
    "reward is too large": (environment(step=lambda m: ("d", 10**400, *GOOD[2:])), "must be a finite number, got 1000"),
    "observation is no text": (
        environment(step=lambda m: (torch.ones(3), *GOOD[1:])),
        "returns from step must be a text, .*, got a value of type Tensor",
    ),
    "observation is bytes": (
        environment(step=lambda m: (b"d", *GOOD[1:])),
        "returns from step must be a text, .*, got a value of type bytes",
    ),
    "observation is a message": (
        environment(step=lambda m: ({"role": "tool", "content": "d"}, *GOOD[1:])),
        "a conversation that is a plain text must be a text, got {'role'",
    ),
    "reward is NaN": (environment(step=lambda m: ("d", float("nan"), *GOOD[2:])), "must be a finite number, got nan"),
    "reward is infinite": (
        environment(step=lambda m: ("d", float("inf"), *GOOD[2:])),
        "must be a finite number, got inf",
    ),
    "reward is None": (environment(step=lambda m: ("d", None, *GOOD[2:])), "must be a finite number, got None"),
    "reward is a text": (environment(step=lambda m: ("d", "1", *GOOD[2:])), "must be a finite number, got '1'"),
    "terminated is a number": (
        environment(step=lambda m: ("d", 0.0, 1, False, {})),
        "'terminated' of the environment Broken must be True or False, got 1",
    ),
    "truncated is None": (
        environment(step=lambda m: ("d", 0.0, False, None, {})),
        "'truncated' of the environment Broken must be True or False, got None",
    ),
    "info is None": (
        environment(step=lambda m: ("d", 0.0, False, False, None)),
        "'info' of the environment Broken must be a dict, got None",
    ),
    "one for all": (
        (lambda one: lambda: one)(Parrot()),
        "must return a new object each time, got the same Parrot twice",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_environment_is_refused_in_one_sentence(small_language: Build, kind: str) -> None:
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
        ({"max_turns": 0}, "max_turns must be a whole number, at least 1, got 0"),
        ({"max_turns": 2.0}, "max_turns must be a whole number, at least 1, got 2.0"),
        ({"max_turns": True}, "max_turns must be a whole number, at least 1, got True"),
        ({"stop": ["", "a"]}, "stop must be a text, or texts, none of them empty, got .'', 'a'."),
        ({"stop": [3]}, "stop must be a text, or texts, none of them empty, got .3."),
        ({"role": ""}, "role must be the name of a chat's role, .*, got ''"),
        ({"role": None}, "role must be a text, got None"),
    ],
)
def test_settings_that_make_no_sense_are_refused(small_language: Build, settings: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        talk(small_language, **settings)


def test_a_column_in_the_place_of_the_prompt_is_refused(small_language: Build) -> None:
    takes = type("Takes", (Parrot,), {"reset": lambda self, answer: None})
    with pytest.raises(
        InputError, match=r"must take the prompt first, as reset\(prompt, \*\*columns\), got the column 'answer'"
    ):
        draw(talk(small_language, make=takes), answer="a")


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ({"role": "tool", "content": 3}, "a message whose 'content' is of type int"),
        ({"role": None, "content": "d"}, "a message without a 'role' that is a text"),
        ({"role": "tool", "content": None}, "a message without a 'content'"),
        ({"role": "tool"}, "a value of type dict"),
        ({"role": "tool", "content": [{"type": "image"}]}, "a message with a part of type 'image', of which only"),
    ],
)
def test_a_message_without_a_role_or_a_content_is_refused(small_language: Build, message: Any, said: str) -> None:
    says = environment(step=lambda m: (message, *GOOD[1:]))
    with pytest.raises(InputError, match=rf"returns from step must be a text, .*, got {said}"):
        draw(talk(small_language, chat=True, make=says), 4, [[{"role": "user", "content": "f"}]])


def test_an_environment_that_exits_when_copied_cannot_be_copied(small_language: Build) -> None:
    exits = type("Exits", (Parrot,), {"__deepcopy__": lambda self, memo: raises_exit()})
    assert draw(talk(small_language, make=exits)).samples.values == draw(talk(small_language)).samples.values


def test_a_conversation_needs_a_language_model(small_language: Build) -> None:
    for model in ("folder", talk(small_language)):
        with pytest.raises(InputError, match=r"^model must be a language model, such as sw.language\(FOLDER\), got"):
            conversation(model, Parrot)  # type: ignore[arg-type]


def test_an_environment_that_changes_its_answer_is_refused(small_language: Build) -> None:
    answers = iter("d e f g h i j k l m n o p q r s t u v w x y z".split() * 100)

    class Fickle(Parrot):
        def step(self, message: str) -> Any:
            return next(answers), 0.0, False, False, {}

    process = talk(small_language, make=Fickle, max_new_tokens=40)
    drawn = draw(process, 2)
    rows = drawn.trajectories
    row = next(i for i, turns in enumerate(drawn.samples.columns["turns"]) if len(turns) > 1)
    step = int(rows.length[row]) - 1
    with pytest.raises(InputError, match="must be a function of the prompt and of the messages so far"):
        rollout(process, [Request(drawn.prompts[row], 2, start=(row, step))], Rng(1), so_far=rows)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{% for m in messages %}{{ m.content }}{% endfor %}{{ raise_exception('no') if messages|length > 1 }}",
            "refuse",
        ),
        (
            "{{ messages|length }} {% for m in messages %}{{ m.content }} {% endfor %}",
            "writes the prompt .* in another way",
        ),
        (
            "{% for m in messages %}{{ m.content if m.role != 'assistant' }} {% endfor %}",
            "leaves out the assistant's message",
        ),
    ],
    ids=["refuses", "looks ahead", "leaves out"],
)
def test_a_template_that_cannot_hold_a_conversation_is_refused(
    make_model: Any, make_tokenizer: Any, template: str, message: str
) -> None:
    tokenizer = make_tokenizer(chat=True)
    tokenizer.chat_template = template
    process = conversation(language(make_model("gpt2"), tokenizer, max_new_tokens=30, eos=OFTEN), Parrot)
    with pytest.raises(InputError, match=message):
        draw(process, 4, [[{"role": "user", "content": "f"}]])
