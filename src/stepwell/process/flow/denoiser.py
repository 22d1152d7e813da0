"""A network that predicts velocity, noise, data or score, with all that is needed to ask it for a prediction."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from stepwell.columns import Columns
from stepwell.digests import structure_digest, weights_digest
from stepwell.meter import Meter
from stepwell.origin import origin
from stepwell.process.flow.checks import check_condition, check_decoded, check_prediction
from stepwell.solver.integrate import Predict
from stepwell.solver.path import Path
from stepwell.writing import describe

Encode = Callable[[Sequence[Any]], Mapping[str, Tensor]]
Decode = Callable[[Tensor], Tensor]


@runtime_checkable
class Freezes(Protocol):
    """A network with a frozen twin of its own: that of an adapted model is its base."""

    def frozen(self) -> nn.Module: ...


@runtime_checkable
class Described(Protocol):
    """A network, or an end of one, that can say what decides its numbers, besides what learns, as values for JSON."""

    def describe(self) -> dict[str, Any]: ...


class Function(nn.Module):
    """A user's function of (x, t, **condition) as a network: t broadcasts against x, and nothing can learn."""

    def __init__(self, function: Callable[..., Tensor]):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor, time: Tensor, **condition: Tensor) -> Tensor:
        return self.function(x, time.reshape(-1, *[1] * (x.dim() - 1)), **condition)


@dataclass(frozen=True, eq=False)
class Denoiser:
    """A network, the path that it was trained on, what it `predicts` there, and how it is conditioned and metered.

    shape: the sizes of one state. dtype, device: those of states. network_dtype: the format in which states and times
    go to the network, None for their own. encode: prompts -> the condition; None for an unconditional network.
    unconditional: the condition (one row) that guidance compares with. decode: states -> what users and rewards see.
    states_at_once: the most states of a batch where no gradient is asked for. learns: False for a frozen twin.
    Made by `Denoiser.of`.
    """

    network: nn.Module
    shape: tuple[int, ...]
    path: Path
    predicts: str
    dtype: torch.dtype
    device: torch.device
    network_dtype: torch.dtype | None = None
    encode: Encode | None = None
    unconditional: Mapping[str, Tensor] | None = None
    decode: Decode | None = None
    states_at_once: int | None = None
    learns: bool = True
    meter: Meter = field(default_factory=Meter)

    @classmethod
    def of(
        cls,
        network: nn.Module,
        shape: Sequence[int],
        path: Path,
        predicts: str,
        *,
        dtype: torch.dtype | None = None,
        **settings: Any,
    ) -> Denoiser:
        """The denoiser of a network, on the network's device. `settings` are further fields.

        States are in `dtype`; by default in the network's own format, or in float32 around a network in half
        precision, since states need more of it than a network does.
        """
        first = next(network.parameters(), None)
        own = torch.get_default_dtype() if first is None else first.dtype
        device = torch.device("cpu") if first is None else first.device
        states = dtype or torch.promote_types(own, torch.float32)
        handed = own if dtype is None else None
        return cls(network, tuple(shape), path, predicts, states, device, handed, **settings)

    def describe(self) -> dict[str, Any]:
        """All that decides its predictions, conditions and samples besides the network's parameters."""
        bare = self.unconditional
        unconditional = None if bare is None or isinstance(self.encode, Described) else weights_digest(bare)
        ends = {"encode": _made_of(self.encode), "decode": _made_of(self.decode), "unconditional": unconditional}
        states = {"shape": list(self.shape), "states": str(self.dtype)}
        return (
            {"path": describe(self.path), "predicts": self.predicts, "network": _made_of(self.network)} | states | ends
        )

    def condition(self, prompts: Sequence[Any]) -> Columns | None:
        """The conditioning of each prompt, (N, ...) tensors by name; None for an unconditional network."""
        if self.encode is None:
            return None
        return Columns(check_condition(self.encode(prompts), len(prompts), self.unconditional), len(prompts))

    def predict(self, x: Tensor, time: Tensor, condition: Columns | None, guidance: float = 1.0) -> Tensor:
        """The network's prediction at x (N, *D) and time (N,); with guidance w, u + w (c - u) of the conditional
        prediction c and the unconditional u, which run as one batch (Ho and Salimans 2022, arXiv 2207.12598)."""
        entries: dict[str, Any] = {} if condition is None else dict(condition.items())
        guided = guidance != 1.0
        if guided:
            assert self.unconditional is not None
            bare = {n: v.to(x.device).expand(len(x), *v.shape[1:]) for n, v in self.unconditional.items()}
            entries = {name: torch.cat([value, bare[name]]) for name, value in entries.items()}
            x, time = torch.cat([x, x]), torch.cat([time, time])
        self.meter.add(model_evaluations=len(x), forward=len(x))
        if torch.is_grad_enabled():
            self.meter.add(backward=len(x))
        handed = (x, time) if self.network_dtype is None else (x.to(self.network_dtype), time.to(self.network_dtype))
        prediction = check_prediction(self.network(*handed, **entries), x, self._learning())
        if guided:
            conditional, unconditional = prediction.chunk(2)
            return unconditional + guidance * (conditional - unconditional)
        return prediction

    def predict_in_pieces(self, x: Tensor, time: Tensor, condition: Columns | None, guidance: float) -> Tensor:
        """`predict`, at most `states_at_once` states at a time where no gradient is kept."""
        size = self.states_at_once
        if size is None or torch.is_grad_enabled() or len(x) <= size:
            return self.predict(x, time, condition, guidance) if len(x) else x
        pieces = torch.arange(len(x), device=x.device).split(size)
        conditions = [None if condition is None else condition[piece] for piece in pieces]
        each = zip(pieces, conditions, strict=True)
        return torch.cat([self.predict(x[piece], time[piece], part, guidance) for piece, part in each])

    def predictor(self, condition: Columns | None, guidance: float) -> Predict:
        """The network as solvers call it: at one time for all rows."""
        return lambda x, time: self.predict(x, x.new_full((len(x),), time), condition, guidance)

    def convert(self, prediction: Tensor, x: Tensor, time: Any, target: str) -> Tensor:
        """The network's prediction at x and time as one of another kind (`Path.convert`)."""
        return self.path.convert(prediction, x, time, self.predicts, target)

    def decoded(self, x: Tensor) -> Tensor:
        """Final states (N, *D) as users and rewards see them: images, or the states themselves; differentiable."""
        return x if self.decode is None else check_decoded(self.decode(x), len(x))

    def frozen(self) -> Denoiser:
        """A twin that cannot learn, on the same meter: with a copy of the network, or with the network's own frozen
        twin (an adapted network's is its base)."""
        if isinstance(self.network, Freezes):
            network = self.network.frozen()
        else:
            network = copy.deepcopy(self.network).requires_grad_(False)
        return replace(self, network=network, learns=False)

    def _learning(self) -> bool:
        """True where gradients are asked for and there are parameters that can learn."""
        asked = self.learns and torch.is_grad_enabled()
        return asked and any(parameter.requires_grad for parameter in self.network.parameters())


def _made_of(thing: Any) -> Any:
    """A network or one of its ends in values for JSON: its own description, its layers, or its code."""
    if thing is None:
        return None
    if isinstance(thing, Described):
        return thing.describe()
    if isinstance(thing, Function):
        return "".join(origin(thing.function))
    return structure_digest(thing) if isinstance(thing, nn.Module) else "".join(origin(thing))
