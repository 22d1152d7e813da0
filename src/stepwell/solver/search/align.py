"""Align your steps: the noise levels with the least bound on the KL divergence of the sampled distribution.

Let r = sigma / alpha be the noise ratio, on every path, and D_r the data prediction at ratio r along a noised sample.
A step of the reverse SDE from r to s < r that freezes D costs, by Girsanov's theorem (Sabour et al. 2024, arXiv
2404.14507, in the notation of the EDM path),

    cost(r, s) = int_s^r E |D_u - D_r|^2 / u^3 du        nats,

and the sum over the steps bounds KL(true || sampled). A schedule is a list of ratios, so it serves every path.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stepwell.errors import InputError, UnknownName
from stepwell.rng import Rng
from stepwell.solver.grid import TERMINAL, check_grid
from stepwell.solver.path import Path
from stepwell.solver.wrappers import Predict

Cost = Callable[[float, float], float]

PUBLISHED: dict[str, tuple[float, ...]] = {
    "stable-diffusion-1.5": (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029),
    "stable-diffusion-xl": (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029),
    "stable-video-diffusion": (700.0, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002),
}
"""The authors' ratios for 10 steps, https://research.nvidia.com/labs/toronto-ai/AlignYourSteps/howto.html."""


@dataclass(frozen=True)
class Aligned:
    """n + 1 falling noise ratios for n steps, and the bound (nats) that they reach."""

    ratios: tuple[float, ...]
    bound: float

    def grid(self, path: Path, terminal: float = TERMINAL) -> tuple[float, ...]:
        """The times of the ratios on a path, the last one replaced by 0 (no noise), as the authors and libraries do."""
        return _grid(self.ratios, path, terminal)


def _grid(ratios: Sequence[float], path: Path, terminal: float) -> tuple[float, ...]:
    times = [min(path.time(-math.log(ratio)), 1.0) for ratio in ratios[:-1]]
    return check_grid([*times, 0.0], path, terminal)


def published(name: str, steps: int, path: Path, terminal: float = TERMINAL) -> tuple[float, ...]:
    """A published schedule for a model, with any number of steps, as times on a path (`PUBLISHED`).

    Other numbers of steps than 10 are interpolated linearly in log ratio over the place in the list, as the authors
    do, and the last ratio is replaced by no noise.

    Example:
        >>> from stepwell.solver.path import VarianceExploding
        >>> times = published("stable-diffusion-1.5", 10, VarianceExploding(14.615))
        >>> [round(14.615 * time, 3) for time in times[:4]]
        [14.615, 6.475, 3.861, 2.697]
    """
    if name not in PUBLISHED:
        raise UnknownName("published schedule", name, PUBLISHED)
    if steps < 1:
        raise InputError(f"steps must be at least 1, got {steps}.")
    logs, ratios = [math.log(ratio) for ratio in PUBLISHED[name]], []
    for step in range(steps + 1):
        place = step * (len(logs) - 1) / steps
        left = min(int(place), len(logs) - 2)
        ratios.append(math.exp(logs[left] + (place - left) * (logs[left + 1] - logs[left])))
    return _grid(ratios, path, terminal)


def gaussian_cost(variances: Sequence[float]) -> Cost:
    """The cost of a step for Gaussian data with these variances, in closed form.

    E |D_u - D_r|^2 is Var D_u - Var D_r, as D is a martingale along the path, with Var D_u = V^2 / (V + u^2).
    """

    def cost(start: float, end: float) -> float:
        total = 0.0
        for variance in variances:
            frozen = variance**2 / (variance + start**2)
            outer = -0.5 * variance / start**2 - math.log(start) + 0.5 * math.log(variance + start**2)
            inner = -0.5 * variance / end**2 - math.log(end) + 0.5 * math.log(variance + end**2)
            total += outer - inner - frozen * 0.5 * (end**-2 - start**-2)
        return total

    return cost


