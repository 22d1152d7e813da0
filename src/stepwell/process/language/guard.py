"""The guard of every language model: texts read together are held against each of them read alone."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from stepwell.errors import InputError
from stepwell.guarded import first_line_of
from stepwell.meter import Meter
from stepwell.process.language.cache import cache_argument, empty_cache
from stepwell.process.language.network import TOLERANCE, CausalNetwork
from stepwell.process.language.prompts import Packed, left_padded
from stepwell.process.language.reading import Reader
from stepwell.process.language.state import LanguageState
from stepwell.process.language.truncation import Truncation, in_full

NEW = 3
"""Tokens that each text is continued by."""

LONG = 32
"""The longest window, or the latest switch of positions, that the texts are made long enough to pass."""

WINDOWS = ("sliding_window", "attention_chunk_size")
"""The names that configurations have for how far attention reaches."""

SHORT = 4
"""The window that stands for one that is too long for a trial."""


def refuse_unreadable(model: nn.Module) -> None:
    """Raise `InputError` for a model that cannot be read token by token, as far as its kind and its arguments tell."""
    config: Any = model.config
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(
            f"model must be a causal language model, got {type(model).__name__}, an encoder with a decoder, which "
            "continues no prompt."
        )
    cache_argument(model)
    if getattr(config, "rescale_every", 0):  # RWKV would divide its weights in place; it only helps in float16
        config.rescale_every = 0


@torch.no_grad()
def check_reading(network: CausalNetwork) -> None:
    """Raise `InputError` for a model that gives a text other probabilities beside others, or from a cache, than alone.

    Two prompts of unequal length, one of which forks, are read together, continued, and scored. Each text is also read
    alone, unpadded and without a cache. Windows are passed; one of more than `LONG` tokens is made a short one for the
    trial, and what disagrees only there is tried once more at full length. A network and its twins are checked once,
    and neither their meter nor any random number notices.
    """
    if network.checked:
        return
    twin = copy.copy(network)
    twin.meter, twin.compiled = Meter(), None
    twin.shares = {"rollout": False, "score": False}
    name = type(network.causal).__name__
    try:
        longest = _longest(twin)
        if longest <= LONG:
            gap, allowed = _disagreement(twin, longest)
        else:
            with _window(twin, SHORT):
                gap, allowed = _disagreement(twin, SHORT)
            if gap > allowed and (whole := _disagreement(twin, 0))[0] > whole[1]:
                gap, allowed = whole
            elif gap > allowed:
                gap, allowed = _disagreement(twin, longest)
        if gap > allowed:
            raise InputError(
                f"{name} cannot be read step by step: texts that are read together, padded and from a cache, get "
                f"log-probabilities that are up to {gap:.2g} from those of each text alone, where {allowed:.2g} would "
                "be rounding. Its positions, its attention or its state depend on more than the text before a token; "
                "use a causal language model."
            )
    except InputError:
        raise
    except Exception as error:  # models raise whatever they like
        raise InputError(f"{name} cannot be read token by token: {first_line_of(error)}.") from error
    network.checked.append(True)


def _longest(network: CausalNetwork) -> int:
    """The longest window of the model's attention, and the switch of its positions if a trial can pass it."""
    config: Any = network.causal.config.get_text_config()
    layers = getattr(empty_cache(network.causal), "layers", ())
    windows = [getattr(layer, "sliding_window", None) for layer in layers]
    windows += [getattr(config, name, None) for name in WINDOWS]
    switch = network.apart.switch or 0
    return max(switch if switch <= LONG else 0, *(window or 0 for window in windows))


@contextlib.contextmanager
def _window(network: CausalNetwork, size: int) -> Iterator[None]:
    """Inside, the model's configuration has windows of `size` tokens."""
    config: Any = network.causal.config.get_text_config()
    names = [name for name in WINDOWS if getattr(config, name, None)]
    before = {name: getattr(config, name) for name in names}
    for name in names:
        setattr(config, name, size)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)


def _disagreement(network: CausalNetwork, longest: int) -> tuple[float, float]:
    """The largest gap of log-probabilities between texts read together and alone, and the largest that is rounding.

    Experts that are chosen by a hair may differ by rounding: where texts disagree, two more of them must.
    """
    first = _gap(network, longest, 0)
    return first if first[0] <= first[1] else max(_gap(network, longest, 1), _gap(network, longest, 2))


