"""The parts of a model's layers that see one token at a time, compiled: updates keep fewer numbers, and the same ones.

Norms and perceptrons keep everything in between for the backward pass; compiled, they keep what is expensive and
compute the rest again. Attention, whose caches and lines have ever new shapes, stays as it is: so one piece of code
serves all layers and any number of tokens.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from stepwell.process.language.attention import near

T = TypeVar("T")


class Compiled:
    """Runs a model with its parts compiled, once these were seen to give the numbers and gradients of plain ones.

    It is tried on the first scores and on the first that have gradients. Where compiling fails, then or later, or
    the numbers are others, there is one warning, and the model runs as it is from there on.
    """

    def __init__(self) -> None:
        self.agrees: dict[str, bool] = {}  # by "score" and "learn", what is done with the numbers

    def run(self, model: nn.Module, work: Callable[[], T], trial: Callable[[], Tensor], tolerance: float) -> T:
        """What `work` answers; `trial` gives numbers by which to tell whether the compiled parts are right."""
        if self._agrees(model, trial, tolerance):
            from torch._dynamo.exc import TorchDynamoException  # takes a second to import

            try:
                with compiled(model):
                    return work()
            except TorchDynamoException as error:  # for numbers of tokens, or types, that were not tried
                self._give_up(model, _first_line(error))
        return work()

    def _agrees(self, model: nn.Module, trial: Callable[[], Tensor], tolerance: float) -> bool:
        what = "learn" if torch.is_grad_enabled() else "score"
        if what not in self.agrees:
            plain = _with_gradients(model, trial())
            try:
                with compiled(model):
                    found = _with_gradients(model, trial())
                self.agrees[what] = all(near(*pair, tolerance) for pair in zip(found, plain, strict=True))
                reason = "compiled, it gives other numbers"
            except (RuntimeError, TypeError, ValueError, AttributeError, ImportError, OSError) as error:
                self.agrees[what], reason = False, _first_line(error)
            if not self.agrees[what]:
                self._give_up(model, reason)
        return self.agrees[what]

    def _give_up(self, model: nn.Module, reason: str) -> None:
        self.agrees |= {"score": False, "learn": False}
        warnings.warn(
            f"{type(model).__name__} is not compiled: {reason}. It runs as it is, which takes more memory.",
            stacklevel=2,
        )


@contextlib.contextmanager
def compiled(model: nn.Module) -> Iterator[None]:
    """While it is on, the parts are compiled; outside, the model is the one it always was, for copies and for files."""
    parts = [part for _, parts in _layers(model) for part in parts if "forward" not in vars(part)]
    if not parts:
        raise NotImplementedError("it has no layers of a kind that is known here")
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
    answer: Tensor = code(part, *(x.reshape(1, -1, x.shape[-1]) for x in values))
    return answer.reshape(*values[0].shape[:-1], answer.shape[-1])


def _layers(model: nn.Module) -> list[tuple[nn.Module, list[nn.Module]]]:
    """Every module with attention in it, which knows its layer's number, and the parts with parameters beside that."""
    found = []
    for module in model.modules():
        children = [] if isinstance(module, nn.ModuleList) else list(module.children())
        parts = [part for part in children if not hasattr(part, "layer_idx") and any(True for _ in part.parameters())]
        if parts and any(hasattr(child, "layer_idx") for child in children):
            found.append((module, parts))
    return found


def _with_gradients(model: nn.Module, values: Tensor) -> list[Tensor]:
    """The values and, where they have a gradient, that of the first layer's parameters, which went through them all."""
    learning = [p for layer, _ in _layers(model)[:1] for p in layer.parameters() if p.requires_grad]
    if not values.requires_grad or not learning:
        return [values.detach()]
    slope = torch.linspace(-1, 1, values.numel(), dtype=values.dtype, device=values.device).view_as(values)
    gradients = torch.autograd.grad(values, learning, slope, allow_unused=True, materialize_grads=True)
    return [values.detach(), *gradients]


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(" .:")
