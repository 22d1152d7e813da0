"""Read partial texts with the network: each distinct text once, and only when its next token is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stepwell.errors import StepwellError
from stepwell.process.language.cache import forked, joined
from stepwell.process.language.network import CausalNetwork
from stepwell.process.language.state import LanguageState, Memory, ReadText
from stepwell.process.language.truncation import Truncation


@dataclass(frozen=True)
class Reader:
    """A network that reads partial texts, and the truncation of the distributions after them."""

    network: CausalNetwork
    truncation: Truncation

    def read(self, ids: Tensor, mask: Tensor, text: Tensor) -> Memory:
        """Prompts from their beginning: `ids` (R, P), of which those in `mask` (R, P) are real; left-padded.

        The memory is that of a state whose row i goes on from prompt `text[i]` (N,).
        """
        batch, slot = torch.zeros_like(text), text
        readings: list[ReadText] = []
        for rows in self.network.apart.groups(torch.arange(len(ids), device=ids.device), mask.sum(1)):
            readings.append(self._read_anew(ids[rows], mask[rows]))
            if len(rows) < len(ids):
                place = torch.full((len(ids),), -1, device=ids.device)
                place[rows] = torch.arange(len(rows), device=ids.device)
                own = place[text] >= 0
                batch, slot = batch.masked_fill(own, len(readings) - 1), torch.where(own, place[text], slot)
        return Memory(tuple(readings), batch, slot, ids.shape[1])

    def log_probs(self, state: LanguageState, wanted: Tensor) -> Tensor:
        """(M, V) log-probabilities of the next token of the `wanted` rows (N,) bool, truncation applied."""
        self.bring_up_to_date(state, wanted)
        memory = state.memory
        newest = memory.read[-1].log_probs
        if len(memory.read) == 1 or not self.network.apart.any:
            return newest[memory.slot[wanted]]
        batch, slot = memory.batch[wanted], memory.slot[wanted]
        values = newest.new_empty(len(slot), newest.shape[1])
        for number in batch.unique().tolist():
            values[batch == number] = memory.read[number].log_probs[slot[batch == number]]
        return values

    def bring_up_to_date(self, state: LanguageState, wanted: Tensor) -> None:
        """Read all tokens of the `wanted` rows (N,) bool that were not read yet; equal texts are read once.

        The wanted rows have to follow from the state alone. Any other row that goes on keeps what was read of it, and
        is read on from there when it is wanted; rows that are done are forgotten.
        """
        memory = state.memory
        rows = wanted.nonzero()[:, 0]
        if len(rows) == 0 or memory.read[-1].columns == memory.columns:
            return
        parts: dict[tuple[int, int], list[ReadText]] = {}  # those that can be joined
        slots: list[
            tuple[Tensor, tuple[int, int], Tensor]
        ] = []  # rows, where they are read, and the slot of each there
        for number, earlier in enumerate(memory.read):
            own = rows if len(memory.read) == 1 else rows[memory.batch[rows] == number]
            for some in self.network.apart.groups(own, memory.columns - state.padding[own]):
                if len(some):
                    part, slot = self._read_rows(state, earlier, some)
                    place = (part.cut, self._key(memory.columns - state.padding[some[:1]]))
                    together = parts.setdefault(place, [])
                    slots.append((some, place, slot + sum(len(other.log_probs) for other in together)))
                    together.append(part)
        newest = {place: _joined(together) for place, together in parts.items()}
        waiting = ~(wanted | state.done)
        kept = memory.batch[waiting].unique().tolist()  # the readings that some row still has to go on from
        new_batch, new_slot = torch.full_like(memory.batch, -1), torch.full_like(memory.slot, -1)
        new_slot[waiting] = memory.slot[waiting]
        for number, old in enumerate(kept):
            new_batch[waiting & (memory.batch == old)] = number
        places = list(newest)
        for some, place, slot in slots:
            new_batch[some], new_slot[some] = len(kept) + places.index(place), slot
        readings = (*(memory.read[old] for old in kept), *newest.values())
        memory.read, memory.batch, memory.slot = readings, new_batch, new_slot

    def _key(self, length: Tensor) -> int:
        return int(self.network.apart.key(length)) if self.network.apart.any else 0

    def _read_rows(self, state: LanguageState, earlier: ReadText, rows: Tensor) -> tuple[ReadText, Tensor]:
        """Read the new tokens of `rows` (M,), which all go on from `earlier`, once for each distinct text.

        Returns the longer reading and the slot of each row in it (M,). Texts that have grown so long that the model
        reads all of them in another way are read from their beginning.
        """
        memory = state.memory
        new = state.tokens[rows, earlier.columns - memory.columns :]
        distinct, shared = torch.cat([memory.slot[rows, None], new], 1).unique(dim=0, return_inverse=True)
        first = slot = torch.arange(len(rows), device=rows.device)
        if len(distinct) < len(rows):
            slot = shared
            first = first.new_full((len(distinct),), len(rows)).scatter_reduce(0, slot, first, "amin")
        columns = torch.arange(memory.columns, device=rows.device)
        mask = columns >= state.padding[rows[first], None]
        if self.network.apart.switch is not None:
            padding = state.padding[rows[:1]]
            if self._key(earlier.columns - padding) != self._key(memory.columns - padding):
                return self._read_anew(torch.cat([state.prompt, state.tokens], 1)[rows[first]], mask), slot
        origin = memory.slot[rows[first]]
        same = origin.tolist() == list(range(len(earlier.log_probs)))
        cache = forked(earlier.cache, None if same else origin)
        return self._read_on(cache, new[first], mask, earlier.cut), slot

    def _read_anew(self, ids: Tensor, mask: Tensor) -> ReadText:
        """Read texts `ids` (R, columns) from their beginning, without columns that are padding in all of them."""
        cut = int(mask.long().argmax(1).min())
        return self._read_on(None, ids[:, cut:], mask, cut)

    def _read_on(self, cache: Any, ids: Tensor, mask: Tensor, cut: int) -> ReadText:
        """Read `ids` (R, n) after what the cache (changed in place) holds; `mask` (R, columns) covers both.

        The cache, None if nothing was read, leaves out the first `cut` columns.
        """
        longer, logits = self.network.read_on(cache, ids, mask[:, cut:])
        log_probs = self.truncation.log_probs(logits)
        if bool(log_probs[:, 0].isnan().any()):  # a softmax spreads one NaN over its row
            raise StepwellError("The model's logits are not numbers: its parameters diverged.")
        return ReadText(longer, mask.shape[1], log_probs, cut)


def _joined(parts: Sequence[ReadText]) -> ReadText:
    """The texts of readings with equally many columns, one after another."""
    first = parts[0]
    if len(parts) == 1:
        return first
    log_probs = torch.cat([part.log_probs for part in parts])
    return ReadText(joined([part.cache for part in parts]), first.columns, log_probs, first.cut)
