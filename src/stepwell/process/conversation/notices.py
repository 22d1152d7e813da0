"""Warnings about conversations that go wrong in a way that no single row shows, each said once."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from stepwell.process.conversation.episode import Episode

ROWS = 8
"""The conversations that have to be over, all of them without a whole message, before it is said."""


class Notices:
    """The warnings of one model's conversations, shared by its twins."""

    def __init__(self) -> None:
        self._failed = False
        self._cut: int | None = 0  # conversations without a whole message; None once there was one, or it was said

    def failed(self, error: Exception, penalty: float) -> None:
        """An environment raised an exception, and its row ends."""
        if not self._failed:
            self._failed = True
            warnings.warn(
                f"{error} The row ends here with the penalty {penalty:g}, as do others; the column environment_error "
                "has their errors.",
                stacklevel=2,
            )

    def over(self, episodes: Sequence[Episode], limits: str) -> None:
        """Conversations that are over; `limits` names what a message is cut by."""
        if self._cut is None:
            return
        if any(turn.error or not turn.cut for episode in episodes for turn in episode.turns):
            self._cut = None
            return
        self._cut += len(episodes)
        if self._cut >= ROWS:
            warnings.warn(
                f"In {self._cut} conversations the model ended none of its messages by itself: each was cut by "
                f"{limits}. Allow more tokens, or name a text that ends a turn.",
                stacklevel=2,
            )
            self._cut = None
