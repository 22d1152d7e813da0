"""Norms and perceptrons of a model, compiled: updates keep fewer numbers for the backward pass, and get the same ones.

Plain, these parts keep every number in between; compiled, they keep the expensive ones and compute the rest again.
Only parts that see one token at a time are compiled. Attention, whose inputs change their shapes from call to call,
is not: so one piece of code serves all layers and any number of tokens.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from stepwell.guarded import first_line_of
from stepwell.process.language.attention import near

T = TypeVar("T")


class Compiled:
    """Runs a model with its parts compiled, once they have given the numbers and gradients of the plain ones.

    They are tried on the first scores and on the first that have gradients. If compiling fails, then or later, or
    gives other numbers, there is one warning, and the model runs without it from then on.
    """

    def __init__(self) -> None:
        self.agrees: dict[str, bool] = {}  # by use of the numbers, "score" or "learn"

    def run(self, model: nn.Module, work: Callable[[], T], trial: Callable[[], Tensor], tolerance: float) -> T:
        """Return `work()`, with compiled parts if these are right; `trial()` gives numbers to compare them by."""
        if self._agrees(model, trial, tolerance):
            from torch._dynamo.exc import TorchDynamoException  # takes a second to import

            try:
                with compiled(model):
                    return work()
            except TorchDynamoException as error:  # for numbers of tokens, or types, that were not tried
                self._give_up(model, first_line_of(error))
        return work()

    def _agrees(self, model: nn.Module, trial: Callable[[], Tensor], tolerance: float) -> bool:
        use = "learn" if torch.is_grad_enabled() else "score"
        if use not in self.agrees:
            plain = _with_gradients(model, trial())
            try:
                with compiled(model):
                    fast = _with_gradients(model, trial())
                self.agrees[use] = all(near(*pair, tolerance) for pair in zip(fast, plain, strict=True))
                reason = "compiled, it gives other numbers"
            except (RuntimeError, TypeError, ValueError, AttributeError, ImportError, OSError) as error:
                self.agrees[use], reason = False, first_line_of(error)
            if not self.agrees[use]:
                self._give_up(model, reason)
        return self.agrees[use]

    def _give_up(self, model: nn.Module, reason: str) -> None:
        self.agrees |= {"score": False, "learn": False}
        warnings.warn(
            f"{type(model).__name__} is not compiled: {reason}. It runs as it is, which takes more memory.",
            stacklevel=2,
        )


@contextlib.contextmanager
def compiled(model: nn.Module) -> Iterator[None]:
    """Inside, the parts are compiled; outside, the model is the plain one, for copies and for files."""
    parts = [part for _, parts in _layers(model) for part in parts if "forward" not in vars(part)]
    if not parts:
        raise NotImplementedError("it has no layers of a known kind")
    for part in parts:
        part.forward = functools.partial(_in_one_row, _code(type(part).forward), part)
    try:
        yield
    finally:
        for part in parts:
            del part.forward


@functools.cache
def _code(forward: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(forward, dynamic=True)


def _in_one_row(code: Callable[..., Any], part: nn.Module, *values: Tensor) -> Tensor:
    """(N, L, D) from values (N, L, D), all tokens in one row, so that the code is the same for rows and lines."""
    row: Tensor = code(part, *(x.reshape(1, -1, x.shape[-1]) for x in values))
    return row.reshape(*values[0].shape[:-1], row.shape[-1])


def _layers(model: nn.Module) -> list[tuple[nn.Module, list[nn.Module]]]:
    """Every module that holds attention (which has its layer's number), and its other parts with parameters."""
    layers = []
    for module in model.modules():
        children = [] if isinstance(module, nn.ModuleList) else list(module.children())
        parts = [part for part in children if not hasattr(part, "layer_idx") and any(True for _ in part.parameters())]
        if parts and any(hasattr(child, "layer_idx") for child in children):
            layers.append((module, parts))
    return layers


def _with_gradients(model: nn.Module, values: Tensor) -> list[Tensor]:
    """The values and, if they have one, their gradient in the first layer's parameters, which passed through all."""
    learning = [p for layer, _ in _layers(model)[:1] for p in layer.parameters() if p.requires_grad]
    if not values.requires_grad or not learning:
        return [values.detach()]
    slope = torch.linspace(-1, 1, values.numel(), dtype=values.dtype, device=values.device).view_as(values)
    gradients = torch.autograd.grad(values, learning, slope, allow_unused=True, materialize_grads=True)
    return [values.detach(), *gradients]
