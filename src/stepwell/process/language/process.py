"""Causal language models of `transformers` as a process: a step is a token, a state a batch of partial texts."""

from __future__ import annotations

import copy
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, Self, runtime_checkable

import torch
from torch import Tensor

from stepwell.columns import Columns
from stepwell.distributions import Categorical, Point
from stepwell.errors import InputError, MissingAbility
from stepwell.meter import Meter
from stepwell.process.base import Process, Samples, Scores, check_needs
from stepwell.process.batching import token_batches
from stepwell.process.language.chat import is_chat
from stepwell.process.language.chunked import chunked_statistics, statistics
from stepwell.process.language.description import described, tokenizer_digest
from stepwell.process.language.guard import check_reading
from stepwell.process.language.network import CausalNetwork, LanguageModule
from stepwell.process.language.prompts import PromptEncoder, left_padded, pack
from stepwell.process.language.reading import Reader
from stepwell.process.language.segments import segments, sentence_ends
from stepwell.process.language.state import LanguageState
from stepwell.process.language.truncation import Truncation
from stepwell.rng import Rng
from stepwell.trajectories import Trajectories

CHUNK_ELEMENTS = {"cpu": 2**22, "accelerator": 2**26}
"""The most logits that a chunk holds, unless `chunk` gives its number of steps: 16 and 256 MiB in float32."""


@runtime_checkable
class HasTokens(Protocol):
    """A process that draws the tokens of a tokenizer: a language model, or a conversation that holds one."""

    @property
    def tokens(self) -> tuple[Mapping[str, int], int]: ...


