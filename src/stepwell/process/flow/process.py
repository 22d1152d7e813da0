"""Flows and diffusions as a process: noise first, then one denoising step after another, by any solver's table."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, Self, runtime_checkable

import torch
from torch import Tensor, nn

from stepwell.columns import Columns
from stepwell.distributions import Gaussian, Point
from stepwell.errors import InputError, MissingAbility, StepwellError
from stepwell.meter import Meter
from stepwell.process.base import Process, Samples, Scores, check_needs
from stepwell.process.flow.checks import (
    check_arguments,
    check_condition,
    check_decoded,
    check_dtype,
    check_prediction,
    check_shape,
    check_unconditional,
    whole_numbers,
)
from stepwell.process.flow.sampler import SamplerSettings, sampler_with
from stepwell.process.flow.score import scores
from stepwell.rng import Rng
from stepwell.solver.integrate import Predict
from stepwell.solver.path import PREDICTIONS, Path
from stepwell.solver.path import path as path_named
from stepwell.solver.schedule import Past, Schedule
from stepwell.solver.table import Table
from stepwell.trajectories import Trajectories
from stepwell.writing import describe

Encode = Callable[[Sequence[Any]], Mapping[str, Tensor]]
Decode = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class FlowState:
    """Partial samples: x (N, *D) after `step` steps of the trajectory, 0 before the noise was drawn."""

    x: Tensor
    step: int
    last: int
    condition: Columns | None
    past: Past | None = None
    following: list[Past] = field(default_factory=list, compare=False)  # what `propose` has found out, once

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: Tensor) -> FlowState:
        condition = None if self.condition is None else self.condition[index]
        past = None if self.past is None else self.past[index]
        return replace(
            self,
            x=self.x[index],
            condition=condition,
            past=past,
            following=[found[index] for found in self.following],
        )

    @property
    def done(self) -> Tensor:
        return torch.full((len(self.x),), self.step > self.last, device=self.x.device)


class Flow(Process):
    """A generator that denoises: a velocity, noise or data prediction, drawn from by a table over a grid of times.

    A trajectory has 1 + n steps. Action 0 is the noise that the row starts from, which no parameter has a part in;
    action k is the state at `law.times[k]`. Stochastic steps are exactly Gaussian, deterministic ones are points and
    are never trained. Built by `flow`, which see for the arguments.
    """

    kind = "flow"
    offers = frozenset({"entropy", "kl", "mean", "deviation", "step_size", "forward", "denoised", "sample", "pinned"})
    free_steps = 1  # the noise

    def __init__(
        self,
        network: nn.Module,
        shape: Sequence[int],
        path: Path,
        predicts: str,
        law: SamplerSettings,
        *,
        encode: Encode | None = None,
        unconditional: Mapping[str, Tensor] | None = None,
        decode: Decode | None = None,
        states_at_once: int | None = None,
        dtype: torch.dtype | None = None,
    ):
        self.module, self.shape, self.path, self.predicts, self.sampler = network, tuple(shape), path, predicts, law
        self.encode, self.unconditional, self.decode = encode, unconditional, decode
        self.states_at_once, self.learns = states_at_once, True
        first = next(network.parameters(), None)
        own = torch.get_default_dtype() if first is None else first.dtype
        self.dtype = dtype or torch.promote_types(own, torch.float32)
        self.told = own if dtype is None else None  # half precision networks, around states that need more of it
        self.device = torch.device("cpu") if first is None else first.device
        self.meter = Meter()
        if law.guidance != 1.0 and unconditional is None:
            raise InputError("Guidance compares with the unconditional prediction; give `unconditional` to the flow.")

    @property
    def horizon(self) -> int:
        """The steps of a row, its noise included."""
        return len(self.sampler.times)

    # drawing

    def start(self, prompts: Sequence[Any], rng: Rng) -> FlowState:
        """One row a prompt, before its noise is drawn."""
        x = torch.zeros(len(prompts), *self.shape, dtype=self.dtype, device=self.device)
        condition = self.condition(prompts)
        return FlowState(x, 0, self.horizon - 1, None if condition is None else condition.to(self.device))

    def propose(self, state: FlowState) -> Gaussian | Point:
        """The law of each row's next state: the starting noise, then what the law's table says."""
        return self._propose(state, self.sampler.schedule)

    def deterministic(self, state: FlowState) -> Gaussian | Point:
        """The step without its noise; the noise that a row starts from is drawn all the same."""
        return self._propose(state, self.sampler.deterministic)

    def advance(self, state: FlowState, action: Tensor, rng: Rng) -> FlowState:
        """Every row at its next state; solvers that remember are told what the network said of the last one."""
        past = None
        if state.step and self.sampler.remembers:
            if not state.following:
                self.propose(state)
            past = state.following[0]
        return replace(state, x=action.to(self.device, self.dtype), step=state.step + 1, past=past, following=[])

    @torch.no_grad()
    def finish(self, state: FlowState) -> Samples:
        """The decoded samples, one tensor a row; of a row that was cut short, what the network makes of it."""
        x = state.x
        if 0 < state.step <= state.last:
            x = self.data_prediction(state, x)
        return Samples(list(self.decoded(x).cpu().unbind(0)))

    def data_prediction(self, state: FlowState, x: Tensor) -> Tensor:
        """The data (N, *D) that the network expects at states x (N, *D) put in the state's place, differentiable in x.

        Raises `InputError` for a state whose noise was not drawn yet.
        """
        if state.step == 0:
            raise InputError("There is no data to predict before the noise that a row starts from is drawn.")
        if state.step > state.last:
            return x
        time = self.sampler.times[state.step - 1]
        raw = self.predict(x, x.new_full((len(x),), time), state.condition, self.sampler.guidance)
        return self.path.convert(raw, x, time, self.predicts, "data")

    def _propose(self, state: FlowState, schedule: Schedule) -> Gaussian | Point:
        times, x = self.sampler.times, state.x
        if state.step == 0:
            scale = math.hypot(self.path.alpha(times[0]), self.path.sigma(times[0]))  # for data of variance one
            return Gaussian(x, x.new_tensor(scale), trained=False)
        predict = self.predictor(state.condition)
        with torch.no_grad():
            law, past = schedule.propose(predict, x, state.step - 1, self.path, state.past, output=self.predicts)
        state.following[:] = [past] if self.sampler.remembers else []
        return law

    # scoring

    def condition(self, prompts: Sequence[Any]) -> Columns | None:
        """What the network is told of each prompt, one row each; None where it is told nothing."""
        if self.encode is None:
            return None
        entries = check_condition(self.encode(prompts), len(prompts), self.unconditional)
        return Columns(entries, len(prompts))

    def score(
        self,
        trajectories: Trajectories,
        needs: Collection[str] = (),
        context: Columns | None = None,
        reference: Process | None = None,
    ) -> Scores:
        """Log-densities (N, 1 + n) of the trained steps, float64 sums over dimensions, and what else is needed.

        A step is scored once for all rows that share the state before it. Raises `MissingAbility` for a need that is
        not offered, a KL without a `reference`, and for `forward`, `denoised` or `sample` without the points that a
        term draws for them.
        """
        check_needs(self, needs, reference)
        if not isinstance(reference, Flow | None):
            raise MissingAbility(f"A flow's KL is measured from a flow, not from {type(reference).__name__}.")
        return scores(self, trajectories, needs, context, reference)

    def predict(self, x: Tensor, time: Tensor, condition: Columns | None, guidance: float = 1.0) -> Tensor:
        """What the network predicts at x (N, *D) and time (N,); with guidance w, u + w (c - u) of the conditional
        prediction c and the unconditional u, which run as one batch (Ho and Salimans 2022, arXiv 2207.12598)."""
        entries: dict[str, Any] = {} if condition is None else dict(condition.items())
        branches = 1
        if guidance != 1.0:
            assert self.unconditional is not None
            branches = 2
            bare = {n: v.to(x.device).expand(len(x), *v.shape[1:]) for n, v in self.unconditional.items()}
            entries = {name: torch.cat([value, bare[name]]) for name, value in entries.items()}
            x, time = torch.cat([x, x]), torch.cat([time, time])
        self.meter.add(model_evaluations=len(x), forward=len(x))
        if torch.is_grad_enabled():
            self.meter.add(backward=len(x))
        given = (x, time) if self.told is None else (x.to(self.told), time.to(self.told))
        prediction = check_prediction(self.module(*given, **entries), x, self._learning())
        if branches == 2:
            with_prompt, without = prediction.chunk(2)
            return without + guidance * (with_prompt - without)
        return prediction

    def predictor(self, condition: Columns | None) -> Predict:
        """The network as solvers call it, at one time for all rows, with the law's guidance."""
        return lambda x, time: self.predict(x, x.new_full((len(x),), time), condition, self.sampler.guidance)

    def _learning(self) -> bool:
        """Whether gradients are asked for, of parameters that there are."""
        asked = self.learns and torch.is_grad_enabled()
        return asked and any(parameter.requires_grad for parameter in self.module.parameters())

    def decoded(self, x: Tensor) -> Tensor:
        """What the user sees of final states (N, *D): images, or the states themselves."""
        return x if self.decode is None else check_decoded(self.decode(x), len(x))

    # other processes made from this one

    def with_sampler(self, **settings: Any) -> Flow:
        """The same network drawn from otherwise: solver, level, steps, times, shift, guidance, tail (`flow_law`)."""
        twin = copy.copy(self)
        twin.sampler = sampler_with(self.sampler, self.path, settings)
        if twin.sampler.guidance != 1.0 and self.unconditional is None:
            raise InputError("Guidance compares with the unconditional prediction; give `unconditional` to the flow.")
        return twin

    def frozen(self) -> Self:
        """A twin that cannot learn, on the same meter: a copy, or what the network itself says (adapters off)."""
        twin = copy.copy(self)
        if isinstance(self.module, Freezes):
            twin.module = self.module.frozen()
        else:
            twin.module = copy.deepcopy(self.module).requires_grad_(False)
        twin.learns = False
        return twin

    def check_prompt(self, value: Any) -> None:
        """Raise `InputError` for a prompt that `encode` cannot read; a text encoder, which is slow, is not run yet."""
        if self.encode is None:
            return
        if isinstance(self.encode, ChecksPrompts):
            self.encode.check(value)
            return
        try:
            with torch.no_grad():
                self.condition([value])
        except StepwellError:
            raise
        except Exception as error:
            said = " ".join(str(error).split())
            raise InputError(f"The flow's encode cannot read {value!r:.60}: {type(error).__name__}: {said}") from error

    def row_sizes(self, rows: Trajectories) -> Tensor:
        """(N,) states of each row, and the tokens of its prompt where the condition has a mask of them."""
        sizes = rows.length.clone()
        for name, entry in () if rows.condition is None else rows.condition.items():
            if entry.dtype == torch.bool and entry.dim() == 2 and name.endswith("mask"):
                sizes += entry.sum(1)
        return sizes

    def describe(self) -> dict[str, Any]:
        """Path, prediction, and the sampler: its solvers, times and guidance."""
        solvers = [*dict.fromkeys(describe(table) for table in self.sampler.tables)]
        sampler = {"solver": solvers, "times": list(self.sampler.times), "guidance": self.sampler.guidance}
        return {"work": "latents", "path": describe(self.path), "predicts": self.predicts, **sampler}

    def save(self, folder: str | os.PathLike[str]) -> None:
        """The network's weights as safetensors, or the folder that the network itself writes."""
        if isinstance(self.module, WritesFolder):
            self.module.save(folder)
        else:
            super().save(folder)


