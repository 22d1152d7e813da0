"""An environment that talks back, a conversation with it, and rows of it: for the tests of conversations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from stepwell.process.conversation.build import conversation
from stepwell.process.conversation.process import Conversation
from stepwell.process.language.process import Language
from stepwell.rng import Rng
from stepwell.sampling.record import Drawn
from stepwell.sampling.request import Prompt, Request
from stepwell.sampling.rollout import rollout

Build = Callable[..., Language]
PROMPTS = ["a b c d", "e", "f g h a b c d e f g"]
OWN = ("max_turns", "stop", "role", "max_turn_tokens", "environment_errors", "environment_penalty")
OFTEN = ["a", "b", "c", ".", "<unk>"]  # end tokens enough that a random model takes several turns


class Parrot:
    """Says the first letters of the alphabet, as many as the message has words; ends after three turns."""

    def __init__(self, turns: int = 3):
        self.turns, self.heard = turns, 0

    def reset(self, prompt: Any) -> str | None:
        return "x y" if "f" in str(prompt) else None

    def step(self, message: str) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.heard += 1
        number = len(message.split())
        return " ".join("d e f g h".split()[: number % 5]), 0.25 * number, self.heard == self.turns, False, {}


def talk(build: Build, architecture: str = "qwen2", chat: bool = False, **options: Any) -> Conversation:
    own = {name: options.pop(name) for name in OWN if name in options}
    make = options.pop("make", Parrot)
    options = {"max_new_tokens": 30, "eos": OFTEN} | options
    return conversation(build(architecture, chat, **options), make, **own)


def draw(process: Any, count: int = 4, prompts: list[Any] = PROMPTS, **columns: Any) -> Drawn:
    return rollout(process, [Request(Prompt(i, text, columns), count) for i, text in enumerate(prompts)], Rng(0))
