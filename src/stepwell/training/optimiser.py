"""The optimiser of a run: AdamW, whose steps on parameters in half precision are made on float32 masters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stepwell.training.settings import Settings

HALF = (torch.bfloat16, torch.float16)
"""The number formats whose spacing is wider than usual steps: 2^-8 of a parameter in bfloat16, 2^-11 in float16."""

MASTER = "master"


class MasterAdamW(torch.optim.AdamW):
    """AdamW (Loshchilov and Hutter 2019) with float32 masters for parameters in half precision.

    A step of 1e-6 on a parameter of 0.02 in bfloat16 is rounded away. So gradients are added up, moments are kept,
    weights decay and steps are made in float32, on a master; the parameter is its rounding (Micikevicius et al. 2018,
    section 3.1). The masters are part of `state_dict`. Every other parameter is its own master.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], **options: Any):
        parameters = list(parameters)
        masters = [nn.Parameter(p.detach().float(), requires_grad=False) if p.dtype in HALF else p for p in parameters]
        self._rounded = [(place, p) for place, p in enumerate(parameters) if p.dtype in HALF]
        super().__init__(masters, **options)

    @property
    def masters(self) -> list[nn.Parameter]:
        """The tensors that steps are made on, one a parameter in the order given."""
        return [master for group in self.param_groups for master in group["params"]]

    def _pairs(self) -> Iterable[tuple[nn.Parameter, nn.Parameter]]:
        """The parameters in half precision, each with its master."""
        masters = self.masters
        return ((parameter, masters[place]) for place, parameter in self._rounded)

    @torch.no_grad()
    def gather(self) -> None:
        """Add the gradients of parameters in half precision to their masters', and drop them."""
        for parameter, master in self._pairs():
            if parameter.grad is None:
                continue
            if master.grad is None:
                master.grad = parameter.grad.float()
            else:
                master.grad += parameter.grad
            parameter.grad = None

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients, or make those of parameters that have stepped zero."""
        super().zero_grad(set_to_none)
        for parameter, master in self._pairs():
            keeps = not set_to_none and bool(self.state.get(master))
            parameter.grad, master.grad = None, torch.zeros_like(master) if keeps else None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Move the masters and round the parameters; uses up the gradients of those in half precision."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.gather()
        super().step()
        for parameter, master in self._pairs():
            if master.grad is not None:
                parameter.copy_(master)
                master.grad = None
        return loss

    def state_dict(self) -> dict[str, Any]:
        """torch's, with the `master` of every parameter in half precision beside its moments."""
        whole = super().state_dict()
        state, masters = dict(whole["state"]), self.masters
        for place, _ in self._rounded:
            state[place] = {**state.get(place, {}), MASTER: masters[place].detach()}
        return {**whole, "state": state}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put masters and moments back. A master that is not in the state is the parameter as it now is."""
        state = {place: dict(entry) for place, entry in state_dict["state"].items()}
        for (place, _), (parameter, master) in zip(self._rounded, self._pairs(), strict=True):
            master.copy_(state.get(place, {}).pop(MASTER, parameter))
        super().load_state_dict({**state_dict, "state": {place: entry for place, entry in state.items() if entry}})


def make_optimiser(parameters: Sequence[nn.Parameter], settings: Settings) -> MasterAdamW:
    """The optimiser of a run for the parameters that learn, at the learning rate and weight decay of its settings."""
    return MasterAdamW(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay)


def is_half(tensors: Iterable[Tensor]) -> bool:
    """True where one of them is in half precision."""
    return any(tensor.dtype in HALF for tensor in tensors)
