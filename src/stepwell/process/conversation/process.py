"""Conversations as a process: the model speaks until its turn ends, the environment answers, and so on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from stepwell.distributions import Categorical, Point
from stepwell.errors import InputError
from stepwell.process.base import Samples, Steps
from stepwell.process.conversation.distribution import Partly
from stepwell.process.conversation.environment import origin
from stepwell.process.conversation.episode import Episode, Seat, Turn
from stepwell.process.conversation.words import ConversationEncoder
from stepwell.process.language.process import Language
from stepwell.process.language.state import LanguageState
from stepwell.rng import Rng


@dataclass(frozen=True)
class TurnsState(LanguageState):
    """Partial texts, each with the conversation that it is. `ended` (N,): the environment, or `max_turns`, ended it."""

    episodes: tuple[Episode, ...]

    def __getitem__(self, index: Tensor) -> TurnsState:
        rows = torch.arange(len(self))[index.cpu()].tolist()
        return replace(super().__getitem__(index), episodes=tuple(self.episodes[row] for row in rows))

    @property
    def given(self) -> Tensor:
        """(N,) the next token of rows that read what the environment said; -1 where the model draws, or is done."""
        step = self.tokens.shape[1]
        return torch.tensor([episode.given_at(step) for episode in self.episodes], device=self.tokens.device)


class Turns(Language):
    """A language model in conversation with environments; `language(...).turns(make)` makes one.

    A row is one conversation: the model draws tokens until it draws an end token (or has written one of the texts in
    `stop`), its environment answers, and so on until the environment ends it (`terminated`, `truncated`), after
    `max_turns`, or at `max_new_tokens`, which counts the environment's tokens too. What the environment says are
    steps of the row that the model has no choice in: they are not random, so nothing that trains reads them, and the
    network reads them all at once when it is next asked for a law. An answer that would leave the model no room is
    not begun; such a row, like one after `max_turns`, is `truncated`.

    `make_environment()` is called once for each row (see `Environment`). An answer is appended as it stands after
    prompts that are plain texts, so an environment writes its own separators. In chats it is a message of the given
    `role` unless it brings its own, and the tokenizer's template says what stands around it.

    Rows have their `segment`, the number of the turn that each token belongs to (what the environment says belongs to
    the turn it leads to), and `step_reward`, what each turn earned, at its last token; their sum is the column
    `environment_return`, and so the reward where the reward function is that of this name. The column `turns` lists
    each turn's message, observation and reward.

    Raises `InputError` for an environment that does not do as it should.
    """

    encoder: ConversationEncoder

    def __init__(
        self,
        language: Language,
        make_environment: Callable[[], Any],
        *,
        max_turns: int = 8,
        role: str = "user",
        stop: str | Sequence[str] = (),
    ):
        if not isinstance(language, Language) or isinstance(language, Turns):
            raise InputError(f"A conversation needs a language model, such as language(FOLDER), not {language!r:.60}.")
        if not callable(make_environment):
            raise InputError(
                f"Environments are made by a function without arguments, or a class, not by {make_environment!r:.60}."
            )
        if isinstance(max_turns, bool) or not isinstance(max_turns, int) or max_turns < 1:
            raise InputError(f"max_turns={max_turns!r} is not a whole number from 1 upwards.")
        if not isinstance(role, str) or not role.strip():
            raise InputError(f"role={role!r:.60} is not the name of a chat's role, such as 'user' or 'tool'.")
        stops = (stop,) if isinstance(stop, str) and stop else tuple(stop)
        if not all(isinstance(text, str) and text for text in stops):
            raise InputError(f"stop={stop!r:.60} is not a text, nor texts, that end a turn.")
        vars(self).update(vars(language))
        bare = self.encoder
        self.encoder = ConversationEncoder(bare.tokenizer, bare.limit, bare.vocabulary, bare.system, role)
        self.make_environment, self.max_turns, self.stop = make_environment, max_turns, stops
        self.environment, self.environment_source = origin(make_environment)

    def describe(self) -> dict[str, Any]:
        """The model's, and what makes it this conversation: the environment, its file, and the settings."""
        settings = {"max_turns": self.max_turns, "role": self.encoder.role, "stop": list(self.stop)}
        own = {"environment": self.environment, **settings, "source": self.environment_source}
        return {**super().describe(), **own}

    def start(self, prompts: Sequence[Any], rng: Rng) -> TurnsState:
        """One row and one environment a prompt."""
        return self.start_on(prompts, [{}] * len(prompts), rng)

    def start_on(self, prompts: Sequence[Any], columns: Sequence[Mapping[str, Any]], rng: Rng) -> TurnsState:
        """One row and one environment a prompt; `columns` are those of each prompt's data."""
        state = super().start(prompts, rng)
        episodes: list[Episode] = []
        for prompt, data, limit in zip(prompts, columns, state.limit.tolist(), strict=True):
            seat, said = Seat.open(self.make_environment, prompt, data)
            if any(seat.environment is other.seat.environment for other in episodes):
                raise InputError(
                    f"The environment's factory returned the same {type(seat.environment).__name__} twice; a new one "
                    "each time is right."
                )
            given = self.encoder.opening(prompt, said)
            if len(given) >= limit:
                raise InputError(
                    f"The environment's first words for the prompt {prompt!r:.60} take {len(given)} tokens, and the "
                    f"row has {limit} in all; raise max_new_tokens or shorten them."
                )
            episodes.append(Episode(seat, given=tuple(given), begin=len(given)))
        return TurnsState(**vars(state), episodes=tuple(episodes))

    @torch.no_grad()
    def propose(self, state: TurnsState) -> Categorical | Partly | Point:  # type: ignore[override]
        """The law of the next token where the model speaks, and the token to read where the environment did."""
        given = state.given
        drawn = ~state.done & (given < 0)
        certain = torch.where(given < 0, self.pad, given)
        if not bool(drawn.any()):
            return Point(certain)
        self._bring_up_to_date(state, drawn)
        law = Categorical(state.memory.pasts[-1].law[state.memory.slot[drawn]])
        return law if bool(drawn.all()) else Partly(law, drawn, certain)

    def deterministic(self, state: TurnsState) -> Point:  # type: ignore[override]
        """The likeliest token of each row that speaks."""
        law = self.propose(state)
        return law if isinstance(law, Point) else Point(law.logits.argmax(-1))

    def advance(self, state: TurnsState, action: Tensor, rng: Rng) -> TurnsState:  # type: ignore[override]
        """One token more in every row that is not done; where it ends the model's turn, the environment answers."""
        given, action, live = state.given, action.to(self.device), ~state.done
        other = (live & (given >= 0) & (given != action)).nonzero()[:, 0].tolist()
        if other:
            raise InputError(
                f"Row {other[0]} goes on with the token {int(action[other[0]])}, where its environment says "
                f"{int(given[other[0]])}; what an environment says is not to be chosen, and has to depend on the "
                "prompt and on what it was told alone."
            )
        longer: Any = super().advance(state, action, rng)
        spoke = live & (given < 0)
        by_itself = torch.isin(action, self.ends.to(self.device))
        over = spoke & by_itself
        if self.stop:
            over = over | self._stopped(longer, spoke)
        ended, episodes = state.ended.clone(), list(state.episodes)
        for row in over.nonzero()[:, 0].tolist():
            end = int(action[row]) if by_itself[row] else None
            episodes[row], ended[row] = self._answered(longer, row, end)
        return replace(longer, ended=ended, episodes=tuple(episodes))

    def _answered(self, state: TurnsState, row: int, end: int | None) -> tuple[Episode, bool]:
        """A row's conversation after the turn that its last token ended, and whether that is all of it."""
        episode, steps = state.episodes[row], state.tokens.shape[1]
        message = self._text(state.tokens[row, episode.begin :].tolist())
        seat, answer = episode.seat.tell(message)
        turns = (*episode.turns, Turn(message, answer.observation, answer.reward, steps))
        episode = Episode(seat, turns, begin=steps)
        if answer.terminated or answer.truncated or len(turns) == self.max_turns:
            return replace(episode, truncated=not answer.terminated), True
        given = self.encoder.answer(answer.observation, bool(state.chat[row]), end)
        if steps + len(given) >= int(state.limit[row]):
            return replace(episode, truncated=True), True
        return replace(episode, given=tuple(given), begin=steps + len(given)), False

    def _stopped(self, state: TurnsState, spoke: Tensor) -> Tensor:
        """(N,) bool: rows whose message has come to hold a text that ends it."""
        found = torch.zeros_like(spoke)
        for row in spoke.nonzero()[:, 0].tolist():
            message = self._text(state.tokens[row, state.episodes[row].begin :].tolist())
            found[row] = any(text in message for text in self.stop)
        return found

    def _text(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))

    def finish(self, state: TurnsState) -> Samples:  # type: ignore[override]
        """The text of each row, the environment's words included; for a chat, the messages after the prompt.

        What the environment said last of all is in the column `turns` alone: no model has read it.
        """
        plain = super().finish(state)
        rows = list(zip(state.episodes, state.length.tolist(), strict=True))
        values = [
            self._messages(state, row) if isinstance(value, list) else value for row, value in enumerate(plain.values)
        ]
        turns = [
            [{"message": t.message, "observation": t.observation, "reward": t.reward} for t in episode.turns]
            for episode, _ in rows
        ]
        columns = {
            "completion_ids": plain.columns["completion_ids"],
            "turns": turns,
            "environment_return": [sum(turn.reward for turn in episode.turns) for episode, _ in rows],
        }
        ended = zip(rows, state.ended.tolist(), strict=True)
        truncated = [episode.truncated or not whole for (episode, _), whole in ended]
        segment = [torch.tensor(_segments(episode, length), dtype=torch.long) for episode, length in rows]
        reward = [torch.tensor(_step_rewards(episode, length), dtype=torch.float64) for episode, length in rows]
        return Samples(values, columns, truncated, Steps(reward, segment))

    def _messages(self, state: TurnsState, row: int) -> list[dict[str, Any]]:
        """A chat after its prompt: what the model said, and what it was answered."""
        episode, length = state.episodes[row], int(state.length[row])
        answer: list[dict[str, Any]] = []
        for turn in episode.turns:
            answer.append({"role": "assistant", "content": turn.message})
            if turn.end < length:
                answer += self.encoder.messages(turn.observation)
        unfinished = state.tokens[row, episode.begin : length].tolist()
        if unfinished or not answer:
            answer.append({"role": "assistant", "content": self._text(unfinished)})
        return answer


def _segments(episode: Episode, length: int) -> list[int]:
    """The turn that each of a row's tokens belongs to."""
    ends = {turn.end for turn in episode.turns}
    turn, answer = 0, []
    for step in range(length):
        turn += step in ends
        answer.append(turn)
    return answer


def _step_rewards(episode: Episode, length: int) -> list[float]:
    """What each turn earned, at its last token; 0 elsewhere."""
    answer = [0.0] * length
    for turn in episode.turns:
        answer[turn.end - 1] = turn.reward
    return answer
