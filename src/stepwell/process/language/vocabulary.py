"""The tokens of a tokenizer as a model draws them: those there are, those that only mark structure, and their texts."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_STRUCTURE = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "cls_token_id", "sep_token_id")


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a tokenizer, for a model of `size` ids whose samples end at one of `ends`."""

    tokenizer: Any
    size: int
    ends: tuple[int, ...] = ()

    @functools.cached_property
    def special(self) -> frozenset[int]:
        """The ids of special tokens, which a plain decoding leaves out."""
        added = getattr(self.tokenizer, "added_tokens_decoder", {})
        return frozenset(self.tokenizer.all_special_ids) | {i for i, token in added.items() if token.special}

    @functools.cached_property
    def structure(self) -> frozenset[int]:
        """Those that no text shows: the end tokens among them, padding, and what begins and separates texts."""
        named = {getattr(self.tokenizer, name, None) for name in _STRUCTURE}
        return self.special & (named | {*self.ends})

    def text(self, ids: Sequence[int], keep_special: bool) -> str:
        """The text of some tokens, with the special ones that are not only structure if these are kept."""
        if not keep_special or self.special.isdisjoint(ids):
            return str(self.tokenizer.decode(ids, skip_special_tokens=True))
        shown = [token for token in ids if token not in self.structure]
        return str(self.tokenizer.decode(shown, skip_special_tokens=False))

    def prompt(self, text: str) -> list[int]:
        """The ids of a text that is to be continued: after what the tokenizer puts before texts, unless the text brings
        it itself, and without what it puts after them, such as an end of sequence."""
        own = self.tokens(text)
        if self._before is None:
            whole, end = list(self.tokenizer(text, verbose=False)["input_ids"]), [self.tokenizer.eos_token_id]
            return whole[:-1] if whole[-1:] == end != own[-1:] else whole
        return own if own[: len(self._before)] == self._before else self._before + own

    def tokens(self, text: str) -> list[int]:
        """The ids of a text alone."""
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    @functools.cached_property
    def _before(self) -> list[int] | None:
        """The ids that the tokenizer puts before every text; None where it writes texts themselves in another way."""
        whole, bare = list(self.tokenizer("a", verbose=False)["input_ids"]), self.tokens("a")
        places = (place for place in range(len(whole)) if whole[place : place + len(bare)] == bare)
        place = next(places, None)
        return None if place is None else whole[:place]

    def written(self, ids: Sequence[int]) -> str:
        """Their text with every special token."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=False))

    def absent(self, width: int) -> Tensor | None:
        """(K,) the outputs of the model, of `width` in all, that no token belongs to, as padded vocabularies have them;
        None where all have one.

        An end token is there even if the tokenizer does not know it: the model was taught to draw it.
        """
        known = {token for token in {*self.tokenizer.get_vocab().values(), *self.ends} if token < self.size}
        absent = [token for token in range(width) if token not in known]
        return torch.tensor(absent) if absent else None


def text_end(tokenizer: Any, model: Any, eos: Sequence[int | str] | int | str, ends: Sequence[int], size: int) -> int:
    """The token that ends a plain text: the tokenizer's end of sequence; without one the first that `eos` or the model
    names, of the `ends` that samples end at."""
    own = list(eos) if isinstance(eos, list | tuple) else [eos]
    known = tokenizer.get_vocab()
    named = [tokenizer.eos_token_id, *(known.get(token) if isinstance(token, str) else token for token in own)]
    for settings in (getattr(model, "generation_config", None), model.config):
        declared = getattr(settings, "eos_token_id", None)
        named += declared if isinstance(declared, list | tuple) else [declared]
    return next((token for token in named if token is not None and token in ends and token < size), ends[0])