def _gap(network: CausalNetwork, longest: int, seed: int) -> tuple[float, float]:
    """`_disagreement`, of the texts of one seed.

    In half precision the gap of a text is the median over its tokens: single experts may well be chosen otherwise.
    """
    config: Any = network.causal.config.get_text_config()
    limit = int(getattr(config, "max_position_embeddings", None) or 2**20)
    middle = min(max(longest, 3), limit - 2 - NEW)
    if middle < 2:
        return 0.0, 0.0  # the model has no room for two texts
    lengths = middle + 2, middle - 1
    tokens = _tokens(network, seed, sum(lengths) + 3 * NEW)
    prompts = [tokens[: lengths[0]], tokens[lengths[0] : sum(lengths)]]
    new = torch.tensor(tokens[sum(lengths) :], device=network.device).view(3, NEW)
    texts = [prompts[i] + row for i, row in zip((0, 1, 1), new.tolist(), strict=True)]
    alone = [_alone(network, torch.tensor(text, device=network.device)) for text in texts]
    before = [lengths[0], lengths[1], lengths[1]]
    gaps: list[list[Tensor]] = [[] for _ in range(6)]  # of each text, read and scored, at several of its tokens
    for end, values in _read_together(network, prompts, new):
        for row, value in enumerate(values):
            gaps[row].append(_far(value, alone[row][before[row] + end - 1]))
    for row, column, value in _scored_together(network, texts, before):
        gaps[3 + row].append(_far(value, alone[row][column]))
    half = torch.finfo(network._precision()).bits <= 16
    gap = max(float(torch.stack(some).median() if half else torch.stack(some).max()) for some in gaps)
    size = max(float(values[values.isfinite()].abs().max()) for values in alone)
    return gap, TOLERANCE[network._precision()] * max(size, 1.0)


def _far(values: Tensor, others: Tensor) -> Tensor:
    gap = (values - others).abs()
    return gap.masked_fill(values.eq(others) | (values.isnan() & others.isnan()), 0.0).nan_to_num(torch.inf).max()


def _tokens(network: CausalNetwork, seed: int, count: int) -> list[int]:
    """Tokens without a special meaning, spread over the vocabulary."""
    configs = [network.causal.config, network.causal.config.get_text_config()]
    special: set[Any] = set()
    for config in configs:
        for name, value in vars(config).items():
            if name.endswith(("token_id", "token_index", "token_ids")):
                special |= {*value} if isinstance(value, list | tuple) else {value}
    embeddings: Any = network.causal.get_input_embeddings()
    size = int(embeddings.weight.shape[0])
    spread = [(7 + 13 * seed + i * (size // 3 * 2 + 1)) % size for i in range(count + len(special))]
    plain = [token for token in spread if token not in special]
    return ((plain or spread) * count)[:count]


def _alone(network: CausalNetwork, text: Tensor) -> Tensor:
    """(n, V) log-probabilities after each token of a text (n,), read alone, unpadded and without a cache."""
    with network._ready():
        logits = network.causal(text[None], use_cache=False).logits[0]
        switch = network.apart.switch
        if switch is not None and switch < len(text):
            logits = torch.cat([network.causal(text[None, :switch], use_cache=False).logits[0], logits[switch:]])
    return in_full(logits).log_softmax(-1)


def _read_together(network: CausalNetwork, prompts: list[list[int]], new: Tensor) -> Iterator[tuple[int, Tensor]]:
    """The number of new tokens, and the log-probabilities (3, V) after them: none, one, and all at once.

    The last are read after the prompts again, whose cache has to be as it was.
    """
    reader, device = Reader(network, Truncation()), network.device
    ids, mask = (x.to(device) for x in left_padded(prompts, 0))
    text = torch.tensor([0, 1, 1], device=device)
    zeros = torch.zeros(3, dtype=torch.long, device=device)
    memory = reader.read(ids, mask, text)
    state = LanguageState(ids[text], ids.new_empty(3, 0), zeros, (~mask).sum(1)[text], zeros + 2**20, zeros > 0,
                          zeros > 0, memory)  # fmt: skip
    wanted = zeros == 0
    yield 0, reader.log_probs(state, wanted)
    yield 1, reader.log_probs(_with_tokens(state, new[:, :1]), wanted)
    yield NEW, reader.log_probs(_with_tokens(state, new), wanted)


def _with_tokens(state: LanguageState, new: Tensor) -> LanguageState:
    columns = state.memory.columns + new.shape[1]
    memory = replace(state.memory, columns=columns)
    return replace(state, tokens=torch.cat([state.tokens, new], 1), length=state.length + new.shape[1], memory=memory)


def _scored_together(
    network: CausalNetwork, texts: list[list[int]], before: list[int]
) -> Iterator[tuple[int, int, Tensor]]:
    """A row, a column, and the log-probabilities (V,) after it, of texts padded on the right, read without a cache."""
    backwards, real = left_padded([text[::-1] for text in texts], 0)
    ids, mask = (x.flip(1).to(network.device) for x in (backwards, real))
    places = [(row, before[row] - 1 + step, step) for row in range(len(texts)) for step in range(NEW)]
    row, column, step = (torch.tensor(values, device=network.device) for values in zip(*places, strict=True))
    _, logits = network.read(Packed(ids, mask, row, step, column, ids[row, column + 1]), fast=False, hidden=False)
    assert logits is not None
    for (at, where, _), values in zip(places, in_full(logits).log_softmax(-1), strict=True):
        yield at, where, values
