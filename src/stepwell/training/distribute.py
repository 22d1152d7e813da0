"""Several ranks as one run: each draws and scores its share of the rows, and gradients are added up.

Every rank holds the whole batch of small tensors (rewards, masks, log-probabilities), so that plans are the same
everywhere, and runs the network only on its own rows. Losses are divided by global counts, so gradients are summed.
"""

from __future__ import annotations

import atexit
import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from stepwell.errors import InputError, StepwellError
from stepwell.guarded import reason_of

T = TypeVar("T")


def _leave() -> None:
    """Close the connections in order; left open until the interpreter ends, their threads may crash the rank."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@contextlib.contextmanager
def _together() -> Iterator[None]:
    """Name the reason where ranks cannot exchange: one of them has ended, which closes its connections at once."""
    try:
        yield
    except RuntimeError as error:
        raise StepwellError(
            "Another rank of this run has ended, so that this one cannot go on; its own output says why "
            f"({reason_of(error, 120)})."
        ) from error


@dataclass(frozen=True)
class World:
    """The ranks of a run, launched by `accelerate launch` or `torchrun`; one rank by itself is a world too."""

    rank: int = 0
    size: int = 1

    @classmethod
    def join(cls) -> World:
        """The world that this rank was launched into."""
        if int(os.environ.get("WORLD_SIZE", "1")) <= 1:
            return cls()
        from accelerate import PartialState

        state = PartialState(cpu=not torch.cuda.is_available())
        atexit.unregister(_leave)
        atexit.register(_leave)
        return cls(state.process_index, state.num_processes)

    @property
    def is_main(self) -> bool:
        """True for the rank that writes files and shows progress."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in the order of the ranks."""
        if self.size == 1:
            return [value]
        from accelerate.utils import gather_object

        with _together():
            return gather_object([value])

    def same(self, value: T) -> T:
        """The main rank's value, on all ranks."""
        return self.gather(value)[0]

    def share(self, items: Sequence[T]) -> list[T]:
        """This rank's part of a list; all parts, one after another, are the list in its order."""
        bounds = [len(items) * rank // self.size for rank in (self.rank, self.rank + 1)]
        return list(items[bounds[0] : bounds[1]])

    def map_rows(self, count: int, function: Callable[[Tensor], dict[str, Tensor]]) -> dict[str, Tensor]:
        """`function(rows)` of all rows 0..count-1, each computed by one rank and known to all."""
        if self.size == 1:
            return function(torch.arange(count))
        shares = [torch.arange(rank, count, self.size) for rank in range(self.size)]
        mine = shares[self.rank]
        parts = self.gather(function(mine) if len(mine) else {})
        order = torch.cat([share for share, part in zip(shares, parts, strict=True) if part]).argsort()
        names = next(part for part in parts if part)
        return {name: torch.cat([part[name] for part in parts if part])[order] for name in names}

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Add up every rank's gradients, in place; a parameter without one on any rank is left alone."""
        if self.size == 1:
            return
        from accelerate.utils import reduce

        used = [any(flags) for flags in zip(*self.gather([p.grad is not None for p in parameters]), strict=True)]
        parameters = [parameter for parameter, flag in zip(parameters, used, strict=True) if flag]
        if not parameters:  # a rollout of which no step is trained
            return
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        flat = torch.cat([p.grad.reshape(-1) for p in parameters if p.grad is not None])  # all of them have one now
        with _together():
            flat = reduce(flat, reduction="sum")
        for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = part.reshape(parameter.shape)

    def sum_metrics(self, metrics: dict[str, float]) -> dict[str, float]:
        """Add up every rank's shares of metrics that are divided by global counts already."""
        parts = self.gather(metrics)
        return {name: sum(part.get(name, 0.0) for part in parts) for name in {n: None for part in parts for n in part}}

    def refuse_coupled(self, coupling: str) -> None:
        """Raise `InputError` for an objective that couples the whole batch, which cannot be cut between ranks."""
        if self.size > 1 and coupling == "batch":
            raise InputError(
                f"A method that couples all rows of a batch must run on a single rank, got {self.size} ranks."
            )
