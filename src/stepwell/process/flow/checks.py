"""Checks of the parts of a flow where they are given: shapes, conditions, and what the user's functions return."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from stepwell.errors import InputError


def check_shape(shape: Any) -> tuple[int, ...]:
    """The sizes of one sample; raises `InputError` for anything but whole numbers from 1 on."""
    try:
        if isinstance(shape, str):
            raise TypeError
        sizes = tuple(operator.index(size) for size in shape)
    except TypeError:
        sizes = (0,)
    if any(size < 1 for size in sizes):
        raise InputError(f"shape must be the sizes of one sample, such as (2,) or (3, 64, 64), got {shape!r}.")
    return sizes


def check_dtype(dtype: Any) -> None:
    """Raise `InputError` for states of another kind than floating point numbers."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise InputError(f"dtype must be a floating one such as torch.float32, got {dtype!r}.")


def check_unconditional(unconditional: Any, encode: Any) -> None:
    """Raise `InputError` unless it is a condition of one row, for a flow that is conditioned."""
    if unconditional is None:
        return
    if encode is None:
        raise InputError(
            "unconditional takes the place of the condition that `encode` makes of a prompt; give `encode` as well."
        )
    if not isinstance(unconditional, Mapping):
        raise InputError(
            f"unconditional must be a dictionary of tensors with one row, got a {type(unconditional).__name__}."
        )
    for name, value in unconditional.items():
        if not isinstance(value, Tensor) or value.dim() == 0 or len(value) != 1:
            raise InputError(f"unconditional['{name}'] must be a tensor with one row, got {described(value)}.")


def check_guidance(guidance: float, unconditional: Any) -> None:
    """Raise `InputError` for guidance without an unconditional prediction to compare with."""
    if guidance != 1.0 and unconditional is None:
        raise InputError("Guidance compares with the unconditional prediction; give `unconditional` to the flow.")


def check_states(states: Any, rows: int, shape: tuple[int, ...]) -> Tensor:
    """The states themselves; raises `InputError` unless they are a tensor of so many rows of this shape."""
    if not isinstance(states, Tensor) or states.shape != (rows, *shape):
        raise InputError(f"data must be a tensor of shape {(rows, *shape)}, one row a prompt, got {described(states)}.")
    return states


def check_condition(entries: Any, prompts: int, unconditional: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """The condition that `encode` returned; raises `InputError` unless it is tensors by name, one row a prompt."""
    if not isinstance(entries, Mapping):
        raise InputError(f"encode must return a dictionary of tensors, one row a prompt, got {described(entries)}.")
    for name, value in entries.items():
        if not isinstance(value, Tensor) or value.dim() == 0 or len(value) != prompts:
            raise InputError(
                f"encode must return a tensor with one row a prompt as '{name}', got {described(value)} for {prompts} "
                "prompts."
            )
    if unconditional is not None and unconditional.keys() != entries.keys():
        raise InputError(
            f"unconditional must have the names that encode returns, {', '.join(map(str, entries)) or 'none'}, got "
            f"{', '.join(map(str, unconditional)) or 'none'}."
        )
    return dict(entries)


def check_prediction(prediction: Any, x: Tensor, learns: bool) -> Tensor:
    """The network's prediction for states x (N, *D), in their number format.

    Raises `InputError` for anything but floating point numbers of the same shape, and where gradients are asked for
    of parameters that can learn (`learns`) but none can pass.
    """
    if not isinstance(prediction, Tensor) or prediction.shape != x.shape:
        raise InputError(
            f"The network must return a tensor of its states' shape, {tuple(x.shape)}, got {described(prediction)}."
        )
    if not prediction.is_floating_point():
        raise InputError(f"The network must return floating point numbers, got {prediction.dtype}.")
    if learns and not prediction.requires_grad:
        raise InputError(
            "The network's prediction carries no gradient, so its parameters cannot learn; it runs under "
            "torch.no_grad, or detaches what it returns."
        )
    return prediction.to(x.dtype)


def check_decoded(decoded: Any, count: int) -> Tensor:
    """The samples that `decode` returned; raises `InputError` unless they are a tensor with one row a state."""
    if not isinstance(decoded, Tensor) or decoded.dim() == 0 or len(decoded) != count:
        raise InputError(
            f"decode must return a tensor with one row a state, got {described(decoded)} for {count} states."
        )
    return decoded


def check_arguments(function: Callable[..., Any]) -> None:
    """Raise `InputError` unless the function can be called as f(x, t)."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(None, None)
    except TypeError:
        raise InputError(
            f"model must be a function that can be called as f(x, t, **condition), and without `encode` as f(x, t); "
            f"got one that takes {signature}."
        ) from None


def whole_numbers(name: str) -> Callable[[Sequence[Any]], dict[str, Tensor]]:
    """An `encode` for prompts that are whole numbers, handed to the network under a name."""

    def encode(prompts: Sequence[Any]) -> dict[str, Tensor]:
        for prompt in prompts:
            if not isinstance(prompt, int) or isinstance(prompt, bool):
                raise InputError(f"A prompt of this flow must be a whole number, its '{name}', got {prompt!r:.60}.")
        return {name: torch.tensor(prompts, dtype=torch.long)}

    return encode


def described(value: Any) -> str:
    """A value as an error names it."""
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
