"""Causal language models of `transformers` as a process: a step is a token, a state a batch of partial texts."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from stepwell.columns import Columns
from stepwell.distributions import Categorical, Point
from stepwell.errors import InputError, MissingAbility, StepwellError
from stepwell.meter import Meter
from stepwell.process.base import Process, Samples, Scores, check_needs
from stepwell.process.batching import token_batches
from stepwell.process.language import loading
from stepwell.process.language.cache import empty_cache, forked, joined
from stepwell.process.language.chunked import chunked_statistics, statistics
from stepwell.process.language.network import CausalNetwork, LanguageModule
from stepwell.process.language.prompts import PromptEncoder, is_chat, left_padded, pack
from stepwell.process.language.segments import segments, sentence_ends
from stepwell.process.language.state import LanguageState, Memory, Past
from stepwell.process.language.truncation import Truncation
from stepwell.rng import Rng
from stepwell.trajectories import Trajectories

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from stepwell.process.conversation import Turns

CHUNK_ELEMENTS = {"cpu": 2**22, "accelerator": 2**26}
"""How many logits a chunk holds at most, unless `chunk` says how many steps: 16 and 256 MiB in float32."""


class Language(Process):
    """A causal language model; see `language`, which makes one.

    The network is always in evaluation mode, also while it learns: dropout would draw other numbers when
    scoring than when sampling, and the ratio of the two laws would not start at 1.

    The truncation (top-k, top-p, min-p) is computed from the parameters of the moment, and `score` keeps the action
    that was taken whatever they have become, so that its log-probability stays finite; with unchanged parameters it
    is kept anyway, so the two laws are the same (up to rounding where a token lies exactly at the border).
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
        self.module = self.network.module
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
        """The largest number of steps of a row."""
        return self.max_new_tokens

    @property
    def meter(self) -> Meter:  # type: ignore[override]
        return self.network.meter

    @property
    def device(self) -> torch.device:
        return self.network.device

    # drawing

    @torch.no_grad()
    def start(self, prompts: Sequence[Any], rng: Rng) -> LanguageState:
        """One row a prompt, a text or a list of chat messages. Equal prompts are read by the network once."""
        encoded = [tuple(self.encoder(prompt)) for prompt in prompts]
        distinct = list(dict.fromkeys(encoded))
        place = {tokens: i for i, tokens in enumerate(distinct)}
        ids, mask = (x.to(self.device) for x in left_padded(distinct, self.pad))
        past = self._read_on(empty_cache(self.network.causal), ids, mask)
        count, slot = len(encoded), torch.tensor([place[tokens] for tokens in encoded])
        length = torch.tensor([len(tokens) for tokens in encoded])
        limit = torch.full((count,), self.max_new_tokens)
        if self.encoder.limit is not None:  # the last token is drawn but never read, so it needs no position
            limit = limit.minimum(self.encoder.limit - length + 1)
        return LanguageState(
            tokens=torch.zeros(count, 0, dtype=torch.long, device=self.device),
            length=torch.zeros(count, dtype=torch.long, device=self.device),
            padding=(ids.shape[1] - length).to(self.device),
            limit=limit.to(self.device),
            ended=torch.zeros(count, dtype=torch.bool, device=self.device),
            chat=torch.tensor([is_chat(prompt) for prompt in prompts], dtype=torch.bool, device=self.device),
            memory=Memory((past,), torch.zeros_like(slot).to(self.device), slot.to(self.device), past.columns),
        )

    @torch.no_grad()
    def propose(self, state: LanguageState) -> Categorical:
        """The law of the next token that is really drawn from: temperature, top-k, top-p and min-p applied.

        Runs the network on tokens it has not read yet, once for rows that share their whole text so far; done
        rows are never read, and their law is a certain padding token.
        """
        self._bring_up_to_date(state, ~state.done)
        slot, law = state.memory.slot, state.memory.pasts[-1].law
        rows = law[slot.clamp(min=0)]
        if bool(state.done.any()):
            certain = torch.full_like(law[:1], -torch.inf).index_fill(1, torch.tensor([self.pad], device=law.device), 0)
            rows = torch.where(state.done[:, None], certain, rows)
        return Categorical(rows)

    def deterministic(self, state: LanguageState) -> Point:
        """The likeliest token of each row."""
        return Point(self.propose(state).logits.argmax(-1))

    def advance(self, state: LanguageState, action: Tensor, rng: Rng) -> LanguageState:
        """One token more in every row that is not done; the network reads it when `propose` asks for the next law."""
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
        """Texts without special tokens; for a chat, a list with the assistant's message.

        Column: `completion_ids`, the tokens with the end token where one was drawn; rows without one are truncated.
        """
        tokens, lengths = state.tokens.tolist(), state.length.tolist()
        ids = [row[:length] for row, length in zip(tokens, lengths, strict=True)]
        texts = [self.tokenizer.decode(row, skip_special_tokens=True) for row in ids]
        values = [
            [{"role": "assistant", "content": text}] if chat else text
            for text, chat in zip(texts, state.chat.tolist(), strict=True)
        ]
        return Samples(values, {"completion_ids": ids}, truncated=(~state.ended).tolist())

    def _bring_up_to_date(self, state: LanguageState, wanted: Tensor) -> None:
        """Read all tokens of the `wanted` rows (N,) bool that were not read yet; equal texts are read once.

        Which rows are wanted is a matter of the state alone. A row that is not, but goes on, keeps what was read of
        it, and is read on from there when its law is asked for; one that is done is forgotten.
        """
        memory = state.memory
        rows = wanted.nonzero()[:, 0]
        if len(rows) == 0 or memory.pasts[-1].columns == memory.columns:
            return
        parts: list[Past] = []
        found: list[tuple[Tensor, Tensor]] = []
        texts = 0
        for number, origin in enumerate(memory.pasts):
            here = rows if len(memory.pasts) == 1 else rows[memory.past[rows] == number]
            if len(here):
                part, group = self._read_rows(state, origin, here)
                parts.append(part)
                found.append((here, group + texts))
                texts += len(part.law)
        newest = Past(joined([part.cache for part in parts]), memory.columns, torch.cat([part.law for part in parts]))
        waiting = ~(wanted | state.done)
        kept = memory.past[waiting].unique().tolist()  # the pasts that some row still has to go on from
        past, slot = torch.full_like(memory.past, -1), torch.full_like(memory.slot, -1)
        slot[waiting] = memory.slot[waiting]
        for number, old in enumerate(kept):
            past[waiting & (memory.past == old)] = number
        for here, group in found:
            past[here], slot[here] = len(kept), group
        memory.pasts, memory.past, memory.slot = (*(memory.pasts[old] for old in kept), newest), past, slot

    def _read_rows(self, state: LanguageState, past: Past, rows: Tensor) -> tuple[Past, Tensor]:
        """What `rows` (M,), that all go on from one past, have in common with it and since; the text (M,) of each."""
        memory = state.memory
        new = state.tokens[rows, past.columns - memory.columns :]
        different, shared = torch.cat([memory.slot[rows, None], new], 1).unique(dim=0, return_inverse=True)
        first = group = torch.arange(len(rows), device=rows.device)
        if len(different) < len(rows):
            group = shared
            first = first.new_full((len(different),), len(rows)).scatter_reduce(0, group, first, "amin")
        origin = memory.slot[rows[first]]
        same = origin.tolist() == list(range(len(past.law)))
        cache = forked(past.cache, None if same else origin)
        columns = torch.arange(memory.columns, device=rows.device)
        return self._read_on(cache, new[first], columns >= state.padding[rows[first], None]), group

    def _read_on(self, cache: Any, ids: Tensor, mask: Tensor) -> Past:
        """Read `ids` (R, n) after what the cache (changed in place) holds; `mask` (R, columns) covers both."""
        longer, logits = self.network.read_on(cache, ids, mask)
        law = self.truncation.law(logits)
        if bool(law[:, 0].isnan().any()):  # a softmax spreads one NaN over its row
            raise StepwellError(
                "The model's logits are not numbers: its parameters diverged, or it is of a kind whose attention "
                "cannot pad in float64 (those without SDPA)."
            )
        return Past(longer, mask.shape[1], law)

    # scoring

    def check_prompt(self, value: Any) -> None:
        """Raise `InputError` for a prompt that is no text or chat, or too long for the model."""
        self.encoder(value)

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
        """Log-probabilities (N, T) of the law tokens are drawn from, under the present parameters.

        Entropy, sum of squares and logits are of that same law; `kl` is of the laws at temperature but before
        truncation, whose supports agree. All are 0 where the mask is False and differentiable, and come back on the
        device of `trajectories`. Without gradients, rows are scored at most `tokens_at_once` padded tokens at a
        time; with them, cutting the rows is the caller's part (`stepwell.process.batching.token_batches`).

        Raises `MissingAbility` for a value without a value head (`with_value_head`), and for a KL without a
        `reference`, which has to be a language too.
        """
        if "value" in needs and self.network.value_head is None:
            raise MissingAbility("A method needs 'value' of each step; score the twin that with_value_head() gives.")
        check_needs(self, needs, reference)
        if not isinstance(reference, Language | None):
            raise MissingAbility(f"A language's KL is measured from a language, not from {type(reference).__name__}.")
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
            answer = chunked_statistics(*chunk)
            logits = head(hidden) if "logits" in needs else None
        else:
            assert logits is not None
            answer = statistics(logits, packed.action, self.truncation, needs, None if other is None else other[1])
        if "logits" in needs and logits is not None:
            answer["logits"] = self.truncation.law(logits, packed.action)
        if "hidden" in needs:
            answer["hidden"] = hidden
        if "value" in needs and self.network.value_head is not None:
            answer["value"] = self.network.value_head(hidden.to(self.network.value_head.weight.dtype))[:, 0]
        where = (packed.row, packed.step)
        return {
            name: value.new_zeros(*mask.shape, *value.shape[1:]).index_put(where, value)
            for name, value in answer.items()
        }

    # texts written elsewhere, and what they are made of

    def encode_completion(self, completion: Any) -> Tensor:
        """(T,) tokens of a completion written elsewhere, a text or an assistant's message, with the end token.

        Raises `InputError` for anything else, and for one of more than `max_new_tokens` tokens.
        """
        text = completion[-1]["content"] if is_chat(completion) else completion
        if not isinstance(text, str):
            raise InputError(f"A completion is a text or a list of messages, not {completion!r:.60}.")
        ids = [*self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], int(self.ends[0])]
        if len(ids) > self.max_new_tokens:
            raise InputError(
                f"The completion {text!r:.60} has {len(ids)} tokens; at most max_new_tokens={self.max_new_tokens} is "
                "right."
            )
        return torch.tensor(ids, device=self.device)

    def segments(self, trajectories: Trajectories) -> Tensor:
        """(N, T) which sentence each step is in, by the text of its tokens (`stepwell.process.language.segments`)."""
        return segments(trajectories.action, sentence_ends(trajectories.action, self.tokenizer.decode))

    # other models made from this one

    def turns(self, make_environment: Callable[[], Any], **settings: Any) -> Turns:
        """This model in conversation with environments, on the same parameters and meter; see `Turns`."""
        from stepwell.process.conversation import Turns  # which is built on this file

        return Turns(self, make_environment, **settings)

    def with_value_head(self) -> Self:
        """A twin with a linear value head on the last hidden state, (D,) -> 1: the one there is, else one of zeros."""
        twin = copy.copy(self)
        twin.network = self.network.with_value_head()
        twin.module = twin.network.module
        return twin

    def metered(self, meter: Meter) -> Self:
        """A twin on the same parameters that spends on another meter."""
        twin = copy.copy(self)
        twin.network = copy.copy(self.network)
        twin.network.meter = meter
        return twin

    def frozen(self) -> Self:
        """A twin that cannot learn, on the same meter: a copy, or for an adapted model its base without the adapter.

        The latter shares its weights with this one, which never change; it is the model before any training,
        however far the adapter has come.
        """
        twin = copy.copy(self)
        twin.network = self.network.frozen()
        twin.module = twin.network.module
        return twin

    def sync(self, other: Language, rate: float = 1.0) -> None:
        """Move this model's parameters to `other`'s, all the way or by `rate` of it (a reference that follows)."""
        self.network.sync(other.network, rate)

    def describe(self) -> dict[str, Any]:
        """Temperature and truncation, the longest row, and whether the network is compiled."""
        compiled = self.network.compiled is not None
        return {"truncation": f"{self.truncation}", "max_new_tokens": self.max_new_tokens, "compiled": compiled}

    def save(self, folder: str | os.PathLike[str], merged: bool = True) -> None:
        """Weights as safetensors, with the tokenizer, so that `AutoModelForCausalLM.from_pretrained` loads them.

        An adapted model is saved with the adapter merged into a copy of its weights, or with `merged=False` the
        adapter alone. A value head goes into `value_head.safetensors`, where `language` finds it.
        """
        self.network.save(folder, merged)
        self.tokenizer.save_pretrained(folder)


