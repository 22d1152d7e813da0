"""A small transformer and its character tokenizer, taught by demonstrations when they are first needed, then cached."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # tasks are listed without torch
    from torch import Tensor


@dataclass(frozen=True)
class WarmStart:
    """The size of the transformer and the length of its imitation: `steps` batches of `batch` demonstrations, AdamW.

    The learning rate does not fall towards the end, so the model stays rough: methods need something to improve.
    """

    layers: int = 2
    hidden: int = 112
    intermediate: int = 288
    heads: int = 4
    positions: int = 64
    steps: int = 350
    batch: int = 96
    learning_rate: float = 3e-3
    seed: int = 0


def character_tokenizer(characters: str) -> Any:
    """A fast tokenizer with one token a character, besides `<pad>`, `<end>` and `<unknown>`."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate(["<pad>", "<end>", "<unknown>", *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<end>",
        unk_token="<unknown>",
        clean_up_tokenization_spaces=False,
    )


def small_transformer(start: WarmStart, tokenizer: Any) -> Any:
    """An untrained causal transformer of the Llama kind for this tokenizer, its weights drawn from `start.seed`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from stepwell.rng import Rng

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=start.hidden,
        intermediate_size=start.intermediate,
        num_hidden_layers=start.layers,
        num_attention_heads=start.heads,
        max_position_embeddings=start.positions,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):  # transformers draws weights of its own, replaced below
        model = LlamaForCausalLM(config)
    rng = Rng(start.seed).split("weights")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(0.02 * rng.normal(*parameter.shape))
    return model


Piece = tuple[str, bool]
"""A stretch of a demonstration, and True where the model learns it."""


def demonstrate(folder: Path, start: WarmStart, characters: str, pairs: Sequence[tuple[str, str]]) -> None:
    """Teach a new model the (prompt, completion) pairs, drawn at random, and save it in the folder.

    The model learns the completion and the end token after it; the folder loads like any model of `transformers`.
    """
    end = f"{character_tokenizer(characters).eos_token}"
    imitate(folder, start, characters, [((prompt, False), (completion + end, True)) for prompt, completion in pairs])


def imitate(folder: Path, start: WarmStart, characters: str, demonstrations: Sequence[Sequence[Piece]]) -> None:
    """Teach a new model demonstrations in pieces, drawn at random, and save it in the folder.

    On one core: for a model this small a second one is no gain, and on a shared machine the two would mostly wait for
    each other.
    """
    import torch
    from rich.console import Console
    from rich.progress import track
    from torch.nn.functional import cross_entropy

    from stepwell.process.language.loading import quiet
    from stepwell.rng import Rng

    tokenizer = character_tokenizer(characters)
    model = small_transformer(start, tokenizer)
    ids, labels = _encoded(tokenizer, demonstrations)
    rng = Rng(start.seed).split("demonstrations")
    optimiser = torch.optim.AdamW(model.parameters(), lr=start.learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    warmup = max(1, start.steps // 15)
    screen = Console(stderr=True)
    bar = track(
        range(start.steps),
        "Warm start of the model (once, then cached)",
        console=screen,
        transient=True,
        disable=not screen.is_terminal,
    )
    with threads(1):
        for step in bar:
            optimiser.param_groups[0]["lr"] = start.learning_rate * min(1.0, (step + 1) / warmup)
            rows = (rng.uniform(start.batch) * len(demonstrations)).long()
            logits = model(ids[rows]).logits[:, :-1]
            loss = cross_entropy(logits.flatten(0, 1), labels[rows, 1:].flatten())
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
    with quiet():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _encoded(tokenizer: Any, demonstrations: Sequence[Sequence[Piece]]) -> tuple[Tensor, Tensor]:
    """Token ids (rows, T), padded on the right, and the same as labels, -100 where nothing is learnt."""
    import torch

    texts = sorted({text for pieces in demonstrations for text, _ in pieces})
    tokens = dict(zip(texts, tokenizer(texts)["input_ids"], strict=True))
    width = max(sum(len(tokens[text]) for text, _ in pieces) for pieces in demonstrations)
    ids = torch.full((len(demonstrations), width), tokenizer.pad_token_id)
    labels = torch.full((len(demonstrations), width), -100)
    for row, pieces in enumerate(demonstrations):
        end = 0
        for text, learnt in pieces:
            begin, end = end, end + len(tokens[text])
            ids[row, begin:end] = torch.tensor(tokens[text], dtype=torch.long)
            if learnt:
                labels[row, begin:end] = ids[row, begin:end]
    return ids, labels


@contextlib.contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Use `count` threads inside, or as many as before where it is None."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
