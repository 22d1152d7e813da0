"""One row's conversation so far: its turns, the tokens it has to read next, and its environment."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from stepwell.errors import CannotFork, InputError
from stepwell.process.conversation.environment import Answer, Observation, answered, opened


class Seat:
    """The environment of a row after some turns, which no other row's messages may change.

    It is copied before each message. An environment that cannot be copied is stepped in place, which leaves this seat
    empty: forking the state afterwards makes a new one at the beginning of a conversation, and raises `CannotFork`
    later on.
    """

    def __init__(self, environment: Any, turns: int, again: Callable[[], tuple[Any, Observation | None]], prompt: Any):
        self.environment, self.turns, self.again, self.prompt = environment, turns, again, prompt
        self.reason = ""  # it cannot be copied

    @classmethod
    def open(cls, make: Callable[[], Any], prompt: Any, columns: Mapping[str, Any]) -> tuple[Seat, Observation | None]:
        """A seat at the beginning of a conversation, and the first observation."""
        environment, first = opened(make, prompt, columns)

        def again() -> tuple[Any, Observation | None]:
            environment, said = opened(make, prompt, columns)
            if said != first:
                raise InputError(
                    f"The environment {type(environment).__name__} must begin with the same observation for every row "
                    f"of a prompt, got {first!r:.40} and {said!r:.40} for {prompt!r:.40}."
                )
            return environment, said

        return cls(environment, 0, again, prompt), first

    @classmethod
    def empty(cls, prompt: Any) -> Seat:
        """The seat of a conversation that was over before it began: its environment could not be reset."""

        def again() -> tuple[Any, Observation | None]:
            raise CannotFork(f"The environment of {prompt!r:.60} could not be reset.")

        return cls(None, 0, again, prompt)

    def step(self, message: str) -> tuple[Seat, Answer]:
        """The seat after one more message, and the environment's answer to it."""
        environment = self._take()
        answer = answered(environment, message, self.prompt)
        return Seat(environment, self.turns + 1, self.again, self.prompt), answer

    def _take(self) -> Any:
        """An environment that may be changed: a copy, or the one there is if it cannot be copied."""
        if self.environment is None:
            if self.turns == 0:
                return self.again()[0]
            raise CannotFork(self.reason)
        try:
            return copy.deepcopy(self.environment)
        except (Exception, SystemExit) as error:  # an attribute of the user's may raise anything when it is copied
            own, self.environment = self.environment, None
            said = " ".join(str(error).split()).rstrip(".")
            self.reason = (
                f"The environment {type(own).__name__} cannot be copied ({type(error).__name__}: {said:.120}), so that "
                "its conversations cannot be forked once they are under way; give it a __deepcopy__ of its own."
            )
            return own


@dataclass(frozen=True)
class Turn:
    """The model's message, the environment's observation and reward, and the row's steps up to the message's end.

    cut: the message ended since it was as long as a turn may be. error: the exception that the environment raised
    instead of an answer, in a sentence.
    """

    message: str
    observation: Observation
    reward: float
    end: int
    cut: bool = False
    error: str = ""

    def shown(self) -> dict[str, Any]:
        """The turn as the column `turns` has it."""
        answer = {"message": self.message, "observation": self.observation, "reward": self.reward}
        return answer | ({"error": self.error} if self.error else {})


@dataclass(frozen=True)
class Episode:
    """A row's turns so far. The model's present message begins at step `begin`; `given` are the tokens just before.

    truncated: cut short, by the environment, after the last turn or for lack of room.
    """

    seat: Seat
    turns: tuple[Turn, ...] = ()
    given: tuple[int, ...] = ()
    begin: int = 0
    truncated: bool = False

    def given_at(self, step: int) -> int:
        """The environment's token at a step, or -1 at a step that the model draws."""
        return self.given[step - self.begin] if step < self.begin else -1
