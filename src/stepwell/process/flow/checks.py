"""What a flow is made of, checked where it is given: shapes, conditions, and what the user's own functions return."""

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
        raise InputError(f"The shape of one sample is {shape!r}; sizes such as (2,) or (3, 64, 64) are right.")
    return sizes


def check_dtype(dtype: Any) -> None:
    """Raise `InputError` for states of another kind than floating point numbers."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise InputError(f"A flow's dtype is {dtype!r}; a floating one such as torch.float32 is right.")


def check_unconditional(unconditional: Any, encode: Any) -> None:
    """Raise `InputError` unless it is a condition of one row, for a flow that is told of prompts."""
    if unconditional is None:
        return
    if encode is None:
        raise InputError("`unconditional` takes the place of what `encode` tells of a prompt; give `encode` as well.")
    if not isinstance(unconditional, Mapping):
        raise InputError(
            f"`unconditional` is a {type(unconditional).__name__}; a dictionary of tensors with one row is right."
        )
    for name, value in unconditional.items():
        if not isinstance(value, Tensor) or value.dim() == 0 or len(value) != 1:
            raise InputError(f"`unconditional` has {described(value)} as its '{name}'; a tensor with one row is right.")


def check_condition(entries: Any, prompts: int, unconditional: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """What `encode` gave for so many prompts; raises `InputError` unless it is tensors by name, one row a prompt."""
    if not isinstance(entries, Mapping):
        raise InputError(f"encode gave {described(entries)}; a dictionary of tensors, one row a prompt, is right.")
    for name, value in entries.items():
        if not isinstance(value, Tensor) or value.dim() == 0 or len(value) != prompts:
            raise InputError(
                f"encode gave {described(value)} as '{name}' for {prompts} prompts; a tensor with one row a prompt is "
                "right."
            )
    if unconditional is not None and unconditional.keys() != entries.keys():
        raise InputError(
            f"encode gives {', '.join(map(str, entries)) or 'nothing'} and `unconditional` has "
            f"{', '.join(map(str, unconditional)) or 'nothing'}; the same names are right."
        )
    return dict(entries)


def check_prediction(prediction: Any, x: Tensor, learns: bool) -> Tensor:
    """What the network returned for states x (N, *D), in their number format.

    Raises `InputError` for anything but floating point numbers of the same shape, and where gradients are asked for
    of parameters that can learn (`learns`) but none can pass.
    """
    if not isinstance(prediction, Tensor) or prediction.shape != x.shape:
        found = tuple(prediction.shape) if isinstance(prediction, Tensor) else type(prediction).__name__
        raise InputError(f"The network returned {found} for states of {tuple(x.shape)}; the same shape is right.")
    if not prediction.is_floating_point():
        raise InputError(f"The network returned numbers of type {prediction.dtype}; floating point ones are right.")
    if learns and not prediction.requires_grad:
        raise InputError(
            "The network's prediction carries no gradient, so its parameters cannot learn; it runs under "
            "torch.no_grad, or detaches what it returns."
        )
    return prediction.to(x.dtype)


def check_decoded(decoded: Any, count: int) -> Tensor:
    """What `decode` gave for so many states; raises `InputError` unless it is a tensor with one row a state."""
    if not isinstance(decoded, Tensor) or decoded.dim() == 0 or len(decoded) != count:
        raise InputError(
            f"The flow's decode gave {described(decoded)} for {count} states; a tensor with one row a state is right."
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
            f"A flow's function is called as f(x, t, **condition), and without `encode` as f(x, t); this one takes "
            f"{signature}."
        ) from None


def whole_numbers(name: str) -> Callable[[Sequence[Any]], dict[str, Tensor]]:
    """An `encode` for prompts that are whole numbers, handed to the network under a name."""

    def encode(prompts: Sequence[Any]) -> dict[str, Tensor]:
        for prompt in prompts:
            if not isinstance(prompt, int) or isinstance(prompt, bool):
                raise InputError(f"The prompt {prompt!r} is no whole number, which this flow takes as its '{name}'.")
        return {name: torch.tensor(prompts, dtype=torch.long)}

    return encode


def described(value: Any) -> str:
    """A value as an error names it."""
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
