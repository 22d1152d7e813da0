"""Read partial texts with the network: each distinct text once, and only when its next token is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stepwell.errors import StepwellError
from stepwell.process.language.cache import empty_cache, forked, joined
from stepwell.process.language.network import CausalNetwork
from stepwell.process.language.state import LanguageState, ReadText
from stepwell.process.language.truncation import Truncation


@dataclass(frozen=True)
class Reader:
    """A network that reads partial texts, and the truncation of the distributions after them."""

    network: CausalNetwork
    truncation: Truncation

    def read(self, ids: Tensor, mask: Tensor) -> ReadText:
        """Prompts from their beginning: `ids` (R, P), of which those in `mask` (R, P) are real."""
        return self._read_on(empty_cache(self.network.causal), ids, mask)

    def log_probs(self, state: LanguageState, wanted: Tensor) -> Tensor:
        """(M, V) log-probabilities of the next token of the `wanted` rows (N,) bool, truncation applied."""
        self.bring_up_to_date(state, wanted)
        return state.memory.read[-1].log_probs[state.memory.slot[wanted]]

    def bring_up_to_date(self, state: LanguageState, wanted: Tensor) -> None:
        """Read all tokens of the `wanted` rows (N,) bool that were not read yet; equal texts are read once.

        The wanted rows have to follow from the state alone. Any other row that goes on keeps what was read of it, and
        is read on from there when it is wanted; rows that are done are forgotten.
        """
        memory = state.memory
        rows = wanted.nonzero()[:, 0]
        if len(rows) == 0 or memory.read[-1].columns == memory.columns:
            return
        parts: list[ReadText] = []
        slots: list[tuple[Tensor, Tensor]] = []  # rows, and the slot of each in the newest reading
        texts = 0
        for number, earlier in enumerate(memory.read):
            own = rows if len(memory.read) == 1 else rows[memory.batch[rows] == number]
            if len(own):
                part, slot = self._read_rows(state, earlier, own)
                parts.append(part)
                slots.append((own, slot + texts))
                texts += len(part.log_probs)
        cache, log_probs = joined([part.cache for part in parts]), torch.cat([part.log_probs for part in parts])
        newest = ReadText(cache, memory.columns, log_probs)
        waiting = ~(wanted | state.done)
        kept = memory.batch[waiting].unique().tolist()  # the readings that some row still has to go on from
        new_batch, new_slot = torch.full_like(memory.batch, -1), torch.full_like(memory.slot, -1)
        new_slot[waiting] = memory.slot[waiting]
        for number, old in enumerate(kept):
            new_batch[waiting & (memory.batch == old)] = number
        for own, slot in slots:
            new_batch[own], new_slot[own] = len(kept), slot
        memory.read, memory.batch, memory.slot = (*(memory.read[old] for old in kept), newest), new_batch, new_slot

    def _read_rows(self, state: LanguageState, earlier: ReadText, rows: Tensor) -> tuple[ReadText, Tensor]:
        """Read the new tokens of `rows` (M,), which all go on from `earlier`, once for each distinct text.

        Returns the longer reading and the slot of each row in it (M,).
        """
        memory = state.memory
        new = state.tokens[rows, earlier.columns - memory.columns :]
        distinct, shared = torch.cat([memory.slot[rows, None], new], 1).unique(dim=0, return_inverse=True)
        first = slot = torch.arange(len(rows), device=rows.device)
        if len(distinct) < len(rows):
            slot = shared
            first = first.new_full((len(distinct),), len(rows)).scatter_reduce(0, slot, first, "amin")
        origin = memory.slot[rows[first]]
        same = origin.tolist() == list(range(len(earlier.log_probs)))
        cache = forked(earlier.cache, None if same else origin)
        columns = torch.arange(memory.columns, device=rows.device)
        return self._read_on(cache, new[first], columns >= state.padding[rows[first], None]), slot

    def _read_on(self, cache: Any, ids: Tensor, mask: Tensor) -> ReadText:
        """Read `ids` (R, n) after what the cache (changed in place) holds; `mask` (R, columns) covers both."""
        longer, logits = self.network.read_on(cache, ids, mask)
        log_probs = self.truncation.log_probs(logits)
        if bool(log_probs[:, 0].isnan().any()):  # a softmax spreads one NaN over its row
            raise StepwellError(
                "The model's logits are not numbers: its parameters diverged, or it is of a kind whose attention "
                "cannot pad in float64 (those without SDPA)."
            )
        return ReadText(longer, mask.shape[1], log_probs)