def align(
    cost: Cost, steps: int, largest: float, smallest: float, *, tolerance: float = 1e-9, sweeps: int = 1000
) -> Aligned:
    """n + 1 ratios from `largest` to `smallest` of least total cost, by coordinate descent, coarse to fine.

    As published: few steps are optimised first, each interval is split in the middle of its log, and all are optimised
    again, until there are `steps`: from the odd part of it, doubling. A ratio is moved by bounded minimisation between
    its neighbours; sweeps end when one lowers the total by less than `tolerance` of it. Raises `InputError` if
    `sweeps` of them do not suffice. The result is a local minimum.
    """
    from scipy.optimize import minimize_scalar

    if not 0.0 < smallest < largest or steps < 1:
        raise InputError(
            f"steps must be at least 1, between ratios 0 < smallest < largest; got {steps}, {smallest} and {largest}."
        )
    count = steps
    while count % 2 == 0:
        count //= 2
    width = (math.log(smallest) - math.log(largest)) / count
    logs = [math.log(largest) + place * width for place in range(count + 1)]
    while True:
        total = _total(cost, logs)
        for _ in range(sweeps):
            for place in range(1, len(logs) - 1):
                above, below = logs[place - 1], logs[place + 1]

                def around(value: float, above: float = above, below: float = below) -> float:
                    return _total(cost, (above, value, below))

                margin = 1e-9 * (above - below)
                bounds = (below + margin, above - margin)
                best = minimize_scalar(around, bounds=bounds, method="bounded", options={"xatol": 1e-10})
                if best.fun < around(logs[place]):
                    logs[place] = float(best.x)
            previous, total = total, _total(cost, logs)
            if previous - total <= tolerance * abs(total):
                break
        else:
            raise InputError(f"{sweeps} sweeps did not align {len(logs) - 1} steps; allow more or a larger tolerance.")
        if len(logs) == steps + 1:
            return Aligned((largest, *(math.exp(value) for value in logs[1:-1]), smallest), total)
        middles = [0.5 * (above + below) for above, below in itertools.pairwise(logs)]
        logs = [value for pair in zip(logs, middles, strict=False) for value in pair] + [logs[-1]]


def _total(cost: Cost, logs: Sequence[float]) -> float:
    return math.fsum(cost(math.exp(above), math.exp(below)) for above, below in itertools.pairwise(logs))


def estimate_costs(
    predict: Predict, data: Tensor, path: Path, ratios: Sequence[float], rng: Rng, *, output: str = "velocity"
) -> Tensor:
    """The cost of a step from ratios[i] to ratios[j], (K, K), estimated on data (N, *D); infinite unless i < j.

    The model is evaluated once on all rows at each of K falling ratios, along paths that are noised step by step, and
    the integral is taken by the trapezoidal rule in u^-2. All K predictions are held in memory.
    """
    clean = data.double()
    noisy, predictions = clean, []
    for place in reversed(range(len(ratios))):
        lower = ratios[place + 1] if place + 1 < len(ratios) else 0.0
        if not lower < ratios[place]:
            raise InputError(f"ratios must fall, got {ratios[place]} before {lower}.")
        fresh = rng.normal(*clean.shape, dtype=clean.dtype).to(clean.device)
        noisy = noisy + math.sqrt(ratios[place] ** 2 - lower**2) * fresh
        time = min(path.time(-math.log(ratios[place])), 1.0)
        x = (path.alpha(time) * noisy).to(data.dtype)
        predictions.append(path.convert(predict(x, time), x, time, output, "data").double().flatten())
    stacked = torch.stack(predictions[::-1])
    width = torch.tensor(ratios, dtype=torch.float64, device=stacked.device).pow(-2)
    costs = torch.full((len(ratios), len(ratios)), math.inf, dtype=torch.float64, device=stacked.device)
    for place in range(len(ratios) - 1):
        gaps = (stacked[place:] - stacked[place]).square().sum(1) / len(data)
        pieces = 0.25 * (gaps[1:] + gaps[:-1]) * width[place:].diff()  # u^-3 du = -d(u^-2) / 2
        costs[place, place + 1 :] = pieces.cumsum(0)
    return costs


def align_on(costs: Tensor, ratios: Sequence[float], steps: int) -> Aligned:
    """The n + 1 of K ratios, first and last included, of least total cost (K, K): exactly, by dynamic programming."""
    last = len(ratios) - 1
    if costs.shape != (last + 1, last + 1) or not 1 <= steps <= last:
        raise InputError(
            f"costs must be ({last + 1}, {last + 1}), and steps 1 to {last}; got {tuple(costs.shape)} and {steps}."
        )
    best, routes = costs[0].clone(), [[0, place] for place in range(last + 1)]
    for _ in range(steps - 1):
        through = best[:, None] + costs
        best, before = through.min(0)
        routes = [[*routes[place], end] for end, place in enumerate(before.tolist())]
    return Aligned(tuple(float(ratios[place]) for place in routes[last]), float(best[last]))
