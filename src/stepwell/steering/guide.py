"""Rollouts that are guided by a reward's gradient: the mean of each random step moves towards higher rewards."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

from stepwell.distributions import Distribution, Gaussian
from stepwell.errors import InputError, MissingAbility, RewardError
from stepwell.process.abilities import Denoising, Redrawn, ability
from stepwell.process.base import Process
from stepwell.ranges import Checked, Range, Width
from stepwell.sampling.request import Prompt, Request
from stepwell.tensors import Tensor, torch

Proposal = Callable[[Distribution, Any, list[Prompt]], Distribution]
JudgeOf = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class RewardGuide(Checked):
    """mean' = mean + c grad_x r(D(x)): D(x) is the network's prediction of the data at the state x, r the reward.

    c = q^2 / (2 beta), q the step's standard deviation, unless `scale` gives a constant. Noise of size g leaves a
    distribution p_t as it is when it comes with the drift (g^2 / 2) grad log p_t. For p_t proportional to
    q_t exp(r / beta) that is the model's own drift and (g^2 / 2) grad r / beta, which times |dt| is c grad r. This
    tilts the noise's share only: on Gaussian data with a linear reward the distribution exp(r / beta) / Z itself takes
    twice that, half of beta. The rows' importance weights are exact either way.

    `normalise` divides the gradient by its norm over the whole batch, plus 1e-8; the distribution of a row then depends
    on the rows beside it. Published is `scale=0.1, normalise=True`, which depends on neither beta nor the step's size.
    Steps that are not random stay as they are. Source: Euphonium, arXiv 2602.04928, with its first-order gradient, of
    the outcome reward at D(x) instead of a reward model of noisy states.
    """

    scale: Width | None = None
    beta: Annotated[float, Range("a number above 0", 0, above=True, endless=True)] = 0.1
    normalise: bool = False

    def proposal(self, process: Process, judge: JudgeOf) -> Proposal:
        """A `Request.proposal` for this process; `judge` maps samples (M, ...) and prompt ids (M,) to rewards (M,).

        Raises `MissingAbility` for a process that predicts no data, or whose random steps are not Gaussian.
        """
        flow = ability(process, Denoising, "A rollout guided by a reward")

        def propose(step: Distribution, state: Any, prompts: list[Prompt]) -> Distribution:
            if not bool(step.random.any()) or self.scale == 0.0:
                return step
            if not isinstance(step, Gaussian):
                raise MissingAbility(f"Steps must be Gaussian to be guided by a gradient, got {type(step).__name__}.")
            with torch.enable_grad():
                x = state.x.detach().requires_grad_()
                samples = flow.decoded(flow.data_prediction(state, x))
                ids = torch.tensor([prompt.id for prompt in prompts], device=x.device)
                (gradient,) = torch.autograd.grad(judge(samples, ids).sum(), x, allow_unused=True)
            if gradient is None:
                raise RewardError("The reward does not depend on the samples, so it cannot guide their rollout.")
            if not bool(torch.isfinite(gradient).all()):
                raise RewardError(
                    "The reward's gradient, which guides the rollout, has values that are NaN or infinite."
                )
            if self.normalise:
                gradient = gradient / (gradient.norm() + 1e-8)
            strength = step.standard_deviation**2 / (2.0 * self.beta) if self.scale is None else self.scale
            return Gaussian(step.mean + strength * gradient.to(step.mean.dtype), step.standard_deviation, step.trained)

        return propose

    def applied(self, requests: Sequence[Request], process: Process, judge: JudgeOf) -> list[Request]:
        """The requests, guided; those with a sampler of their own by the process's predictions under it.

        Raises `InputError` for a request that has a proposal already.
        """
        made: dict[Mapping[str, Any] | None, Proposal] = {}
        for request in requests:
            if request.proposal is not None:
                raise InputError(
                    f"Request.proposal must be left out where a guide makes it (prompt {request.prompt.id})."
                )
            if request.sampler not in made:
                twin = process
                if request.sampler is not None:
                    twin = ability(process, Redrawn, "A request with a sampler of its own").with_sampler(
                        **request.sampler
                    )
                made[request.sampler] = self.proposal(twin, judge)
        return [replace(request, proposal=made[request.sampler]) for request in requests]
