"""Conversations as a process: the model speaks until its turn ends, the environment answers, and so on."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, Self

import torch
from torch import Tensor

from stepwell.columns import Columns
from stepwell.distributions import Categorical, Point
from stepwell.errors import InputError
from stepwell.meter import Meter
from stepwell.origin import origin
from stepwell.process.base import Process, Samples, Scores, Steps
from stepwell.process.conversation.distribution import Partly
from stepwell.process.conversation.environment import EnvironmentFailed
from stepwell.process.conversation.episode import Episode, Seat, Turn
from stepwell.process.conversation.notices import Notices
from stepwell.process.conversation.state import ConversationState
from stepwell.process.conversation.words import ConversationEncoder
from stepwell.process.language.chat import is_chat
from stepwell.process.language.process import Language
from stepwell.process.language.state import LanguageState
from stepwell.rng import Rng
from stepwell.trajectories import Trajectories


class Conversation(Process):
    """A language model in conversation with environments; see `sw.conversation`, which makes one.

    A row is one conversation: the model draws tokens until it draws an end token (or has written one of the texts in
    `stop`, or `max_turn_tokens` tokens), its environment answers, and so on until the environment ends it
    (`terminated`, `truncated`), after `max_turns`, or when the model has drawn `max_new_tokens` in all turns together.
    The environment's tokens and the template's are steps of the row that the model has no choice in: they count for no
    limit but the model's positions, they are not random, so nothing trains on them, and the network reads them all at
    once when the model's next token is proposed. An answer that would leave the model no room is left out; such a row,
    like one after `max_turns`, is `truncated`.

    `make_environment()` is called once for each row (see `Environment`). After prompts that are plain texts, an answer
    is appended as it stands, so an environment writes its own separators. In chats it is a message of the given `role`
    unless it brings its own, and the tokenizer's template writes whatever surrounds it.

    Rows have their `segment`, the number of the turn that each token belongs to (the environment's tokens belong to
    the turn that they lead to), and `step_reward`, the reward of each turn at its last token. The sum of these is the
    column `environment_return`, and the reward for the reward function of that name. The column `turns` lists each
    turn's message, observation and reward.

    An environment that raises an exception ends the run, or with `environment_errors` of "end" its row alone: the turn
    earns `environment_penalty`, and the exception is its `error` in `turns` and the row's in the column
    `environment_error`, which is None for other rows.

    `language` is the model, as it reads conversations: a twin on the given model's parameters and meter. Raises
    `InputError` for an environment that breaks its interface.
    """

    kind = "language"
    any_prompt = False

    def __init__(
        self,
        language: Language,
        make_environment: Callable[[], Any],
        *,
        max_turns: int = 8,
        role: str = "user",
        stop: Sequence[str] = (),
        max_turn_tokens: int | None = None,
        environment_errors: Literal["raise", "end"] = "raise",
        environment_penalty: float = 0.0,
    ):
        self.encoder = ConversationEncoder.of(language.encoder, role)
        self.make_environment, self.max_turns, self.stop = make_environment, max_turns, tuple(stop)
        self.max_turn_tokens, self.notices = max_turn_tokens, Notices()
        self.environment_errors, self.environment_penalty = environment_errors, environment_penalty
        self.environment, self.environment_source = origin(make_environment)
        self.language = language.with_encoder(self.encoder)
        self.module, self.meter = language.module, language.meter

    # drawing

    def start(self, prompts: Sequence[Any], rng: Rng) -> ConversationState:
        """One row and one environment a prompt."""
        return self.start_on(prompts, [{}] * len(prompts), rng)

    def start_on(self, prompts: Sequence[Any], columns: Sequence[Mapping[str, Any]], rng: Rng) -> ConversationState:
        """One row and one environment a prompt; `columns` are those of each prompt's data."""
        text = self.language.start(prompts, rng)
        episodes: list[Episode] = []
        limit, ended, room = text.limit.clone(), text.ended.clone(), self._room(text).tolist()
        for row, (prompt, data) in enumerate(zip(prompts, columns, strict=True)):
            try:
                seat, observation = Seat.open(self.make_environment, prompt, data)
            except EnvironmentFailed as error:
                episodes.append(Episode(Seat.empty(prompt), (self._failed("", error, 0),)))
                ended[row] = True
                continue
            if any(seat.environment is other.seat.environment for other in episodes):
                raise InputError(
                    "The environment's factory must return a new object each time, got the same "
                    f"{type(seat.environment).__name__} twice."
                )
            given = self.encoder.opening(prompt, observation)
            if len(given) >= room[row]:
                raise InputError(
                    f"The environment's first words for the prompt {prompt!r:.60} take {len(given)} tokens, and after "
                    f"the prompt the model has positions for {room[row]}; shorten them."
                )
            limit[row] = min(int(limit[row]) + len(given), room[row])
            episodes.append(Episode(seat, given=tuple(given), begin=len(given)))
        return ConversationState(replace(text, limit=limit, ended=ended), tuple(episodes))

    def _room(self, text: LanguageState) -> Tensor:
        """(N,) the most tokens that each row may have for the model's positions; its last one needs none."""
        if self.encoder.limit is None:
            return torch.full_like(text.limit, 2**62)
        return self.encoder.limit + 1 - (text.memory.columns - text.tokens.shape[1] - text.padding)

    def _failed(self, message: str, error: EnvironmentFailed, end: int) -> Turn:
        """The last turn of a row whose environment raised an exception; raises it unless rows are to end by it."""
        if self.environment_errors == "raise":
            raise error
        self.notices.failed(error, self.environment_penalty)
        return Turn(message, "", self.environment_penalty, end, error=str(error))

    @torch.no_grad()
    def propose(self, state: ConversationState) -> Categorical | Partly | Point:
        """The distribution of the next token of rows that speak, and the given token of rows that read."""
        given = state.given
        drawn = ~state.done & (given < 0)
        certain = torch.where(given < 0, self.language.pad, given)
        if not bool(drawn.any()):
            return Point(certain)
        distribution = Categorical(self.language.log_probs(state.text, drawn))
        return distribution if bool(drawn.all()) else Partly(distribution, drawn, certain)

    def deterministic(self, state: ConversationState) -> Point:
        """The likeliest token of each row that speaks."""
        distribution = self.propose(state)
        return distribution if isinstance(distribution, Point) else Point(distribution.logits.argmax(-1))

    def advance(self, state: ConversationState, action: Tensor, rng: Rng) -> ConversationState:
        """One token more in every row that is not done; if it ends the model's turn, the environment answers."""
        given, action, live = state.given, action.to(self.language.device), ~state.done
        others = (live & (given >= 0) & (given != action)).nonzero()[:, 0].tolist()
        if others:
            raise InputError(
                f"Row {others[0]} must go on with its environment's token {int(given[others[0]])}, got "
                f"{int(action[others[0]])}: observation tokens cannot be chosen, and an environment must be a function "
                "of the prompt and of the messages so far."
            )
        text = self.language.advance(state.text, action, rng)
        spoke = live & (given < 0)
        by_itself = torch.isin(action, self.language.ends.to(action.device))
        over = spoke & by_itself
        if self.stop:
            over = over | self._stopped(text, state.episodes, spoke)
        if self.max_turn_tokens is not None:
            begin = torch.tensor([episode.begin for episode in state.episodes], device=spoke.device)
            over = over | spoke & (text.tokens.shape[1] - begin >= self.max_turn_tokens)
        ended, limit, episodes = state.text.ended.clone(), text.limit.clone(), list(state.episodes)
        for row in over.nonzero()[:, 0].tolist():
            end = int(action[row]) if by_itself[row] else None
            episodes[row], ended[row], limit[row] = self._after_turn(text, episodes[row], row, end)
        return ConversationState(replace(text, ended=ended, limit=limit), tuple(episodes))

    def _after_turn(
        self, text: LanguageState, episode: Episode, row: int, end: int | None
    ) -> tuple[Episode, bool, int]:
        """A row's conversation after the turn that its last token ended, True if it is over, and its most tokens.

        `end` is that token if the model ended its turn by itself.
        """
        tokens, steps = text.tokens[row, episode.begin :].tolist(), text.tokens.shape[1]
        message, limit = self.encoder.text(tokens), int(text.limit[row])
        try:
            seat, answer = episode.seat.step(message)
        except EnvironmentFailed as error:
            turns = (*episode.turns, self._failed(message, error, steps))
            return Episode(episode.seat, turns, begin=steps), True, limit
        cut = end is None and not self._holds_stop(tokens)
        turns = (*episode.turns, Turn(message, answer.observation, answer.reward, steps, cut))
        if answer.terminated or answer.truncated or len(turns) == self.max_turns:
            return Episode(seat, turns, begin=steps, truncated=not answer.terminated), True, limit
        given = tuple(self.encoder.answer(answer.observation, bool(text.chat[row]), end))
        limit = min(limit + len(given), int(self._room(text)[row]))
        if steps + len(given) >= limit:
            return Episode(seat, turns, begin=steps, truncated=True), True, limit
        return Episode(seat, turns, given, steps + len(given)), False, limit

    def _stopped(self, text: LanguageState, episodes: Sequence[Episode], spoke: Tensor) -> Tensor:
        """(N,) bool: rows whose message has come to hold a text that ends it."""
        stopped = torch.zeros_like(spoke)
        for row in spoke.nonzero()[:, 0].tolist():
            stopped[row] = self._holds_stop(text.tokens[row, episodes[row].begin :].tolist())
        return stopped

    def _holds_stop(self, tokens: list[int]) -> bool:
        """True if a message holds a text that ends it, in its words or with the special tokens between them."""
        words = self.encoder.words
        texts = [words.text(tokens, False)] if self.stop else []
        if self.stop and not words.special.isdisjoint(tokens):
            texts.append(words.written(tokens))
        return any(stop in text for stop in self.stop for text in texts)

    def finish(self, state: ConversationState) -> Samples:
        """The text of each row, the environment's words included; for a chat, the messages after the prompt.

        The last observation of a conversation that is over is in the column `turns` alone: no model has read it.
        """
        plain = self.language.finish(state.text)
        rows = list(zip(state.episodes, state.text.length.tolist(), strict=True))
        values = [
            self._messages(state, row) if isinstance(value, list) else value for row, value in enumerate(plain.values)
        ]
        over = [episode for episode, done in zip(state.episodes, state.done.tolist(), strict=True) if done]
        self.notices.over(over, f"max_new_tokens={self.horizon} or max_turn_tokens={self.max_turn_tokens}")
        columns = {
            "completion_ids": plain.columns["completion_ids"],
            "turns": [[turn.shown() for turn in episode.turns] for episode, _ in rows],
            "environment_return": [sum(turn.reward for turn in episode.turns) for episode, _ in rows],
            "environment_error": [next((t.error for t in episode.turns if t.error), None) for episode, _ in rows],
        }
        ended = zip(rows, state.text.ended.tolist(), strict=True)
        truncated = [episode.truncated or not whole for (episode, _), whole in ended]
        segment = [torch.tensor(_segments(episode, length), dtype=torch.long) for episode, length in rows]
        reward = [torch.tensor(_step_rewards(episode, length), dtype=torch.float64) for episode, length in rows]
        return Samples(values, columns, truncated, Steps(reward, segment))

    def _messages(self, state: ConversationState, row: int) -> list[dict[str, Any]]:
        """A chat after its prompt: the model's messages and the answers to them."""
        episode, length = state.episodes[row], int(state.text.length[row])
        messages: list[dict[str, Any]] = []
        for turn in episode.turns:
            messages.append({"role": "assistant", "content": turn.message})
            if turn.end < length:
                messages += self.encoder.messages(turn.observation)
        unfinished = state.text.tokens[row, episode.begin : length].tolist()
        if unfinished or not messages:
            messages.append({"role": "assistant", "content": self.encoder.text(unfinished)})
        return messages

    # the language model's own

    @property
    def offers(self) -> frozenset[str]:
        return self.language.offers

    @property
    def horizon(self) -> int:
        """The most tokens that the model draws in a row; what is said to it comes on top."""
        return self.language.horizon

    def check_prompt(self, value: Any) -> None:
        """Raise `InputError` for a prompt that is neither a text nor a chat, or is too long for the model."""
        self.language.check_prompt(value)

    @property
    def tokens(self) -> tuple[Mapping[str, int], int]:
        """The numbers of the language's tokens, and how many its embeddings have room for."""
        return self.language.tokens

    def check_teacher(self, teacher: Process) -> None:
        """Raise `InputError` for a teacher with other tokens."""
        self.language.check_teacher(teacher)

    def condition(self, prompts: Sequence[Any]) -> Columns:
        """`prompt_ids` and `prompt_mask` (N, P), padded on the left."""
        return self.language.condition(prompts)

    def row_sizes(self, rows: Trajectories) -> Tensor:
        """(N,) tokens of each row, its prompt's and its own."""
        return self.language.row_sizes(rows)

    def score(
        self,
        trajectories: Trajectories,
        needs: Collection[str] = (),
        context: Columns | None = None,
        reference: Process | None = None,
    ) -> Scores:
        """Log-probabilities (N, T) of the model's own tokens, and its other scores (`Language.score`)."""
        other = reference.language if isinstance(reference, Conversation) else reference
        return self.language.score(trajectories, needs, context, other)

    def encode_completion(self, completion: Any, prompt: Any = None) -> Tensor:
        """(T,) tokens of a conversation of one turn: a text or the assistant's message, with its end token.

        Raises `InputError` for a chat: the tokens that open the model's turn would be trained with it.
        """
        if is_chat(prompt):
            raise InputError(
                "A completion from elsewhere must follow a plain text in a conversation with an environment, got the "
                f"chat {prompt!r:.60}."
            )
        return self.language.encode_completion(completion, prompt)

    def segments(self, trajectories: Trajectories) -> Tensor:
        """(N, T) the number of the sentence that each step belongs to; rows that were drawn have their turns."""
        return self.language.segments(trajectories)

    def with_value_head(self) -> Self:
        """A twin with a linear value head on the last hidden state (`Language.with_value_head`)."""
        return self._around(self.language.with_value_head())

    def frozen(self) -> Self:
        """A twin that cannot learn, on the same meter (`Language.frozen`)."""
        return self._around(self.language.frozen())

    def metered(self, meter: Meter) -> Self:
        """A twin on the same parameters that spends on another meter."""
        return self._around(self.language.metered(meter))

    def _around(self, language: Language) -> Self:
        """A twin that holds another language model."""
        twin = copy.copy(self)
        twin.language, twin.module, twin.meter = language, language.module, language.meter
        return twin

    def describe(self) -> dict[str, Any]:
        """The model's description, and what makes it this conversation: the environment, its file, and the settings."""
        settings = {"max_turns": self.max_turns, "role": self.encoder.role, "stop": list(self.stop)}
        settings |= {"max_turn_tokens": self.max_turn_tokens, "environment_errors": self.environment_errors}
        settings |= {"environment_penalty": self.environment_penalty}
        own = {"environment": self.environment, **settings, "source": self.environment_source}
        return {**self.language.describe(), **own}

    def save(self, folder: str | os.PathLike[str], merged: bool | None = None) -> None:
        """Write the model's weights and tokenizer into a folder (`Language.save`)."""
        self.language.save(folder, merged)


def _segments(episode: Episode, length: int) -> list[int]:
    """The number of the turn that each of a row's tokens belongs to."""
    ends = {turn.end for turn in episode.turns}
    turn, numbers = 0, []
    for step in range(length):
        turn += step in ends
        numbers.append(turn)
    return numbers


def _step_rewards(episode: Episode, length: int) -> list[float]:
    """The reward of each turn, at its last token; 0 elsewhere."""
    rewards = [0.0] * length
    for turn in episode.turns:
        if turn.end:  # else the environment failed before anything was said
            rewards[turn.end - 1] = turn.reward
    return rewards
