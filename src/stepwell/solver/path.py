"""The path from data to noise, and the predictions that a network may make along it.

A path is x_t = alpha(t) x_0 + sigma(t) e with e ~ N(0, 1). Time runs from **t = 0, data, to t = 1, noise**, on every
path and everywhere in this folder. `log_snr` is lambda = log(alpha / sigma), half the logarithm of the signal-to-noise
ratio: it rises as noise is removed, from `log_snr(1)` (minus infinity where alpha(1) = 0) to infinity at t = 0.

Four predictions are equivalent, and `Path.convert` turns each into any other:

    data      D = E[x_0 | x_t]
    noise     E = E[e | x_t] = (x - alpha D) / sigma
    score     S = grad log p_t(x) = -E / sigma
    velocity  v = E[d x_t / dt | x_t] = alpha' D + sigma' E        (with ' the derivative in t)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeVar

from stepwell.errors import InputError, UnknownName
from stepwell.tensors import Tensor, torch

Time = TypeVar("Time", float, Tensor)
PREDICTIONS = ("velocity", "noise", "data", "score")


def _library(t: Any) -> Any:
    """The module with exp, sin, ... for this number: tensors go through torch, floats through math."""
    return torch if isinstance(t, Tensor) else math


@dataclass(frozen=True)
class Path:
    """The base of all paths. Times are floats, or tensors that broadcast against the states, e.g. (N, 1) for (N, D)."""

    name = ""

    def alpha(self, t: Time) -> Time:
        """The factor of the data at time t: 1 at t = 0."""
        raise NotImplementedError

    def sigma(self, t: Time) -> Time:
        """The standard deviation of the noise at time t: 0 at t = 0."""
        raise NotImplementedError

    def alpha_rate(self, t: Time) -> Time:
        """d alpha / dt."""
        raise NotImplementedError

    def sigma_rate(self, t: Time) -> Time:
        """d sigma / dt; infinite at t = 0 on the variance-preserving paths."""
        raise NotImplementedError

    def time(self, log_snr: Time) -> Time:
        """The time with this log(alpha / sigma): the inverse of `log_snr`."""
        raise NotImplementedError

    def log_snr(self, t: Time) -> Time:
        """lambda(t) = log(alpha / sigma); infinite at the ends where sigma or alpha is zero."""
        alpha, sigma = self.alpha(t), self.sigma(t)
        if isinstance(alpha, Tensor) or isinstance(sigma, Tensor):
            return torch.as_tensor(alpha).log() - torch.as_tensor(sigma).log()  # type: ignore[return-value]
        if sigma == 0.0:
            return math.inf
        return math.log(alpha) - math.log(sigma) if alpha > 0.0 else -math.inf

    def noised(self, data: Tensor, noise: Tensor, t: Time) -> Tensor:
        """x_t = alpha x_0 + sigma e, of the shape of `data`."""
        return self.alpha(t) * data + self.sigma(t) * noise

    def convert(self, prediction: Tensor, x: Tensor, t: Time, source: str, target: str) -> Tensor:
        """A prediction at (x, t) of kind `source` as one of kind `target`; all tensors (N, *D), t broadcastable.

        Raises `InputError` where it does not exist: a noise or score prediction does not determine the data where
        alpha = 0, and no prediction determines the noise, the score or (but for itself) the velocity where sigma = 0.
        """
        for kind in (source, target):
            if kind not in PREDICTIONS:
                raise UnknownName("prediction", kind, PREDICTIONS)
        if source == target:
            return prediction
        alpha, sigma = self.alpha(t), self.sigma(t)
        if target != "data" and _any_zero(sigma):
            raise InputError(f"At t = 0 there is no noise, so a {source} cannot be turned into a {target} there.")
        if source in ("noise", "score") and target not in ("noise", "score") and _any_zero(alpha):
            raise InputError(
                f"At t = 1 of the {self.name} path nothing of the data is left, so a {source} prediction does not "
                f"determine the {target} there; start later, or predict data or velocity."
            )
        if target == "score":
            return -self.convert(prediction, x, t, source, "noise") / sigma
        if source == "score":
            return self.convert(-sigma * prediction, x, t, "noise", target)
        if source == "data":
            noise = (x - alpha * prediction) / sigma
            return noise if target == "noise" else self.alpha_rate(t) * prediction + self.sigma_rate(t) * noise
        if source == "noise":
            data = (x - sigma * prediction) / alpha
            return data if target == "data" else self.alpha_rate(t) * data + self.sigma_rate(t) * prediction
        if target == "data" and isinstance(t, float) and t == 0.0:
            return x
        alpha_rate, sigma_rate = self.alpha_rate(t), self.sigma_rate(t)
        determinant = alpha * sigma_rate - sigma * alpha_rate
        if target == "data":
            return (sigma_rate * x - sigma * prediction) / determinant
        return (alpha * prediction - alpha_rate * x) / determinant


def _any_zero(value: float | Tensor) -> bool:
    return bool((value == 0.0).any()) if isinstance(value, Tensor) else value == 0.0


@dataclass(frozen=True)
class Linear(Path):
    """x_t = (1 - t) x_0 + t e, the straight path of flow matching and rectified flow (arXiv 2209.03003, 2210.02747)."""

    name = "linear"

    def alpha(self, t: Time) -> Time:
        return 1.0 - t

    def sigma(self, t: Time) -> Time:
        return t

    def alpha_rate(self, t: Time) -> Time:
        return 0.0 * t - 1.0

    def sigma_rate(self, t: Time) -> Time:
        return 0.0 * t + 1.0

    def time(self, log_snr: Time) -> Time:
        return 0.5 - 0.5 * _library(log_snr).tanh(0.5 * log_snr)


@dataclass(frozen=True)
class VariancePreserving(Path):
    """beta(t) = minimum + t (maximum - minimum), alpha = exp(-integral of beta / 2), sigma^2 = 1 - alpha^2.

    The continuous-time DDPM schedule of Song et al. 2021 (arXiv 2011.13456, eq. 33).
    """

    minimum: float = 0.1
    maximum: float = 20.0
    name = "vp-linear"

    def _log_alpha(self, t: Time) -> Time:
        return -0.25 * (self.maximum - self.minimum) * t * t - 0.5 * self.minimum * t

    def alpha(self, t: Time) -> Time:
        return _library(t).exp(self._log_alpha(t))

    def sigma(self, t: Time) -> Time:
        library = _library(t)
        return library.sqrt(-library.expm1(2.0 * self._log_alpha(t)))

    def alpha_rate(self, t: Time) -> Time:
        return -0.5 * (self.minimum + t * (self.maximum - self.minimum)) * self.alpha(t)

    def sigma_rate(self, t: Time) -> Time:
        return _from_alpha(self, t)

    def time(self, log_snr: Time) -> Time:
        library = _library(log_snr)
        depth = library.log1p(library.exp(-2.0 * log_snr))  # twice -log alpha
        return depth / (
            0.5 * self.minimum + library.sqrt(0.25 * self.minimum**2 + 0.5 * (self.maximum - self.minimum) * depth)
        )


@dataclass(frozen=True)
class Cosine(Path):
    """alpha = cos(a) / cos(b), a = (t + offset) / (1 + offset) pi/2, b its value at 0; sigma^2 = 1 - alpha^2.

    Nichol and Dhariwal 2021 (arXiv 2102.09672, eq. 17), without their clipping near t = 1: there alpha is 0.
    """

    offset: float = 0.008
    name = "vp-cosine"

    @property
    def _speed(self) -> float:
        return 0.5 * math.pi / (1.0 + self.offset)

    def alpha(self, t: Time) -> Time:
        return _library(t).sin(self._speed * (1.0 - t)) / math.cos(self._speed * self.offset)

    def sigma(self, t: Time) -> Time:
        library, speed = _library(t), self._speed
        # 1 - alpha^2 as a product, which keeps its digits near t = 0
        square = library.sin(speed * t) * library.sin(speed * (t + 2.0 * self.offset))
        return library.sqrt(square) / math.cos(speed * self.offset)

    def alpha_rate(self, t: Time) -> Time:
        return -self._speed * _library(t).cos(self._speed * (1.0 - t)) / math.cos(self._speed * self.offset)

    def sigma_rate(self, t: Time) -> Time:
        return _from_alpha(self, t)

    def time(self, log_snr: Time) -> Time:
        library, start = _library(log_snr), self._speed * self.offset
        alpha = 1.0 / library.sqrt(1.0 + library.exp(-2.0 * log_snr))
        square = 1.0 / (1.0 + library.exp(2.0 * log_snr))
        sine = library.sqrt(math.sin(start) ** 2 + square * math.cos(start) ** 2)
        return library.atan2(sine, alpha * math.cos(start)) / self._speed - self.offset


def _from_alpha(path: Path, t: Time) -> Time:
    """d sigma / dt where sigma^2 = 1 - alpha^2."""
    sigma = path.sigma(t)
    if not isinstance(sigma, Tensor) and sigma == 0.0:
        return math.inf
    return -path.alpha(t) * path.alpha_rate(t) / sigma


@dataclass(frozen=True)
class VarianceExploding(Path):
    """x_t = x_0 + t maximum e: noise is added and the data stays (EDM, Karras et al. 2022, arXiv 2206.00364).

    EDM's own time is the noise level itself, sigma = t maximum.
    """

    maximum: float = 80.0
    name = "ve"

    def alpha(self, t: Time) -> Time:
        return 0.0 * t + 1.0

    def sigma(self, t: Time) -> Time:
        return self.maximum * t

    def alpha_rate(self, t: Time) -> Time:
        return 0.0 * t

    def sigma_rate(self, t: Time) -> Time:
        return 0.0 * t + self.maximum

    def time(self, log_snr: Time) -> Time:
        return _library(log_snr).exp(-log_snr) / self.maximum


@dataclass(frozen=True)
class Trigonometric(Path):
    """x_t = cos(pi t / 2) x_0 + sin(pi t / 2) e (TrigFlow; stochastic interpolants, arXiv 2209.15571)."""

    name = "trigonometric"

    def alpha(self, t: Time) -> Time:
        return _library(t).sin(0.5 * math.pi * (1.0 - t))  # 0 at t = 1 to the last bit

    def sigma(self, t: Time) -> Time:
        return _library(t).sin(0.5 * math.pi * t)

    def alpha_rate(self, t: Time) -> Time:
        return -0.5 * math.pi * _library(t).sin(0.5 * math.pi * t)

    def sigma_rate(self, t: Time) -> Time:
        return 0.5 * math.pi * _library(t).cos(0.5 * math.pi * t)

    def time(self, log_snr: Time) -> Time:
        library = _library(log_snr)
        return library.atan(library.exp(-log_snr)) * (2.0 / math.pi)


PATHS: dict[str, type[Path]] = {
    kind.name: kind for kind in (Linear, VariancePreserving, Cosine, VarianceExploding, Trigonometric)
}


def path(name: str, **settings: float) -> Path:
    """A path by name.

    Example:
        >>> path("linear").log_snr(0.5), path("ve", maximum=2.0).sigma(0.5)
        (0.0, 1.0)
    """
    if name not in PATHS:
        raise UnknownName("path", name, PATHS)
    return PATHS[name](**settings)


def shift_time(t: Time, factor: float) -> Time:
    """t -> k t / (1 + (k - 1) t): the linear path's time with lambda lowered by log k. Its inverse has factor 1 / k.

    SD3's and FLUX's static shift (arXiv 2403.03206, eq. 23). The "exponential" dynamic shift of mu is the same with
    k = exp(mu).

    Example:
        >>> shift_time(0.5, 3.0)
        0.75
    """
    if not 0.0 < factor < math.inf:
        raise InputError(f"The factor of a time shift must be positive and finite, got {factor}.")
    return factor * t / (1.0 + (factor - 1.0) * t)