def language(
    model: str | os.PathLike[str] | PreTrainedModel,
    tokenizer: Any = None,
    *,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device | None = None,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    eos: Sequence[int | str] | int | str = (),
    lora: Mapping[str, Any] | None = None,
    system: str | None = None,
    chunk: int | None = None,
    tokens_at_once: int | None = None,
    compile: bool = False,
) -> Language:
    """A causal language model of `transformers` as a process.

    `model` is a folder, a hub id, or a built model with its `tokenizer` (a built model is cast and moved in place).
    Weights come from safetensors only, and no code that comes with a model is ever run. Samples end at an end token
    (the model's, the tokenizer's, and `eos`, ids or tokens) or after `max_new_tokens`. Tokens are drawn at
    `temperature`, then cut by `top_k`, `top_p` and `min_p` in this order (`Truncation`). `lora` is a dict of
    `peft.LoraConfig`'s options: only the adapter learns, and `frozen()` is the base. `system` is put before chats
    that have no system message. `chunk`: how many steps' logits are held at once when scoring; `tokens_at_once`: how
    many padded tokens are scored at once where no gradient is asked for. `compile`: score and learn with norms and
    perceptrons compiled by `torch.compile`, which takes less memory; rollouts gain nothing by it and stay as they are.

    `device` is, unless given, that of a built model, else the accelerator if there is one.

    Raises `InputError` for anything that is not as it has to be.
    """
    for name, value in (("max_new_tokens", max_new_tokens), ("chunk", chunk), ("tokens_at_once", tokens_at_once)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise InputError(f"{name}={value!r} is not a whole number from 1 upwards.")
    if not isinstance(compile, bool):
        raise InputError(f"compile={compile!r} is neither True nor False.")
    truncation = Truncation(temperature, top_k, top_p, min_p)
    network: Any = loading.load_model(model, loading.dtype_named(dtype))
    words = loading.load_tokenizer(tokenizer, model)
    config = network.config.get_text_config()
    vocabulary = network.get_input_embeddings().weight.shape[0]
    pad = loading.padding_token(words, vocabulary)
    ends = loading.end_tokens(network, words, eos, vocabulary)
    limit = getattr(config, "max_position_embeddings", None)
    if device is None and isinstance(model, (str, os.PathLike)):
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        device = "cpu" if accelerator is None else accelerator
    if device is not None:
        device = loading.device_named(device)
    if lora is not None:
        network = loading.with_adapter(network, lora)
    process = Language(
        LanguageModule(network if device is None else network.to(device)),
        PromptEncoder(words, limit, vocabulary, system),
        ends=ends,
        pad=pad,
        truncation=truncation,
        max_new_tokens=max_new_tokens,
        chunk=chunk,
        tokens_at_once=tokens_at_once,
        compile=compile,
    )
    head = None if not isinstance(model, (str, os.PathLike)) else Path(model) / "value_head.safetensors"
    if head is not None and head.is_file():
        from safetensors.torch import load_file

        process = process.with_value_head()
        process.network.value_head.load_state_dict(load_file(head))  # type: ignore[union-attr]
    return process
