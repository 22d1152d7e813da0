"""Grids of times: n + 1 decreasing times for n steps, from noise to t = 0, with both ends asserted.

Every function here returns a tuple of floats that `check_grid` has passed, so that a grid which stops before the noise
is gone, or which starts where data is left, is refused where it is made.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from stepwell.errors import InputError
from stepwell.solver.path import Path, shift_time

TERMINAL = 0.1
"""The largest alpha / sigma at which a grid may start; Stable Diffusion 1.5 trains down to 0.068."""


def check_order(times: Sequence[float]) -> None:
    """Raise `InputError` unless the times fall, strictly, within [0, 1]."""
    if len(times) < 2:
        raise InputError(f"times must be at least two, a start and an end, got {len(times)}.")
    for step, (time, target) in enumerate(itertools.pairwise(times)):
        if not 0.0 <= target < time <= 1.0:
            raise InputError(
                f"times must fall from 1 (noise) to 0 (data), got {time} and then {target} in step {step}."
            )


def check_grid(times: Sequence[float], path: Path, terminal: float = TERMINAL) -> tuple[float, ...]:
    """The times as a tuple, if they fall from (almost) pure noise to exactly zero noise; else `InputError`.

    `terminal` is the largest alpha / sigma allowed at the first time: samples start there from pure noise, without
    the data that the path has left there (Lin et al. 2024, arXiv 2305.08891). `math.inf` allows any start.
    """
    check_order(times)
    if times[-1] != 0.0:
        raise InputError(
            f"times must end at 0, without noise, got {times[-1]:.6g} as the last, where sigma is "
            f"{path.sigma(float(times[-1])):.4g}."
        )
    ratio = path.alpha(float(times[0])) / path.sigma(float(times[0]))
    if not ratio <= terminal:
        raise InputError(
            f"times must start at noise, got {times[0]:.6g} as the first, where alpha / sigma of the {path.name} path "
            f"is {ratio:.3g}, above {terminal:.3g}."
        )
    return tuple(float(time) for time in times)


def uniform(steps: int, path: Path, terminal: float = TERMINAL) -> tuple[float, ...]:
    """1, 1 - 1/n, ..., 0: equal steps in time.

    Example:
        >>> from stepwell.solver.path import Linear
        >>> uniform(4, Linear())
        (1.0, 0.75, 0.5, 0.25, 0.0)
    """
    _positive(steps)
    return check_grid([1.0 - step / steps for step in range(steps + 1)], path, terminal)


def shifted(steps: int, path: Path, factor: float = 3.0, terminal: float = TERMINAL) -> tuple[float, ...]:
    """The uniform grid after `shift_time`, once: above 1 the factor spends more steps near noise (SD3: 3)."""
    return check_grid([shift_time(time, factor) for time in uniform(steps, path, math.inf)], path, terminal)


def karras(
    steps: int,
    path: Path,
    smallest: float = 0.002,
    largest: float = 80.0,
    rho: float = 7.0,
    terminal: float = TERMINAL,
) -> tuple[float, ...]:
    """n noise ratios sigma / alpha from `largest` to `smallest`, equal steps in their 1/rho-th power, then 0.

    Karras et al. 2022 (arXiv 2206.00364, eq. 5). The ratios are those of the variance-exploding path, whatever the
    path; `largest` must not exceed the path's own at t = 1.
    """
    _ratios(path, smallest, largest)
    top, bottom = largest ** (1.0 / rho), smallest ** (1.0 / rho)
    ratios = [(top + place * (bottom - top)) ** rho for place in _places(steps)]
    return check_grid([*_times(path, ratios), 0.0], path, terminal)


def log_snr_uniform(
    steps: int, path: Path, smallest: float = 0.002, largest: float = 80.0, terminal: float = TERMINAL
) -> tuple[float, ...]:
    """n times equally spaced in lambda between the noise ratios `largest` and `smallest` (sigma / alpha), then 0.

    DPM-Solver's "logSNR" grid (arXiv 2206.00927), which itself stops at the smallest.
    """
    _ratios(path, smallest, largest)
    ratios = [largest * (smallest / largest) ** place for place in _places(steps)]
    return check_grid([*_times(path, ratios), 0.0], path, terminal)


def trailing(steps: int, path: Path, training_steps: int = 1000, terminal: float = TERMINAL) -> tuple[float, ...]:
    """Every (T/n)-th of T training times, counted from the noise end, then 0; it starts at t = 1."""
    _positive(steps, training_steps)
    times = [round(training_steps * (1.0 - step / steps)) / training_steps for step in range(steps)]
    return check_grid([*times, 0.0], path, terminal)


def leading(steps: int, path: Path, training_steps: int = 1000, terminal: float = TERMINAL) -> tuple[float, ...]:
    """Every (T // n)-th of T training times, counted from the data end, then 0.

    It starts n-th part below noise, so few steps fail the check of the start on most paths (arXiv 2305.08891, table 2);
    `terminal=math.inf` allows it.
    """
    _positive(steps, training_steps)
    stride = training_steps // steps
    return check_grid(
        [*((1 + stride * place) / training_steps for place in reversed(range(steps))), 0.0], path, terminal
    )


def _positive(steps: int, limit: int | None = None) -> None:
    if steps < 1 or (limit is not None and steps > limit):
        most = "" if limit is None else f" and at most {limit}"
        raise InputError(f"steps must be at least 1{most}, got {steps}.")


def _places(steps: int) -> list[float]:
    """n equally spaced numbers from 0 to 1."""
    if steps < 2:
        raise InputError(f"steps must be at least 2 between two noise levels, got {steps}.")
    return [step / (steps - 1) for step in range(steps)]


def _ratios(path: Path, smallest: float, largest: float) -> None:
    if not 0.0 < smallest < largest:
        raise InputError(f"Noise levels must be 0 < smallest < largest, got smallest={smallest} and largest={largest}.")
    alpha, sigma = path.alpha(1.0), path.sigma(1.0)
    if largest * alpha > sigma * (1.0 + 1e-9):
        raise InputError(
            f"largest must be at most {sigma / alpha:.4g}, the last noise level of the {path.name} path, got "
            f"{largest:.4g}."
        )


def _times(path: Path, ratios: list[float]) -> list[float]:
    return [min(path.time(-math.log(ratio)), 1.0) for ratio in ratios]
