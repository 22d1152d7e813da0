"""Log-probability, entropy, ... of each step from hidden states, never holding all logits at once."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stepwell.process.language.truncation import Truncation, in_full

STATISTICS = ("log_prob", "entropy", "sum_of_squares", "kl")
"""The scores that are computed chunk by chunk: one number a step."""


@dataclass(frozen=True)
class Head:
    """From hidden states to logits: y = cap tanh(scale (W h + b) / cap), without the tanh where cap is None."""

    weight: Tensor  # (V, D)
    bias: Tensor | None = None  # (V,)
    scale: float = 1.0
    cap: float | None = None

    def __call__(self, hidden: Tensor) -> Tensor:
        """(M, V) logits, in full precision, from (M, D)."""
        logits = in_full(nn.functional.linear(hidden, self.weight, self.bias)) * self.scale
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)

    def slope(self, logits: Tensor) -> Tensor | float:
        """dy / d(W h + b), elementwise, from y."""
        return self.scale if self.cap is None else self.scale * (1.0 - (logits / self.cap) ** 2)


def head_of(model: Any) -> Head | None:
    """The output head of a causal language model of `transformers`, or None if it is of an unknown kind.

    Gemma caps its logits (`final_logit_softcapping`), Granite divides them (`logits_scaling`), Cohere multiplies
    them (`logit_scale`). Any head but a plain linear layer, an adapted one included, is left to the model itself.
    """
    layer = model.get_output_embeddings()
    if type(layer) is not nn.Linear:
        return None
    config = model.config.get_text_config()
    cap = getattr(config, "final_logit_softcapping", None)
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    return Head(layer.weight, layer.bias, scale, None if cap is None else float(cap))


def statistics(
    logits: Tensor,
    action: Tensor,
    truncation: Truncation,
    needs: Collection[str],
    reference_logits: Tensor | None = None,
) -> dict[str, Tensor]:
    """`log_prob` (M,) of `action` (M,) from `logits` (M, V), and the needed ones of `STATISTICS`; differentiable.

    They are of the truncated distribution, `action` kept, except for `kl`: there both have the temperature and no
    truncation, because truncated distributions with different supports are infinitely far apart.
    """
    log_p = truncation.log_probs(logits, action)
    values = {"log_prob": log_p.gather(-1, action[:, None])[:, 0]}
    if "entropy" in needs:
        values["entropy"] = -(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0.0)).sum(-1)
    if "sum_of_squares" in needs:
        values["sum_of_squares"] = log_p.exp().square().sum(-1)
    if "kl" in needs:
        assert reference_logits is not None
        log_q, gap = truncation.whole(logits, reference_logits)
        values["kl"] = (log_q.exp() * gap).sum(-1)
    return values


@dataclass(frozen=True)
class _Task:
    """The settings that all chunks share."""

    truncation: Truncation
    needs: tuple[str, ...]  # of STATISTICS, in their order, log_prob first
    chunk: int
    scale: float
    cap: float | None
    reference: Head | None


def chunked_statistics(
    hidden: Tensor,
    action: Tensor,
    head: Head,
    truncation: Truncation,
    needs: Collection[str],
    chunk: int,
    reference: tuple[Tensor, Head] | None = None,
) -> dict[str, Tensor]:
    """`statistics` of `head(hidden)`, for (M, D) hidden states, `chunk` steps at a time.

    No more than a few (chunk, V) tensors are ever alive, forward or backward: the backward pass computes each chunk's
    logits anew. Gradients reach `hidden` and the head's weight and bias. `reference` is the hidden states and the
    head that `kl` is measured from; they are constants.
    """
    names = tuple(name for name in STATISTICS if name == "log_prob" or name in needs)
    reference_hidden, reference_head = (None, None) if reference is None else reference
    task = _Task(truncation, names, chunk, head.scale, head.cap, reference_head)
    values = _ChunkedStatistics.apply(hidden, head.weight, head.bias, action, reference_hidden, task)
    return dict(zip(names, values, strict=True))


class _ChunkedStatistics(torch.autograd.Function):
    """The statistics of one head, chunk by chunk, with the gradient written out by hand.

    With p the truncated distribution, l = log p, z the scores before the softmax, q and r the distributions of `kl`:

        d log p(a) / dz = 1[a] - p               d H / dz = -p (l + H)
        d S / dz        = 2 p (p - S)            d KL / dz = q (log q - log r - KL)
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        action: Tensor,
        reference_hidden: Tensor | None,
        task: _Task,
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(hidden, weight, bias, action, reference_hidden)
        ctx.task = task
        head = Head(weight, bias, task.scale, task.cap)
        dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        values = {name: torch.empty(len(hidden), dtype=dtype, device=hidden.device) for name in task.needs}
        for start in range(0, len(hidden), task.chunk):
            chunk = slice(start, start + task.chunk)
            other = None
            if task.reference is not None and reference_hidden is not None:
                other = task.reference(reference_hidden[chunk])
            part = statistics(head(hidden[chunk]), action[chunk], task.truncation, task.needs, other)
            for name in task.needs:
                values[name][chunk] = part[name]
        return tuple(values[name] for name in task.needs)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        hidden, weight, bias, action, reference_hidden = ctx.saved_tensors
        task: _Task = ctx.task
        head = Head(weight, bias, task.scale, task.cap)
        gradients = dict(zip(task.needs, upstream, strict=True))
        to_hidden, to_weight, to_bias = ctx.needs_input_grad[:3]
        # summed over chunks in full precision: half precision would lose the later chunks
        hidden_gradient = torch.empty_like(hidden) if to_hidden else None
        weight_gradient = torch.zeros_like(in_full(weight)) if to_weight else None
        bias_gradient = torch.zeros_like(in_full(bias)) if to_bias else None
        for start in range(0, len(hidden), task.chunk):
            chunk = slice(start, start + task.chunk)
            logits = head(hidden[chunk])
            other = None
            if task.reference is not None and reference_hidden is not None:
                other = task.reference(reference_hidden[chunk])
            part = {name: gradient[chunk, None] for name, gradient in gradients.items()}
            slope = _score_gradient(logits, action[chunk], task.truncation, part, other)
            slope = slope.mul_(head.slope(logits)).div_(task.truncation.temperature)
            if bias_gradient is not None:
                bias_gradient += slope.sum(0)
            slope = slope.to(weight.dtype)
            if hidden_gradient is not None:
                hidden_gradient[chunk] = slope @ weight
            if weight_gradient is None:
                continue
            if weight_gradient.dtype == hidden.dtype:  # adds in place: a product of its own would be (V, D) once more
                weight_gradient.addmm_(slope.T, hidden[chunk])
            else:
                weight_gradient += slope.T @ hidden[chunk]
        return (
            hidden_gradient,
            None if weight_gradient is None else weight_gradient.to(weight.dtype),
            None if bias_gradient is None else bias_gradient.to(bias.dtype),
            None,
            None,
            None,
        )


def _score_gradient(
    logits: Tensor, action: Tensor, truncation: Truncation, upstream: dict[str, Tensor], other: Tensor | None
) -> Tensor:
    """(C, V) gradient to the scores of one chunk, from upstream gradients (C, 1) by name."""
    log_p = truncation.log_probs(logits, action)
    p = log_p.exp()
    slope = p * -upstream["log_prob"]
    slope.scatter_add_(1, action[:, None], upstream["log_prob"].to(slope.dtype))
    if "entropy" in upstream:
        finite = log_p.masked_fill(log_p == -torch.inf, 0.0)
        entropy = -(p * finite).sum(-1, keepdim=True)
        slope -= upstream["entropy"] * p * (finite + entropy)
    if "sum_of_squares" in upstream:
        squares = p.square().sum(-1, keepdim=True)
        slope += upstream["sum_of_squares"] * 2.0 * p * (p - squares)
    if "kl" in upstream and other is not None:
        log_q, gap = truncation.whole(logits, other)
        q = log_q.exp()
        slope += upstream["kl"] * q * (gap - (q * gap).sum(-1, keepdim=True))
    return slope