@runtime_checkable
class ChecksPrompts(Protocol):
    """An encoder that can tell without running whether it can read a prompt."""

    def check(self, prompt: Any) -> None:
        """Raise `InputError` for a prompt that it cannot read."""
        ...


@runtime_checkable
class Freezes(Protocol):
    """A network with a frozen twin of its own: that of an adapted model is its base."""

    def frozen(self) -> nn.Module: ...


@runtime_checkable
class WritesFolder(Protocol):
    """A network that writes a whole folder, as `diffusers` reads it."""

    def save(self, folder: str | os.PathLike[str]) -> None: ...


class Function(nn.Module):
    """A user's function of (x, t, **condition) as a network: t broadcasts against x, and nothing can learn."""

    def __init__(self, function: Callable[..., Tensor]):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor, time: Tensor, **condition: Tensor) -> Tensor:
        return self.function(x, time.reshape(-1, *[1] * (x.dim() - 1)), **condition)


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
    (`stepwell.solver.path`). `predicts` says what it returns: velocity, noise, data or score. Samples are drawn by
    `solver`, a name or a `Table`, in `steps` steps (20), equal in time after the time `shift` (1: none), or at the
    `times` given; or by a `Schedule`, which has its own times. States are at least in float32, or in `dtype`.
    `encode` maps prompts to the condition, a dictionary of tensors with one row a prompt; a name alone hands whole
    numbers over under that name. `guidance` other than 1 is classifier-free, against the condition `unconditional`
    (one row). `decode` maps final states (N, *shape) to what users and rewards see. `states_at_once` bounds how many
    states are scored at a time where no gradient is asked for.

    Raises `InputError` for what is not as it has to be.

    Example:
        >>> target = flow(lambda x, t: x / t, shape=(2,), steps=4)  # all data is at the origin
        >>> from stepwell.sampling.request import Prompt, Request
        >>> from stepwell.sampling.rollout import rollout
        >>> drawn = rollout(target, [Request(Prompt(0, None), 3)], Rng(0))
        >>> drawn.trajectories.mask.shape, bool(drawn.trajectories.action[:, -1].abs().max() < 1e-6)
        (torch.Size([3, 5]), True)
    """
    if predicts not in PREDICTIONS:
        raise InputError(f"A flow predicts {', '.join(PREDICTIONS)}, not '{predicts}'.")
    if isinstance(path, str):
        path = path_named(path)
    if not isinstance(path, Path):
        raise InputError(f"A flow's path is a name or a Path, not {path!r}.")
    if not callable(model):
        raise InputError(f"A flow's model is a function or a torch.nn.Module, not {type(model).__name__}.")
    network = model if isinstance(model, nn.Module) else Function(model)
    if isinstance(encode, str):
        encode = whole_numbers(encode)
    for name, value in (("encode", encode), ("decode", decode)):
        if value is not None and not callable(value):
            raise InputError(f"A flow's {name} is a function, not a {type(value).__name__}.")
    if isinstance(network, Function) and encode is None:
        check_arguments(network.function)
    check_dtype(dtype)
    check_unconditional(unconditional, encode)
    given = {"times": times, "steps": steps, "shift": shift}
    settings: dict[str, Any] = {"solver": solver, "guidance": guidance}
    settings |= {name: value for name, value in given.items() if value is not None}
    if times is None and not isinstance(solver, Schedule):
        settings.setdefault("steps", 20)
    law = sampler_with(None, path, settings)
    return Flow(
        network,
        check_shape(shape),
        path,
        predicts,
        law,
        encode=encode,
        unconditional=unconditional,
        decode=decode,
        states_at_once=states_at_once,
        dtype=dtype,
    )
