"""From a model's logits to the distribution that tokens are drawn from: temperature, then top-k, top-p and min-p."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from stepwell.errors import InputError


@dataclass(frozen=True)
class Truncation:
    """Temperature, then top-k, top-p and min-p, in this order and each as the warper of `transformers` defines it.

    With scores s = logits / temperature over V tokens, each rule sees what the one before it left:

    top_k   the tokens whose score is at least the k-th largest (ties stay); 0 switches it off
    top_p   the fewest tokens, from the most probable down, whose probability reaches p; 1 switches it off
    min_p   the tokens at least min_p times as probable as the most probable one; 0 switches it off

    `absent` (K,): ids without a token, whose probability is 0 before any rule; None where all have one.

    Raises `InputError` where a number is out of its range. Sources: Fan et al. 2018 (top-k), Holtzman et al. 2020
    (top-p), Nguyen et al. 2024 (min-p).
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    absent: Tensor | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 0.0 < self.temperature < float("inf"):
            raise InputError(f"temperature must be a finite number above 0, got {self.temperature}.")
        if not isinstance(self.top_k, int) or self.top_k < 0:
            raise InputError(f"top_k must be a whole number from 0 (off) upwards, got {self.top_k!r}.")
        if not 0.0 < self.top_p <= 1.0:
            raise InputError(f"top_p must be above 0 and at most 1 (off), got {self.top_p}.")
        if not 0.0 <= self.min_p <= 1.0:
            raise InputError(f"min_p must be from 0 (off) to 1, got {self.min_p}.")

    @property
    def active(self) -> bool:
        """True if some token may be left out."""
        return self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0

    def dropped(self, scores: Tensor, action: Tensor | None = None) -> Tensor | None:
        """(M, V) bool: the tokens of probability 0, or None where nothing is truncated.

        `scores` (M, V) are logits over temperature. `action` (M,) is always kept: after an update the rule may no
        longer choose it, and its log-probability has to stay finite. No gradient passes through the choice.
        """
        if not self.active:
            return None
        scores = scores.detach()
        out = torch.zeros_like(scores, dtype=torch.bool)
        if self.top_k:
            least = scores.topk(min(int(self.top_k), scores.shape[-1]), dim=-1).values[:, -1:]
            out = scores < least
        if self.top_p < 1.0:
            ascending, order = scores.masked_fill(out, -torch.inf).sort(dim=-1)
            tail = ascending.softmax(-1).cumsum(-1) <= 1.0 - self.top_p
            tail[:, -1] = False
            out = tail.scatter(-1, order, tail)
        if self.min_p > 0.0:
            probabilities = scores.masked_fill(out, -torch.inf).softmax(-1)
            out = out | (probabilities < self.min_p * probabilities.amax(-1, keepdim=True))
        return out if action is None else out.scatter(-1, action[:, None], False)

    def log_probs(self, logits: Tensor, action: Tensor | None = None) -> Tensor:
        """(M, V) log-probabilities of the distribution that tokens are drawn from; minus infinity for dropped ones.

        `action` (M,) is never dropped. Computed in float32, or float64 where `logits` are; differentiable.
        """
        scores = self._present(in_full(logits) / self.temperature)
        out = self.dropped(scores, action)
        return (scores if out is None else scores.masked_fill(out, -torch.inf)).log_softmax(-1)

    def whole(self, logits: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
        """log q (M, V), the distribution at temperature before any rule, and log q - log r, with r of `others` (M, V).

        The difference is 0 for ids without a token, which neither ever draws.
        """
        log_q, log_r = (self._present(x / self.temperature).log_softmax(-1) for x in (logits, others))
        gap = log_q - log_r
        return log_q, gap if self.absent is None else gap.index_fill_(-1, self.absent.to(gap.device), 0.0)

    def _present(self, scores: Tensor) -> Tensor:
        """The scores, changed in place: minus infinity for ids without a token."""
        return scores if self.absent is None else scores.index_fill_(-1, self.absent.to(scores.device), -torch.inf)


def in_full(values: Tensor) -> Tensor:
    """float32, or float64 where it is that already: a softmax in half precision loses what a ratio needs."""
    return values if values.dtype == torch.float64 else values.float()
