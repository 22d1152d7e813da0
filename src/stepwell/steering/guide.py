"""Rollouts that are guided by a reward's gradient: each random step's mean is moved towards samples that earn more."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from stepwell.distributions import Distribution, Gaussian
from stepwell.errors import InputError, MissingAbility, RewardError
from stepwell.process.abilities import Denoising, Redrawn, ability
from stepwell.process.base import Process
from stepwell.sampling.request import Prompt, Request

Proposal = Callable[[Distribution, Any, list[Prompt]], Distribution]
JudgeOf = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class RewardGuide:
    """mean' = mean + c grad_x r(D(x)): D(x) is what the network makes of the state x, r a differentiable reward.

    c = q^2 / (2 beta), q the step's deviation, unless `scale` gives a constant. Noise of size g leaves a law p_t alone
    when it comes with the drift (g^2 / 2) grad log p_t. For p_t proportional to q_t exp(r / beta) that is the model's
    own and (g^2 / 2) grad r / beta, which times |dt| is c. It tilts the noise's share only: on Gaussian data with a
    linear reward the law exp(r / beta) / Z itself takes twice that, beta halved. The rows' importance weights are
    exact either way.

    `normalise` divides the gradient by its norm over the whole batch, plus 1e-8; a row's law then depends on the rows
    beside it. `scale=0.1, normalise=True` is what is published: a push that knows neither beta nor the step's size.
    Steps that are not random stay as they are. Source: Euphonium, arXiv 2602.04928, with its first-order gradient, of
    the outcome reward at D(x) instead of a reward model of noisy states.
    """

    scale: float | None = None
    beta: float = 0.1
    normalise: bool = False

    def __post_init__(self) -> None:
        if not self.beta > 0.0:
            raise InputError(f"A guide's beta is {self.beta}; above 0 is right.")
        if self.scale is not None and not self.scale >= 0.0:
            raise InputError(f"A guide's scale is {self.scale}; 0 or more is right, or None for q^2 / (2 beta).")

    def proposal(self, process: Process, judge: JudgeOf) -> Proposal:
        """A `Request.proposal` for this process; `judge` maps samples (M, ...) and prompt ids (M,) to rewards (M,).

        Raises `MissingAbility` for a process that predicts no data, or whose random steps are not Gaussian.
        """
        flow = ability(process, Denoising, "A rollout guided by a reward")

        def propose(law: Distribution, state: Any, prompts: list[Prompt]) -> Distribution:
            if not bool(law.random.any()) or self.scale == 0.0:
                return law
            if not isinstance(law, Gaussian):
                raise MissingAbility(f"A reward's gradient guides Gaussian steps; a {type(law).__name__} is none.")
            with torch.enable_grad():
                x = state.x.detach().requires_grad_()
                samples = flow.decoded(flow.data_prediction(state, x))
                ids = torch.tensor([prompt.id for prompt in prompts], device=x.device)
                (gradient,) = torch.autograd.grad(judge(samples, ids).sum(), x, allow_unused=True)
            if gradient is None:
                raise RewardError("The reward does not depend on the samples, so that it cannot guide their rollout.")
            if not bool(torch.isfinite(gradient).all()):
                raise RewardError(
                    "The reward's gradient, which guides the rollout, has values that are NaN or infinite."
                )
            if self.normalise:
                gradient = gradient / (gradient.norm() + 1e-8)
            strength = law.standard_deviation**2 / (2.0 * self.beta) if self.scale is None else self.scale
            return Gaussian(law.mean + strength * gradient.to(law.mean.dtype), law.standard_deviation, law.trained)

        return propose

    def applied(self, requests: Sequence[Request], process: Process, judge: JudgeOf) -> list[Request]:
        """The requests, guided; those with a law of their own by what the process predicts under it.

        Raises `InputError` for a request that has a proposal already.
        """
        made: dict[Mapping[str, Any] | None, Proposal] = {}
        for request in requests:
            if request.proposal is not None:
                raise InputError(f"A request for prompt {request.prompt.id} has a proposal, and cannot be guided too.")
            if request.sampler not in made:
                twin = process
                if request.sampler is not None:
                    twin = ability(process, Redrawn, "A request with a sampler of its own").with_sampler(
                        **request.sampler
                    )
                made[request.sampler] = self.proposal(twin, judge)
        return [replace(request, proposal=made[request.sampler]) for request in requests]
