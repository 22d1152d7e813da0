"""The picture of a comparison on the mixture task: samples over the contours of the start and of the optimum."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from stepwell.figures import charts
from stepwell.process.exact.mixture import Mixture
from stepwell.rng import Rng
from stepwell.tasks.mixture.problem import RADIUS, SPREAD, MixtureProblem

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SHOWN, COLUMNS, REACH = 300, 3, RADIUS + 3.0 * SPREAD
"""Samples in a panel of the picture, panels side by side, and the distance from the origin that a panel shows."""
MASSES = (0.5, 0.9)
"""The share of a distribution that each of its contours encloses."""


def figure(problem: MixtureProblem, start: Sequence[Tensor], ends: Mapping[str, Sequence[Tensor]]) -> str:
    """An SVG of samples over the distributions: panels for the start, each method, and perfect samples.

    Thin contours are the start's, strong ones the optimum's, and enclose `MASSES` of them; the cross is the target. At
    most `SHOWN` samples are drawn in a panel; the number behind its name is the distance of all of them to the optimum,
    and for perfect samples, as many as there are of the start, its average: the floor.
    """
    from matplotlib.figure import Figure

    perfect = list(problem.optimum.distribution.sample(len(start), Rng(0).split("perfect")))
    panels = [("start", charts.MUTED, start)]
    panels += [(label, charts.colour(place), points) for place, (label, points) in enumerate(ends.items())]
    panels += [("perfect samples", charts.INK, perfect)]
    rows = math.ceil(len(panels) / COLUMNS)
    width = 1.4 * charts.WIDTH  # a page gives this picture its whole width
    drawn = Figure(figsize=(width, rows * (width / COLUMNS + 0.2)), layout="constrained")
    for place, (label, tint, points) in enumerate(panels):
        axes = drawn.add_subplot(rows, COLUMNS, place + 1)
        _scatter(axes, torch.stack(list(points[:SHOWN])).double().numpy(), tint)
        _contours(axes, problem.start, charts.MUTED, 0.6)
        _contours(axes, problem.optimum.distribution, charts.INK, 1.3)
        axes.plot(*problem.reward.target.tolist(), "+", color=charts.INK, markersize=8, markeredgewidth=1.4)
        number = problem.floor(len(start)) if points is perfect else problem.distance((), points)
        axes.set_title(f"{label}  {number:.3f}", loc="left", fontsize=9.5, color=charts.INK)
        axes.set(xlim=(-REACH, REACH), ylim=(-REACH, REACH), aspect="equal")
        axes.set_axis_off()
    return charts.svg(drawn, "Samples over the start and the optimum")


def _scatter(axes: Axes, points: Any, tint: str) -> None:
    """Dots as one path of short strokes with round ends: a third of the bytes of as many markers."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path as Strokes

    ends = np.stack([points, points + [1e-3, 0.0]], 1).reshape(-1, 2)
    strokes = Strokes(ends, np.tile([Strokes.MOVETO, Strokes.LINETO], len(points)))
    strokes.should_simplify = False
    axes.add_patch(PathPatch(strokes, fill=False, edgecolor=tint, linewidth=2.2, alpha=0.6, capstyle="round"))


def _contours(axes: Axes, mixture: Mixture, tint: str, width: float) -> None:
    ticks = np.linspace(-REACH, REACH, 91)
    across, up = np.meshgrid(ticks, ticks)
    places = torch.from_numpy(np.stack([across.ravel(), up.ravel()], 1))
    density = mixture.log_density(places).exp().reshape(across.shape).numpy()
    axes.contour(across, up, density, levels=_levels(density), colors=tint, linewidths=width)


def _levels(density: Any) -> list[float]:
    """The densities above which the shares `MASSES` of a distribution lie, in ascending order."""
    descending = np.sort(density.ravel())[::-1]
    mass = np.cumsum(descending) / descending.sum()
    return sorted(float(descending[np.searchsorted(mass, share)]) for share in MASSES)
