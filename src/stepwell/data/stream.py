"""The endless stream of prompts that planners take from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from stepwell.data.rows import PackedPrompts, by_number
from stepwell.errors import CheckpointError, InputError
from stepwell.rng import Rng
from stepwell.sampling.request import Prompt
from stepwell.tensors import Tensor, torch


class PromptStream:
    """Prompts epoch after epoch, each epoch a new random order of them all (`shuffle=False`: their own order).

    `by_id` finds a prompt by its number. The state is the order of the present epoch, the place in it, and the `rng`,
    which should be the stream's own (`rng.split("prompts")`). Raises `InputError` if there is no prompt.

    Example:
        >>> stream = PromptStream([Prompt(i, text) for i, text in enumerate("abc")], Rng(0), shuffle=False)
        >>> [prompt.value for prompt in stream.take(2) + stream.take(2)]
        ['a', 'b', 'c', 'a']
    """

    def __init__(self, prompts: Sequence[Prompt], rng: Rng, shuffle: bool = True):
        if not prompts:
            raise InputError("A stream of prompts needs at least one prompt, got none.")
        self.prompts = prompts if isinstance(prompts, PackedPrompts) else list(prompts)
        self.by_id = by_number(self.prompts)
        self.rng = rng
        self.shuffle = shuffle
        self._order = torch.zeros(0, dtype=torch.long)  # the present epoch
        self._position = 0  # of the next prompt in it

    def __len__(self) -> int:
        """The number of prompts of an epoch."""
        return len(self.prompts)

    def take(self, count: int, weights: Tensor | None = None) -> list[Prompt]:
        """The next `count` prompts, all different unless there are fewer than that.

        An epoch's end may fall inside a take; the new epoch then begins with prompts that the take does not hold
        yet, its order being uniform over all orders that do. With `weights` (one a prompt, non-negative, not all
        zero), the prompts are drawn one after another with probability proportional to weight, without
        replacement (with replacement only if `count` exceeds the number of positive weights), and the epoch stays
        where it is. Raises `InputError` for a count below 1 and for weights that are not such.
        """
        if count < 1:
            raise InputError(f"The number of prompts to take must be at least 1, got {count}.")
        chosen = self._next(count) if weights is None else self._weighted(count, weights)
        return [self.prompts[index] for index in chosen]

    def _next(self, count: int) -> list[int]:
        chosen: list[int] = []
        while len(chosen) < count:
            if self._position == len(self._order):
                repeats = count > len(self)
                self._order = self._new_epoch([] if repeats else chosen, 0 if repeats else count - len(chosen))
                self._position = 0
            part = self._order[self._position : self._position + count - len(chosen)].tolist()
            self._position += len(part)
            chosen += part
        return chosen

    def _new_epoch(self, apart: Sequence[int], first: int) -> Tensor:
        """A uniformly random order among those whose `first` entries are none of `apart`.

        Drawing an order and passing over the entries of `apart` would leave these at the head of the rest, which is not
        uniform.
        """
        everything = torch.arange(len(self))
        if not self.shuffle:
            return everything  # in a fixed order, count <= n neighbours always differ
        if not apart:
            return self._shuffled(everything)
        taken = torch.tensor(apart)
        allowed = self._shuffled(everything[~torch.isin(everything, taken)])
        return torch.cat([allowed[:first], self._shuffled(torch.cat([allowed[first:], taken]))])

    def _shuffled(self, indices: Tensor) -> Tensor:
        return indices[self.rng.permutation(len(indices)).to(indices.device)]

    def _weighted(self, count: int, weights: Tensor) -> list[int]:
        weights = torch.as_tensor(weights, dtype=torch.float64, device=self.rng.device).detach()
        if weights.shape != (len(self),):
            raise InputError(
                f"The weights of prompts must be one for each of the {len(self)} prompts, got a tensor of shape "
                f"{tuple(weights.shape)}."
            )
        usable = bool(weights.isfinite().all()) and bool((weights >= 0).all()) and bool((weights > 0).any())
        if not usable:
            raise InputError(
                f"The weights of prompts must be finite, non-negative and not all zero, got {weights.tolist()!r:.80}."
            )
        if count > int((weights > 0).sum()):
            return self.rng.categorical(weights.expand(count, -1)).tolist()
        return self.rng.without_replacement(weights.log()[None], count)[0].tolist()

    def state_dict(self) -> dict[str, Any]:
        """The place that the stream has reached; after `load_state_dict` the takes go on bit for bit."""
        return {
            "order": self._order,
            "position": self._position,
            "prompts": len(self),
            "shuffle": self.shuffle,
            "rng": self.rng.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`; raises `CheckpointError` for the state of other data or another order."""
        if (state["prompts"], state["shuffle"]) != (len(self), self.shuffle):
            raise CheckpointError(
                f"The saved stream has {state['prompts']} prompts with shuffle={state['shuffle']}, this one has "
                f"{len(self)} with shuffle={self.shuffle}; resume with the data and options of the first run."
            )
        self._order, self._position = state["order"].long(), int(state["position"])
        self.rng.load_state_dict(state["rng"])
