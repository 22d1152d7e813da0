"""One row's conversation so far: the turns it took, what it is to read next, and its environment."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from stepwell.errors import CannotFork, InputError
from stepwell.process.conversation.environment import Answer, Observation, answered, opened


class Seat:
    """The environment of a row after some turns, which no other row's words may change.

    It is copied before it is told anything. One that cannot be copied goes on as it is, and leaves this seat empty;
    whoever comes here a second time finds a new one at the beginning of a conversation, and `CannotFork` later on.
    """

    def __init__(self, environment: Any, turns: int, again: Callable[[], tuple[Any, Observation | None]], prompt: Any):
        self.environment, self.turns, self.again, self.prompt = environment, turns, again, prompt
        self.reason = ""

    @classmethod
    def open(cls, make: Callable[[], Any], prompt: Any, columns: Mapping[str, Any]) -> tuple[Seat, Observation | None]:
        """A seat at the beginning, and what its environment says first."""
        environment, first = opened(make, prompt, columns)

        def again() -> tuple[Any, Observation | None]:
            environment, said = opened(make, prompt, columns)
            if said != first:
                raise InputError(
                    f"The environment {type(environment).__name__} began with {said!r:.40}, and for another row of the "
                    f"prompt {prompt!r:.40} with {first!r:.40}; what it says has to depend on its prompt alone."
                )
            return environment, said

        return cls(environment, 0, again, prompt), first

    def tell(self, message: str) -> tuple[Seat, Answer]:
        """The seat after one message more, and what the environment says to it."""
        environment = self._take()
        answer = answered(environment, message, self.prompt)
        return Seat(environment, self.turns + 1, self.again, self.prompt), answer

    def _take(self) -> Any:
        """The environment, to be changed: a copy, where that is possible."""
        if self.environment is None:
            if self.turns == 0:
                return self.again()[0]
            raise CannotFork(self.reason)
        try:
            return copy.deepcopy(self.environment)
        except (Exception, SystemExit) as error:  # whatever an attribute of the user's says to being copied
            own, self.environment = self.environment, None
            said = " ".join(str(error).split()).rstrip(".")
            self.reason = (
                f"The environment {type(own).__name__} cannot be copied ({type(error).__name__}: {said:.120}), so that "
                "its conversations cannot be forked once they are under way; a __deepcopy__ of its own would do."
            )
            return own


@dataclass(frozen=True)
class Turn:
    """What the model said, what it was answered, what it earned, and the row's steps up to its last token."""

    message: str
    observation: Observation
    reward: float
    end: int


@dataclass(frozen=True)
class Episode:
    """A row's turns so far. The model's present message begins at step `begin`; `given` are the tokens just before."""

    seat: Seat
    turns: tuple[Turn, ...] = ()
    given: tuple[int, ...] = ()
    begin: int = 0
    truncated: bool = False

    def given_at(self, step: int) -> int:
        """The token that the environment has put at a step, or -1 where the model draws."""
        return self.given[step - self.begin] if step < self.begin else -1
