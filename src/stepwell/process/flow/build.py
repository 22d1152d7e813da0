"""`stepwell.flow`: a flow or diffusion model from a network or a function."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stepwell.errors import InputError
from stepwell.process.flow.checks import check_arguments, check_dtype, check_shape, check_unconditional, whole_numbers
from stepwell.process.flow.denoiser import Decode, Denoiser, Encode, Function
from stepwell.process.flow.process import Flow
from stepwell.process.flow.sampler import sampler_with
from stepwell.ranges import checked
from stepwell.solver.path import PREDICTIONS, Path
from stepwell.solver.path import path as path_named
from stepwell.solver.schedule import Schedule
from stepwell.solver.table import Table


@checked(
    *("model", "shape", "path", "solver", "times", "shift", "guidance", "encode", "unconditional", "decode", "dtype")
)
def flow(
    model: Callable[..., Tensor] | nn.Module,
    shape: Sequence[int],
    *,
    path: str | Path = "linear",
    predicts: str = "velocity",
    solver: str | Table | Schedule = "euler",
    steps: int | None = None,
    times: Sequence[float] | None = None,
    shift: float | None = None,
    guidance: float = 1.0,
    encode: Encode | str | None = None,
    unconditional: Mapping[str, Tensor] | None = None,
    decode: Decode | None = None,
    states_at_once: int | None = None,
    dtype: torch.dtype | None = None,
) -> Flow:
    """A flow or diffusion model as a process.

    `model` is called as model(x, t, **condition) with states x (N, *shape): a `torch.nn.Module` gets t (N,), a plain
    function t of shape (N, 1, ...), which broadcasts. t is 1 at noise and 0 at data on every `path`
    (`stepwell.solver.path`). `predicts` is what it returns: velocity, noise, data or score. Samples are drawn by
    `solver`, a name or a `Table`, in `steps` steps (20), equal in time after the time `shift` (1: none), or at the
    `times` given; or by a `Schedule`, which has its own times. States are at least in float32, or in `dtype`.
    `encode` maps prompts to the condition, a dictionary of tensors with one row a prompt; a name alone hands whole
    numbers over under that name. `guidance` other than 1 is classifier-free, against the condition `unconditional`
    (one row). `decode` maps final states (N, *shape) to what users and rewards see. `states_at_once` bounds how many
    states are scored at a time where no gradient is asked for.

    Raises `InputError` for arguments that are wrong or contradict each other.

    Example:
        >>> target = flow(lambda x, t: x / t, shape=(2,), steps=4)  # all data is at the origin
        >>> from stepwell.rng import Rng
        >>> from stepwell.sampling.request import Prompt, Request
        >>> from stepwell.sampling.rollout import rollout
        >>> drawn = rollout(target, [Request(Prompt(0, None), 3)], Rng(0))
        >>> drawn.trajectories.mask.shape, bool(drawn.trajectories.action[:, -1].abs().max() < 1e-6)
        (torch.Size([3, 5]), True)
    """
    if predicts not in PREDICTIONS:
        raise InputError(f"predicts must be one of {', '.join(PREDICTIONS)}, got '{predicts}'.")
    if isinstance(path, str):
        path = path_named(path)
    if not isinstance(path, Path):
        raise InputError(f"path must be a name or a Path, got {path!r}.")
    if not callable(model):
        raise InputError(f"model must be a function or a torch.nn.Module, got a {type(model).__name__}.")
    network = model if isinstance(model, nn.Module) else Function(model)
    if isinstance(encode, str):
        encode = whole_numbers(encode)
    for name, value in (("encode", encode), ("decode", decode)):
        if value is not None and not callable(value):
            raise InputError(f"{name} must be a function, got a {type(value).__name__}.")
    if isinstance(network, Function) and encode is None:
        check_arguments(network.function)
    check_dtype(dtype)
    check_unconditional(unconditional, encode)
    given = {"times": times, "steps": steps, "shift": shift}
    settings: dict[str, Any] = {"solver": solver, "guidance": guidance}
    settings |= {name: value for name, value in given.items() if value is not None}
    if times is None and not isinstance(solver, Schedule):
        settings.setdefault("steps", 20)
    sampler = sampler_with(None, path, settings)
    denoiser = Denoiser.of(
        network,
        check_shape(shape),
        path,
        predicts,
        dtype=dtype,
        encode=encode,
        unconditional=unconditional,
        decode=decode,
        states_at_once=states_at_once,
    )
    return Flow(denoiser, sampler)
