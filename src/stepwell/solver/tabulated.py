"""The path of a model that was trained at a list of noise levels: Stable Diffusion's, and others of DDPM's family."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from stepwell.errors import InputError
from stepwell.solver.path import Path, Time


@dataclass(frozen=True)
class Tabulated(Path):
    """A variance-preserving path known at T training times only: alpha^2 = alphas_cumprod[k] at t = (k + 1) / T.

    Networks trained on T discrete steps, the Stable Diffusion family's, have seen these noise levels and no others;
    step k of theirs is t = (k + 1) / T here, so that the grids `trailing` and `leading` fall on training times. Between
    them lambda is linear in t, as k-diffusion and diffusers have it. Below the first, sigma / alpha falls linearly to
    0; and where the last level is pure noise (alpha = 0, Lin et al. 2024, arXiv 2305.08891), alpha / sigma does in the
    last interval. So alpha and sigma are exact at both ends, and the rates are finite everywhere, with jumps at the
    training times.

    Raises `InputError` unless the levels fall, strictly, from below 1 to 0 or above it.

    Example:
        >>> on = Tabulated((0.9, 0.5, 0.1))
        >>> round(on.alpha(1 / 3) ** 2, 12), round(on.alpha(2 / 3) ** 2, 12), on.sigma(0.0)
        (0.9, 0.5, 0.0)
    """

    alphas_cumprod: tuple[float, ...] = field(repr=False)  # (T,), by training step
    name = "tabulated"

    def __post_init__(self) -> None:
        levels = tuple(float(level) for level in self.alphas_cumprod)
        object.__setattr__(self, "alphas_cumprod", levels)
        if len(levels) < 2:
            raise InputError(f"alphas_cumprod must have at least two levels, got {len(levels)}.")
        for place, (level, following) in enumerate(itertools.pairwise(levels)):
            if not 1.0 > level > following >= 0.0:
                raise InputError(
                    f"alphas_cumprod must fall from below 1 to 0 or above, got {level:.6g} and {following:.6g} as "
                    f"entries {place} and {place + 1}."
                )

    @property
    def training_steps(self) -> int:
        return len(self.alphas_cumprod)

    @cached_property
    def _table(self) -> Tensor:
        """lambda at the training times (T,), without the last where nothing of the data is left there."""
        levels = torch.tensor([level for level in self.alphas_cumprod if level > 0.0], dtype=torch.float64)
        return 0.5 * (levels.log() - (-levels).log1p())

    def _ray(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Numbers in the ratio of alpha to sigma, at least one of them 1, and their rates in t."""
        table, steps = self._table.to(t), self.training_steps
        place = t * steps - 1.0
        left = place.detach().floor().clamp(0.0, max(len(table) - 2.0, 0.0)).long()
        low, high = table[left], table[(left + 1).clamp(max=len(table) - 1)]
        one, none = torch.ones_like(place), torch.zeros_like(place)
        inside = (-(low + (high - low) * (place - left))).exp()
        first = (-table[0]).exp()
        sigma = torch.where(place < 0.0, first * (place + 1.0), inside)
        sigma_rate = torch.where(place < 0.0, first * steps, (low - high) * steps * inside)
        if len(table) == steps:
            return one, sigma, none, sigma_rate
        ends, last = place > steps - 2.0, table[-1].exp()
        alpha = torch.where(ends, last * (steps - 1.0 - place), one)
        rates = torch.where(ends, -last * steps, none), torch.where(ends, none, sigma_rate)
        return alpha, torch.where(ends, one, sigma), *rates

    def _at(self, t: Time, which: str) -> Time:
        if not isinstance(t, Tensor):
            return float(self._at(torch.tensor(t, dtype=torch.float64), which))
        alpha, sigma, alpha_rate, sigma_rate = self._ray(t)
        length = torch.hypot(alpha, sigma)
        if which == "alpha":
            return alpha / length
        if which == "sigma":
            return sigma / length
        turning = (alpha * sigma_rate - sigma * alpha_rate) / length**3  # of the angle between them, over the length
        return -sigma * turning if which == "alpha_rate" else alpha * turning

    def alpha(self, t: Time) -> Time:
        return self._at(t, "alpha")

    def sigma(self, t: Time) -> Time:
        return self._at(t, "sigma")

    def alpha_rate(self, t: Time) -> Time:
        return self._at(t, "alpha_rate")

    def sigma_rate(self, t: Time) -> Time:
        return self._at(t, "sigma_rate")

    def time(self, log_snr: Time) -> Time:
        """The time with this log(alpha / sigma); 1 for what lies beyond the last noise level."""
        if not isinstance(log_snr, Tensor):
            return float(self.time(torch.tensor(log_snr, dtype=torch.float64)))
        table, steps = self._table.to(log_snr), self.training_steps
        left = (torch.searchsorted(-table, -log_snr.detach().contiguous()) - 1).clamp(0, max(len(table) - 2, 0))
        low, high = table[left], table[(left + 1).clamp(max=len(table) - 1)]
        gap = torch.where(high < low, high - low, -torch.ones_like(low))
        place = left + ((log_snr - low) / gap).clamp(max=1.0)
        if len(table) < steps:
            place = torch.where(log_snr < table[-1], steps - 1.0 - (log_snr - table[-1]).exp(), place)
        return torch.where(log_snr > table[0], (table[0] - log_snr).exp() - 1.0, place).add(1.0) / steps