class Language(Process):
    """A causal language model; see `language`, which makes one.

    The network is always in evaluation mode, also while it learns: with dropout, scoring would use other numbers than
    sampling, and their ratio would not start at 1.

    The truncation (top-k, top-p, min-p) is computed from the present parameters, and `score` keeps the action that was
    taken whatever they have become, so that its log-probability stays finite; with unchanged parameters it is kept
    anyway, so both distributions are the same (up to rounding where a token lies exactly at the border).

    `final_value` is not among the offers: a text that is cut at `max_new_tokens` is judged as it stands, since its
    longest length is part of the task.
    """

    kind = "language"
    any_prompt = False

    def __init__(
        self,
        module: LanguageModule,
        encoder: PromptEncoder,
        *,
        ends: Sequence[int],
        pad: int,
        truncation: Truncation,
        max_new_tokens: int = 256,
        chunk: int | None = None,
        tokens_at_once: int | None = None,
        compile: bool = False,
    ):
        self.network = CausalNetwork(module, Meter(), compile)
        self.module, self.meter = self.network.module, self.network.meter
        self.encoder, self.tokenizer = encoder, encoder.tokenizer
        self.ends, self.pad = torch.tensor(list(ends)), pad
        self.truncation, self.max_new_tokens = truncation, max_new_tokens
        elements = CHUNK_ELEMENTS["cpu" if self.device.type == "cpu" else "accelerator"]
        self.chunk = chunk or max(1, elements // encoder.vocabulary)
        self.tokens_at_once = tokens_at_once

    @property
    def offers(self) -> frozenset[str]:
        always = {"entropy", "sum_of_squares", "kl", "logits", "hidden"}
        return frozenset(always if self.network.value_head is None else always | {"value"})

    @property
    def horizon(self) -> int:
        return self.max_new_tokens

    @property
    def device(self) -> torch.device:
        return self.network.device

    # drawing

    @torch.no_grad()
    def start(self, prompts: Sequence[Any], rng: Rng) -> LanguageState:
        """One row a prompt, a text or a list of chat messages. Equal prompts are read by the network once."""
        check_reading(self.network)
        encoded = [tuple(self.encoder(prompt)) for prompt in prompts]
        distinct = list(dict.fromkeys(encoded))
        place = {tokens: i for i, tokens in enumerate(distinct)}
        ids, mask = (x.to(self.device) for x in left_padded(distinct, self.pad))
        count, text = len(encoded), torch.tensor([place[tokens] for tokens in encoded], device=self.device)
        length = torch.tensor([len(tokens) for tokens in encoded])
        limit = torch.full((count,), self.max_new_tokens)
        if self.encoder.limit is not None:  # the last token is drawn but never read, so it needs no position
            limit = limit.minimum(self.encoder.limit - length + 1)
        again = self.network.apart.switch is not None  # a row may have to be read again from its beginning
        return LanguageState(
            prompt=ids[text] if again else ids.new_empty(count, 0),
            tokens=torch.zeros(count, 0, dtype=torch.long, device=self.device),
            length=torch.zeros(count, dtype=torch.long, device=self.device),
            padding=(ids.shape[1] - length).to(self.device),
            limit=limit.to(self.device),
            ended=torch.zeros(count, dtype=torch.bool, device=self.device),
            chat=torch.tensor([is_chat(prompt) for prompt in prompts], dtype=torch.bool, device=self.device),
            memory=self._reader.read(ids, mask, text),
        )

    @torch.no_grad()
    def propose(self, state: LanguageState) -> Categorical:
        """The distribution that the next token is drawn from, with temperature, top-k, top-p and min-p applied.

        Rows that are done are never read; theirs is a certain padding token.
        """
        live = ~state.done
        log_probs = self.log_probs(state, live)
        if not bool(live.all()):
            rows = log_probs.new_full((len(state), log_probs.shape[1]), -torch.inf)
            rows[:, self.pad] = 0.0
            rows[live] = log_probs
            log_probs = rows
        return Categorical(log_probs)

    @torch.no_grad()
    def log_probs(self, state: LanguageState, wanted: Tensor) -> Tensor:
        """(M, V) log-probabilities of the next token of the `wanted` rows (N,) bool, truncation applied.

        Runs the network on the tokens that it has not read yet, once for rows that share their whole text.
        """
        return self._reader.log_probs(state, wanted)

    @property
    def _reader(self) -> Reader:
        return Reader(self.network, self.truncation)

    def deterministic(self, state: LanguageState) -> Point:
        """The likeliest token of each row."""
        return Point(self.propose(state).logits.argmax(-1))

    def advance(self, state: LanguageState, action: Tensor, rng: Rng) -> LanguageState:
        """One token more in every row that is not done; the network reads it when the next one is proposed."""
        action = action.to(self.device)
        live = ~state.done
        token = torch.where(live, action, torch.full_like(action, self.pad))
        return replace(
            state,
            tokens=torch.cat([state.tokens, token[:, None]], 1),
            length=state.length + live,
            ended=state.ended | (live & torch.isin(action, self.ends.to(self.device))),
            memory=replace(state.memory, columns=state.memory.columns + 1),
        )

    def finish(self, state: LanguageState) -> Samples:
        """Texts, without special tokens unless these are kept; for a chat, a list with the assistant's message.

        Column: `completion_ids`, the tokens with the end token if one was drawn; rows without one are truncated.
        """
        tokens, lengths = state.tokens.tolist(), state.length.tolist()
        ids = [row[:length] for row, length in zip(tokens, lengths, strict=True)]
        texts = [self.encoder.text(row) for row in ids]
        values = [
            [{"role": "assistant", "content": text}] if chat else text
            for text, chat in zip(texts, state.chat.tolist(), strict=True)
        ]
        return Samples(values, {"completion_ids": ids}, truncated=(~state.ended).tolist())

    # scoring

    def check_prompt(self, value: Any) -> None:
        """Raise `InputError` for a prompt that is neither a text nor a chat, or is too long for the model."""
        self.encoder(value)

    @property
    def tokens(self) -> tuple[Mapping[str, int], int]:
        """The numbers of all tokens, and how many the embeddings have room for."""
        return self.tokenizer.get_vocab(), self.encoder.vocabulary

    def check_teacher(self, teacher: Process) -> None:
        """Raise `InputError` for a teacher with other tokens: its probabilities would be those of other texts."""
        super().check_teacher(teacher)
        if not isinstance(teacher, HasTokens) or teacher.tokens != self.tokens:
            raise InputError(
                "teacher must have the model's tokens, each with the same number, and embeddings for as many; this one "
                "has others."
            )

    def row_sizes(self, rows: Trajectories) -> Tensor:
        """(N,) tokens of each row, its prompt's and its own."""
        sizes = rows.length.clone()
        return sizes if rows.condition is None else sizes + rows.condition["prompt_mask"].sum(1)

    def condition(self, prompts: Sequence[Any]) -> Columns:
        """`prompt_ids` and `prompt_mask` (N, P), padded on the left."""
        ids, mask = left_padded([self.encoder(prompt) for prompt in prompts], self.pad)
        return Columns({"prompt_ids": ids, "prompt_mask": mask}, len(prompts))

    def score(
        self,
        trajectories: Trajectories,
        needs: Collection[str] = (),
        context: Columns | None = None,
        reference: Process | None = None,
    ) -> Scores:
        """Log-probabilities (N, T) under the distribution that tokens are drawn from, with the present parameters.

        Entropy, sum of squares and logits are of that same distribution; `kl` is of both at temperature but before
        truncation, where their supports agree. All are 0 where the mask is False and differentiable, and come back
        on the device of `trajectories`. Without gradients, rows are scored at most `tokens_at_once` padded tokens at a
        time; with them, the caller cuts the rows (`stepwell.process.batching.token_batches`).

        Raises `MissingAbility` for a value without a value head (`with_value_head`), and for a KL without a
        `reference` that is a language too.
        """
        if "value" in needs and self.network.value_head is None:
            raise MissingAbility("A method needs 'value' of each step; score the twin that with_value_head() gives.")
        check_needs(self, needs, reference)
        if not isinstance(reference, Language | None):
            raise MissingAbility(f"reference must be a language model, got {type(reference).__name__}.")
        condition = trajectories.condition if context is None else context
        if condition is None:
            raise InputError(
                "Trajectories without a condition cannot be scored; give `context=process.condition(...)`."
            )
        rows = (condition["prompt_ids"], condition["prompt_mask"].bool(), trajectories.action, trajectories.mask)
        columns = tuple(column.to(self.device) for column in rows)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.network.can_learn):
            if torch.is_grad_enabled() or self.tokens_at_once is None:
                values = self._score(columns, needs, reference)
            else:
                lengths = columns[1].sum(1) + trajectories.length.to(self.device)
                batches = token_batches(lengths, self.tokens_at_once)
                pieces = (tuple(c[batch.to(self.device)] for c in columns) for batch in batches)
                parts = [self._score(piece, needs, reference) for piece in pieces]
                order = torch.cat(batches).argsort().to(self.device)
                values = {name: torch.cat([part[name] for part in parts])[order] for name in parts[0]}
        values = {name: value.to(trajectories.mask.device) for name, value in values.items()}
        return Scores(values.pop("log_prob"), values)

    def _score(
        self, columns: tuple[Tensor, ...], needs: Collection[str], reference: Language | None
    ) -> dict[str, Tensor]:
        """Everything asked for, (N, T, ...), in one forward pass; the columns are those `pack` takes."""
        check_reading(self.network)
        prompt_ids, prompt_mask, action, mask = columns
        packed = pack(prompt_ids, prompt_mask, action, mask, self.pad)
        reference = reference if "kl" in needs else None
        fast = self.network.is_fast(packed) and (reference is None or reference.network.is_fast(packed))
        other: tuple[Tensor, Tensor | None] | None = None
        if reference is not None:
            with torch.no_grad():
                other = reference.network.read(packed, fast, hidden=False)
        hidden, logits = self.network.read(packed, fast, hidden=bool({"hidden", "value"} & set(needs)))
        if fast:
            head = self.network.head
            origin = None if reference is None or other is None else (other[0], reference.network.head)
            chunk = (hidden, packed.action, head, self.truncation, needs, self.chunk, origin)
            values = chunked_statistics(*chunk)
            logits = head(hidden) if "logits" in needs else None
        else:
            assert logits is not None
            values = statistics(logits, packed.action, self.truncation, needs, None if other is None else other[1])
        if "logits" in needs and logits is not None:
            values["logits"] = self.truncation.log_probs(logits, packed.action)
        if "hidden" in needs:
            values["hidden"] = hidden
        if "value" in needs and self.network.value_head is not None:
            values["value"] = self.network.value_head(hidden.to(self.network.value_head.weight.dtype))[:, 0]
        place = (packed.row, packed.step)
        return {
            name: value.new_zeros(*mask.shape, *value.shape[1:]).index_put(place, value)
            for name, value in values.items()
        }

    # texts from elsewhere, and sentences

    def encode_completion(self, completion: Any, prompt: Any = None) -> Tensor:
        """(T,) tokens of a completion from elsewhere, a text or the assistant's message, with its end token.

        After a chat it is what the chat template writes (`PromptEncoder.completion`). Raises `InputError` for anything
        else, and for one of more than `max_new_tokens` tokens.
        """
        ids = self.encoder.completion(completion, prompt)
        if len(ids) > self.max_new_tokens:
            raise InputError(
                f"A completion must have at most max_new_tokens={self.max_new_tokens} tokens, got {len(ids)}: "
                f"{completion!r:.60}."
            )
        return torch.tensor(ids, device=self.device)

    def segments(self, trajectories: Trajectories) -> Tensor:
        """(N, T) the number of the sentence that each step belongs to, by the text of its tokens."""
        return segments(trajectories.action, sentence_ends(trajectories.action, self.tokenizer.decode))

    # twins

    def with_value_head(self) -> Self:
        """A twin with a linear value head on the last hidden state, (D,) -> 1: the one there is, else one of zeros."""
        return self._on(self.network.with_value_head())

    def with_encoder(self, encoder: PromptEncoder) -> Self:
        """A twin on the same parameters and meter that turns prompts into tokens in another way."""
        twin = copy.copy(self)
        twin.encoder = encoder
        return twin

    def metered(self, meter: Meter) -> Self:
        """A twin on the same parameters that spends on another meter."""
        network = copy.copy(self.network)
        network.meter = meter
        return self._on(network)

    def frozen(self) -> Self:
        """A twin that cannot learn, on the same meter: a copy, or for an adapted model its base without the adapter.

        The base shares its weights with this one, and they never change: it is the model before any training, however
        far the adapter has come.
        """
        return self._on(self.network.frozen())

    def _on(self, network: CausalNetwork) -> Self:
        """A twin that runs another network."""
        twin = copy.copy(self)
        twin.network, twin.module, twin.meter = network, network.module, network.meter
        return twin

    def sync(self, other: Language, rate: float = 1.0) -> None:
        """Move this model's parameters to `other`'s, all the way or by `rate` of it (a reference that follows)."""
        self.network.sync(other.network, rate)

    def describe(self) -> dict[str, Any]:
        """All that decides what is drawn, besides the parameters: truncation, limits, ends, prompts as tokens, the
        network's configuration and its adapter."""
        compiled = self.network.compiled is not None
        limits = {"max_new_tokens": self.max_new_tokens, "ends": self.ends.tolist(), "compiled": compiled}
        limits["tokenizer"] = tokenizer_digest(self.tokenizer)
        model = described(self.network.causal, self.network.module.model if self.network.adapted else None)
        return {"truncation": f"{self.truncation}", **limits, **self.encoder.describe(), **model}

    def save(self, folder: str | os.PathLike[str], merged: bool | None = None) -> None:
        """Weights as safetensors, with the tokenizer, so that `AutoModelForCausalLM.from_pretrained` loads them.

        An adapted model is saved with the adapter merged into a copy of its weights, or with `merged=False` the
        adapter alone. A value head goes into `value_head.safetensors`, where `language` finds it.
        """
        self.network.save(folder, merged)
        self.tokenizer.save_pretrained(folder)
