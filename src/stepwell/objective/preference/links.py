"""Further links of preference losses, each TRL 1.16's loss of that name; `link(name, beta, smoothing)` finds one."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

from stepwell.batch import Batch
from stepwell.errors import InputError, UnknownName
from stepwell.objective.preference.pairs import Hinge, Link, Logistic, Square
from stepwell.objective.state import Coefficient, value_of
from stepwell.ranges import Positive
from stepwell.tensors import Tensor, functional, torch


@dataclass(frozen=True)
class Robust(Link):
    """[-(1-e) log sigmoid(beta x) + e log sigmoid(-beta x)] / (1 - 2e): its mean over labels flipped with
    probability e is the loss of the true labels (Ray Chowdhury et al. 2024, arXiv 2403.00409). Unbounded below.
    """

    beta: Positive = 0.1
    smoothing: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.smoothing < 0.5:
            raise InputError(f"Robust.smoothing must be from 0 to below 1/2, got {self.smoothing}.")

    def __call__(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        logit, e = self.beta * (chosen - rejected), self.smoothing
        return (e * functional.logsigmoid(-logit) - (1 - e) * functional.logsigmoid(logit)) / (1 - 2 * e)


@dataclass(frozen=True)
class ExactPair(Link):
    """EXO: KL(q || (1-e, e)) with q = sigmoid(beta x), the reverse divergence (Ji et al. 2024, arXiv 2402.00856)."""

    beta: Positive = 0.1
    smoothing: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.smoothing < 1:
            raise InputError(f"ExactPair.smoothing must be between 0 and 1, such as 1e-3, got {self.smoothing}.")

    def __call__(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        logit = self.beta * (chosen - rejected)
        won = torch.sigmoid(logit) * (functional.logsigmoid(logit) - math.log1p(-self.smoothing))
        return won + torch.sigmoid(-logit) * (functional.logsigmoid(-logit) - math.log(self.smoothing))


@dataclass(frozen=True)
class NoiseContrast(Link):
    """NCA on a pair: -log sigmoid(r_w) - [log sigmoid(-r_w) + log sigmoid(-r_l)] / 2, r = beta s (arXiv 2402.05369)."""

    beta: Positive = 0.1

    def __call__(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        won, lost = self.beta * chosen, self.beta * rejected
        return -functional.logsigmoid(won) - 0.5 * functional.logsigmoid(-won) - 0.5 * functional.logsigmoid(-lost)


@dataclass(frozen=True)
class Classifier(Link):
    """BCO: -log sigmoid(beta (s_w - d)) - log sigmoid(-beta (s_l - d)), d the mean score (arXiv 2404.04656).

    `shift` is d: 0 in TRL's pair loss, or a coefficient that follows the metric `pair_score`.
    """

    beta: Positive = 0.1
    shift: float | Coefficient = 0.0

    def at(self, batch: Batch) -> Link:
        return dataclasses.replace(self, shift=value_of(self.shift, batch))

    def __call__(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        shift = self.shift.initial if isinstance(self.shift, Coefficient) else self.shift
        won, lost = self.beta * (chosen - shift), self.beta * (rejected - shift)
        return -functional.logsigmoid(won) - functional.logsigmoid(-lost)


@dataclass(frozen=True)
class Certain(Link):
    """SPPO with hard labels: (s_w - 1/(2 beta))^2 + (s_l + 1/(2 beta))^2 (Wu et al. 2024, arXiv 2405.00675)."""

    beta: Positive = 0.1

    def __call__(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return (chosen - 0.5 / self.beta) ** 2 + (rejected + 0.5 / self.beta) ** 2


@dataclass(frozen=True)
class AnchoredZero(Link):
    """APO-zero: 1 - sigmoid(beta s_w) + sigmoid(beta s_l); where chosen rows beat the policy's own (2408.06266)."""

    beta: Positive = 0.1

    def __call__(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return 1 - torch.sigmoid(self.beta * chosen) + torch.sigmoid(self.beta * rejected)


@dataclass(frozen=True)
class AnchoredDown(Link):
    """APO-down: sigmoid(beta s_w) + 1 - sigmoid(beta x); for chosen rows worse than the policy's own (2408.06266)."""

    beta: Positive = 0.1

    def __call__(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return torch.sigmoid(self.beta * chosen) + 1 - torch.sigmoid(self.beta * (chosen - rejected))


@dataclass(frozen=True)
class Discovered(Link):
    """DiscoPOP: (1 - m) (-log sigmoid u) + m exp(-u), u = beta x, m = sigmoid(u / tau) (Lu et al. 2024, 2406.08414)."""

    beta: Positive = 0.05
    tau: Positive = 0.05

    def __call__(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        logit = self.beta * (chosen - rejected)
        mixed = torch.sigmoid(logit / self.tau)
        return (1 - mixed) * -functional.logsigmoid(logit) + mixed * torch.exp(-logit)


@dataclass(frozen=True)
class OddsRatio(Link):
    """ORPO: -log sigmoid of the log odds' difference, where a row's probability is exp(s), s a mean log-probability
    (Hong et al. 2024, arXiv 2403.07691, equations 4 and 7).
    """

    def __call__(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return -functional.logsigmoid(_log_odds(chosen) - _log_odds(rejected))


def _log_odds(log_probability: Tensor) -> Tensor:
    """log p - log(1 - p), with the form of log(1 - p) that loses no digits."""
    near = log_probability > -math.log(2.0)
    low = torch.where(near, -math.log(2.0), log_probability)
    high = torch.where(near, log_probability, -math.log(2.0))
    return log_probability - torch.where(near, torch.log(-torch.expm1(high)), torch.log1p(-torch.exp(low)))


LINKS: dict[str, Callable[[float, float], Link]] = {
    "sigmoid": lambda beta, smoothing: Logistic(beta, smoothing),
    "sigmoid-norm": lambda beta, smoothing: Logistic(beta, smoothing),
    "robust": lambda beta, smoothing: Robust(beta, smoothing),
    "exo-pair": lambda beta, smoothing: ExactPair(beta, smoothing),
    "aot": lambda beta, smoothing: Logistic(beta, smoothing),
    "aot-unpaired": lambda beta, smoothing: Logistic(beta, smoothing),
    "hinge": lambda beta, _: Hinge(beta),
    "ipo": lambda beta, _: Square(beta),
    "nca-pair": lambda beta, _: NoiseContrast(beta),
    "bco-pair": lambda beta, _: Classifier(beta),
    "sppo-hard": lambda beta, _: Certain(beta),
    "apo-zero": lambda beta, _: AnchoredZero(beta),
    "apo-down": lambda beta, _: AnchoredDown(beta),
    "discopop": lambda beta, _: Discovered(beta),
}
"""Links by TRL's names, with hyphens; the first six read the smoothing."""

SMOOTHED = ("sigmoid", "sigmoid-norm", "robust", "exo-pair", "aot", "aot-unpaired")
PER_STEP = ("ipo", "sigmoid-norm")
"""Losses of the mean log-ratio a step, as TRL computes them."""
OF_MARGINS = ("sigmoid", "sigmoid-norm", "robust", "exo-pair", "hinge", "ipo", "discopop")
"""Losses of the margin alone, which other divergences than the reverse KL are defined for."""


def link(name: str, beta: float, smoothing: float = 0.0) -> Link:
    """The link of a loss by name. Raises `InputError` for an unknown one, and for smoothing that it does not read."""
    if name not in LINKS:
        raise UnknownName("preference loss", name, LINKS)
    if smoothing and name not in SMOOTHED:
        raise InputError(f"smoothing must be 0 for the loss '{name}', got {smoothing}; {', '.join(SMOOTHED)} read it.")
    return LINKS[name](beta, smoothing)
