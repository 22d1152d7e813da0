"""Flows and diffusions as a process: noise first, then one denoising step after another, by any solver's table."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any, Protocol, Self, runtime_checkable

import torch
from torch import Tensor, nn

from stepwell.columns import Columns
from stepwell.distributions import Gaussian, Point
from stepwell.errors import InputError, MissingAbility, StepwellError
from stepwell.meter import Meter
from stepwell.process.base import Process, Samples, Scores, check_needs
from stepwell.process.flow.checks import check_guidance, check_states
from stepwell.process.flow.denoiser import Decode, Denoiser, Encode
from stepwell.process.flow.sampler import SamplerSettings, sampler_with
from stepwell.process.flow.score import scores
from stepwell.process.flow.state import FlowState
from stepwell.rng import Rng
from stepwell.solver.path import Path
from stepwell.solver.restart import renoised
from stepwell.solver.schedule import Schedule
from stepwell.trajectories import Trajectories
from stepwell.writing import describe


class Flow(Process):
    """A generator that denoises: a velocity, noise or data prediction, drawn from by a table over a grid of times.

    A trajectory has 1 + n steps. Action 0 is the noise that the row starts from, which no parameter has a part in;
    action k is the state at `sampler.times[k]`. Stochastic steps are exactly Gaussian, deterministic ones are points
    and are never trained. Built by `stepwell.flow`.
    """

    kind = "flow"
    offers = frozenset({"entropy", "kl", "mean", "deviation", "step_size", "forward", "denoised", "sample", "pinned"})
    free_steps = 1  # the noise
    work = "latents"

    def __init__(self, denoiser: Denoiser, sampler: SamplerSettings):
        check_guidance(sampler.guidance, denoiser.unconditional)
        self.denoiser, self.sampler = denoiser, sampler

    @property
    def module(self) -> nn.Module:
        """The network."""
        return self.denoiser.network

    @module.setter
    def module(self, network: nn.Module) -> None:
        self.denoiser = replace(self.denoiser, network=network)

    @property
    def meter(self) -> Meter:
        return self.denoiser.meter

    @meter.setter
    def meter(self, meter: Meter) -> None:
        self.denoiser = replace(self.denoiser, meter=meter)

    @property
    def shape(self) -> tuple[int, ...]:
        """The sizes of one state."""
        return self.denoiser.shape

    @property
    def path(self) -> Path:
        return self.denoiser.path

    @property
    def predicts(self) -> str:
        """The kind of the network's prediction: velocity, noise, data or score."""
        return self.denoiser.predicts

    @property
    def encode(self) -> Encode | None:
        return self.denoiser.encode

    @property
    def decode(self) -> Decode | None:
        return self.denoiser.decode

    @property
    def dtype(self) -> torch.dtype:
        """The number format of states."""
        return self.denoiser.dtype

    @property
    def device(self) -> torch.device:
        return self.denoiser.device

    @property
    def horizon(self) -> int:
        """The steps of a row, its noise included."""
        return len(self.sampler.times)

    # drawing

    def start(self, prompts: Sequence[Any], rng: Rng) -> FlowState:
        """One row a prompt, before its noise is drawn."""
        x = torch.zeros(len(prompts), *self.shape, dtype=self.dtype, device=self.device)
        return FlowState(x, 0, self.horizon - 1, self._condition_here(prompts))

    def propose(self, state: FlowState) -> Gaussian | Point:
        """The distribution of each row's next state: the starting noise, then the step of the sampler's table."""
        return self._propose(state, self.sampler.schedule)

    def deterministic(self, state: FlowState) -> Gaussian | Point:
        """The step without its noise; the noise that a row starts from is drawn all the same."""
        return self._propose(state, self.sampler.deterministic)

    def advance(self, state: FlowState, action: Tensor, rng: Rng) -> FlowState:
        """Every row at its next state; a solver that remembers goes on with the network's prediction at the last."""
        if state.over:
            return state
        history = None
        if state.step and self.sampler.remembers:
            if not state.following:
                self.propose(state)
            history = state.following[0]
        x = action.to(self.device, self.dtype)
        return replace(state, x=x, step=state.step + 1, history=history, following=[])

    @torch.no_grad()
    def finish(self, state: FlowState) -> Samples:
        """The decoded samples, one tensor a row; a row that was cut short ends as the data predicted there."""
        return self._samples(state.x if state.step == 0 else self.data_prediction(state, state.x))

    def _propose(self, state: FlowState, schedule: Schedule) -> Gaussian | Point:
        times, x = self.sampler.times, state.x
        if state.step == 0:
            scale = math.hypot(self.path.alpha(times[0]), self.path.sigma(times[0]))  # for data of variance one
            return Gaussian(x, x.new_tensor(scale), trained=False)
        if state.over:
            return Point(x)
        predict = self.denoiser.predictor(state.condition, self.sampler.guidance)
        with torch.no_grad():
            distribution, history = schedule.propose(
                predict, x, state.step - 1, self.path, state.history, output=self.predicts
            )
        state.following[:] = [history] if self.sampler.remembers else []
        return distribution

    def _condition_here(self, prompts: Sequence[Any]) -> Columns | None:
        condition = self.condition(prompts)
        return None if condition is None else condition.to(self.device)

    def _samples(self, x: Tensor) -> Samples:
        return Samples(list(self.decoded(x).cpu().unbind(0)))

    # looking ahead and going back

    def data_prediction(self, state: FlowState, x: Tensor) -> Tensor:
        """The data (N, *D) that the network expects at states x (N, *D) put in the state's place, differentiable in x.

        Raises `InputError` for a state whose noise was not drawn yet.
        """
        if state.step == 0:
            raise InputError("There is no data to predict before the noise that a row starts from is drawn.")
        if state.over:
            return x
        time = self.sampler.times[state.step - 1]
        raw = self.denoiser.predict(x, x.new_full((len(x),), time), state.condition, self.sampler.guidance)
        return self.denoiser.convert(raw, x, time, "data")

    @torch.no_grad()
    def look_ahead(self, state: FlowState) -> Samples:
        """The decoded data predictions, one tensor a row: one evaluation a row, two with guidance, none at the end.

        Raises `InputError` for a state whose noise was not drawn yet.
        """
        return self._samples(self.data_prediction(state, state.x))

    def start_at(self, prompts: Sequence[Any], data: Tensor, step: int, rng: Rng) -> FlowState:
        """Data (N, *D), one row a prompt, noised to the time after `step` steps: x = alpha data + sigma e.

        SDEdit (Meng et al. 2021, arXiv 2108.01073). Data are states (latents, where samples are decoded). Step 1 is
        the noisiest, at the first time of the grid. Raises `InputError` for data of another shape, and for a step
        that is not between the noise and the end.
        """
        if not 1 <= step < self.horizon:
            raise InputError(f"step must be at least 1 and less than the {self.horizon} steps of a row, got {step}.")
        x = check_states(data, len(prompts), self.shape).to(self.device, self.dtype)
        return self.renoise(FlowState(x, self.horizon, self.horizon - 1, self._condition_here(prompts)), step, rng)

    def renoise(self, state: FlowState, step: int, rng: Rng) -> FlowState:
        """The states after `step` steps, an earlier number, by the forward process from where they are.

        x_s = a x_t + b e with a = alpha_s / alpha_t and b^2 = sigma_s^2 - a^2 sigma_t^2, s the earlier time (nearer
        to noise): if x_t has the forward process's distribution, so has x_s. A solver that remembers begins anew
        there. Raises `InputError` for a step that is not earlier, and for 0, which is before the noise (`start`).
        """
        if not 1 <= step < state.step:
            raise InputError(f"step must be at least 1 and less than the {state.step} taken so far, got {step}.")
        time, earlier = self.sampler.times[state.step - 1], self.sampler.times[step - 1]
        x = renoised(self.path, state.x, time, earlier).sample(rng)
        return replace(state, x=x, step=step, history=None, following=[])

    # scoring

    def condition(self, prompts: Sequence[Any]) -> Columns | None:
        """The conditioning of each prompt, (N, ...) tensors by name; None for an unconditional flow."""
        return self.denoiser.condition(prompts)

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
        return scores(self.denoiser, self.sampler, trajectories, needs, context, reference)

    def predict(self, x: Tensor, time: Tensor, condition: Columns | None, guidance: float = 1.0) -> Tensor:
        """The network's prediction at x (N, *D) and time (N,), with classifier-free guidance (`Denoiser.predict`)."""
        return self.denoiser.predict(x, time, condition, guidance)

    def decoded(self, x: Tensor) -> Tensor:
        """Final states (N, *D) as users and rewards see them: images, or the states themselves; differentiable."""
        return self.denoiser.decoded(x)

    # other processes made from this one

    def with_sampler(self, **settings: Any) -> Self:
        """A twin on the same network and meter, drawn from otherwise (settings: `flow.sampler.SETTINGS`)."""
        sampler = sampler_with(self.sampler, self.path, settings)
        check_guidance(sampler.guidance, self.denoiser.unconditional)
        twin = copy.copy(self)
        twin.sampler = sampler
        return twin

    def frozen(self) -> Self:
        """A twin that cannot learn, on the same meter: a copy, or the network's own (an adapted one's base)."""
        twin = copy.copy(self)
        twin.denoiser = self.denoiser.frozen()
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

    def describe(self) -> dict[str, Any]:
        """The denoiser (`Denoiser.describe`), and the sampler: its solvers, times and guidance."""
        solvers = [*dict.fromkeys(describe(table) for table in self.sampler.tables)]
        sampler = {"solver": solvers, "times": list(self.sampler.times), "guidance": self.sampler.guidance}
        return {**self.denoiser.describe(), **sampler}

    def save(self, folder: str | os.PathLike[str], merged: bool | None = None) -> None:
        """The network's weights as safetensors, or the folder that the network itself writes.

        An adapted pipeline writes its adapter alone, and with `merged=True` the whole pipeline.
        """
        if isinstance(self.module, WritesFolder):
            self.module.save(folder, merged)
        else:
            super().save(folder, merged)


@runtime_checkable
class ChecksPrompts(Protocol):
    """An encoder that can tell without running whether it can read a prompt."""

    def check(self, prompt: Any) -> None:
        """Raise `InputError` for a prompt that it cannot read."""
        ...


@runtime_checkable
class WritesFolder(Protocol):
    """A network that writes a whole folder, as `diffusers` reads it."""

    def save(self, folder: str | os.PathLike[str], merged: bool | None = None) -> None: ...
