"""Charts as SVG that lives inside a page: text stays text, and the page's style sheet chooses the colours."""

from __future__ import annotations

import io
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from stepwell.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Values = NDArray[np.float64]
SERIES = 8
"""The number of colours; further lines are dashed."""
WIDTH = 4.2
"""The width of a chart in inches, small enough for its text to be read on a phone; a page stretches it."""

# Stand-ins for variables of the style sheet: matplotlib draws with these colours, and `svg` replaces them.
INK, MUTED, GRID = "#010101", "#020202", "#030303"
_VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--grid"}
_VARIABLES |= {f"#0a0a{place:02x}": f"--series-{place}" for place in range(SERIES)}
_DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)))


@dataclass(frozen=True)
class Curve:
    """A line through points in ascending x, with an optional band; `series` chooses its colour, `faint` thins it."""

    label: str
    series: int
    x: Values
    y: Values
    low: Values | None = None
    high: Values | None = None
    faint: bool = False


@dataclass(frozen=True)
class Bar:
    """A value with an interval, on a line of its own; `sure` where the interval excludes zero."""

    label: str
    series: int
    value: float
    low: float
    high: float
    sure: bool = True


def colour(series: int) -> str:
    """The stand-in for a series' colour."""
    return f"#0a0a{series % SERIES:02x}"


def curves(
    lines: Sequence[Curve], x_label: str, title: str, *, percent: bool = False, level: float | None = None
) -> str:
    """Lines with bands; `level` draws a thin horizontal line, such as the common start."""
    figure, axes = _figure(2.6)
    scale = 100.0 if percent else 1.0
    if level is not None:
        axes.axhline(scale * level, color=MUTED, linewidth=0.8, linestyle=(0, (2, 2)))
    for line in lines:
        tint, dashes = colour(line.series), _DASHES[line.series // SERIES % len(_DASHES)]
        if line.low is not None and line.high is not None:
            low, high = scale * line.low, scale * line.high
            axes.fill_between(line.x, low, high, color=tint, alpha=0.16, linewidth=0)
        width, alpha = (0.7, 0.35) if line.faint else (1.8, 1.0)
        axes.plot(line.x, scale * line.y, color=tint, linestyle=dashes, linewidth=width, alpha=alpha)
        _mark_alone(axes, line, scale, tint)
    axes.set_xlabel(x_label)
    axes.margins(x=0.02)
    _short_numbers(axes, lines)
    return svg(figure, title)


def multiples(
    lines: Sequence[Curve], x_label: str, title: str, *, percent: bool = False, level: float | None = None
) -> str:
    """A panel for each line, with its band, over all others in grey; the axes are the same everywhere."""
    from matplotlib.figure import Figure

    across = min(4, len(lines))
    down = -(-len(lines) // across)
    figure = Figure(figsize=(2.15 * across, 1.55 * down + 0.25), layout="constrained")
    scale = 100.0 if percent else 1.0
    panels: Any = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False).flatten()
    for place, axes in enumerate(panels):
        _plain_axes(axes)
        if place >= len(lines):
            axes.set_axis_off()
            continue
        own = lines[place]
        for line in lines:
            axes.plot(line.x, scale * line.y, color=GRID, linewidth=0.9)
        if level is not None:
            axes.axhline(scale * level, color=MUTED, linewidth=0.8, linestyle=(0, (2, 2)))
        if own.low is not None and own.high is not None:
            axes.fill_between(
                own.x, scale * own.low, scale * own.high, color=colour(own.series), alpha=0.2, linewidth=0
            )
        axes.plot(own.x, scale * own.y, color=colour(own.series), linewidth=1.9)
        _mark_alone(axes, own, scale, colour(own.series))
        axes.set_title(own.label, loc="left", color=INK, fontsize=9)
        axes.margins(x=0.02)
        _short_numbers(axes, lines)
    figure.supxlabel(x_label, color=MUTED, fontsize=9)
    return svg(figure, title)


def matrix(labels: Sequence[str], bars: Mapping[tuple[int, int], Bar], title: str, *, percent: bool = False) -> str:
    """Differences of pairs, row minus column, where `bars` has them; filled where the interval excludes zero."""
    size = len(labels)
    figure, axes = _figure(0.34 * size + 0.9, width=0.62 * size + 1.9)
    scale, words = (100.0, "{:+.1f}") if percent else (1.0, "{:+.2g}")
    for (row, column), bar in bars.items():
        tint = colour(bar.series)
        if bar.sure:
            axes.fill_between(
                [column - 0.46, column + 0.46], row - 0.42, row + 0.42, color=tint, alpha=0.22, linewidth=0
            )
        weight = "bold" if bar.sure else "normal"
        text = "=" if bar.low == bar.high == 0 else words.format(scale * bar.value)
        ink = INK if bar.sure else MUTED
        axes.text(column, row, text, ha="center", va="center", color=ink, fontsize=8, fontweight=weight)
    axes.set_xlim(-0.5, size - 0.5)
    axes.set_ylim(size - 0.5, -0.5)
    axes.set_xticks(range(size), labels, rotation=35, ha="left")
    axes.xaxis.set_ticks_position("top")
    axes.set_yticks(range(size), labels)
    axes.tick_params(length=0, colors=INK, labelsize=8.5)
    axes.grid(visible=False)
    for side in axes.spines.values():
        side.set_visible(False)
    return svg(figure, title)


def forest(bars: Sequence[Bar], x_label: str, title: str, *, percent: bool = False) -> str:
    """Differences with their intervals around zero; those that contain zero are hollow."""
    names = [bar.label if len(bar.label) <= 26 else bar.label.replace(" − ", " −\n") for bar in bars]
    figure, axes = _figure(0.75 + sum(0.36 if "\n" not in name else 0.5 for name in names), width=WIDTH * 1.2)
    scale = 100.0 if percent else 1.0
    axes.axvline(0.0, color=INK, linewidth=0.9)
    for place, bar in enumerate(reversed(bars)):
        tint = INK if bar.sure else MUTED
        axes.plot(
            [scale * bar.low, scale * bar.high], [place, place], color=tint, linewidth=2.0, solid_capstyle="round"
        )
        face = tint if bar.sure else "none"
        axes.plot(scale * bar.value, place, "o", color=tint, markerfacecolor=face, markersize=6.5, markeredgewidth=1.4)
    axes.set_yticks(range(len(bars)), list(reversed(names)))
    axes.set_ylim(-0.6, len(bars) - 0.4)
    axes.grid(visible=False, axis="y")
    axes.grid(visible=True, axis="x", color=GRID, linewidth=0.7)
    axes.tick_params(axis="y", length=0, colors=INK)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel(x_label)
    return svg(figure, title)


def bars(names: Sequence[str], series: Sequence[int], values: Sequence[float], texts: Sequence[str], title: str) -> str:
    """Horizontal bars, each with its amount written behind it."""
    figure, axes = _figure(0.35 + 0.3 * len(names), width=WIDTH * 0.78)
    most = max(values) or 1.0
    for place, (value, text, which) in enumerate(zip(values, texts, series, strict=True)):
        where = len(names) - 1 - place
        axes.barh(where, value, height=0.62, color=colour(which), linewidth=0)
        axes.text(value + 0.02 * most, where, text, va="center", ha="left", color=INK, fontsize=9)
    axes.set_yticks(range(len(names)), list(reversed(names)))
    axes.set_xlim(0, 1.22 * most)
    axes.grid(visible=False)
    axes.xaxis.set_visible(False)
    axes.tick_params(axis="y", length=0, colors=INK)
    for side in axes.spines.values():
        side.set_visible(False)
    return svg(figure, title)


def _mark_alone(axes: Axes, line: Curve, scale: float, tint: str) -> None:
    """A dot, with its band as a bar, for each point of a line that no stroke reaches: a stroke needs two neighbours."""
    finite = np.isfinite(line.y)
    moved = np.diff(line.x) != 0
    joined = finite[1:] & finite[:-1] & moved
    alone = finite & ~np.append(joined, False) & ~np.append(False, joined)
    if not alone.any():
        return
    x, y = line.x[alone], scale * line.y[alone]
    axes.plot(x, y, "o", color=tint, markersize=4.5)
    if line.low is not None and line.high is not None:
        axes.vlines(x, scale * line.low[alone], scale * line.high[alone], color=tint, alpha=0.4, linewidth=1.4)


def _short_numbers(axes: Axes, lines: Sequence[Curve]) -> None:
    """Write large numbers along x as 100 k and 2 M."""
    from matplotlib.ticker import EngFormatter

    if max((float(line.x.max()) for line in lines if line.x.size), default=0.0) >= 1e4:
        axes.xaxis.set_major_formatter(EngFormatter())


def smoothed(values: Values, window: int) -> Values:
    """A centred moving average of the finite values, narrower at both ends: (T,) -> (T,)."""
    kernel = np.ones(window)
    finite = np.isfinite(values)
    total = np.convolve(np.where(finite, values, 0.0), kernel, "same")
    weight = np.convolve(finite.astype(float), kernel, "same")
    return np.divide(total, weight, out=np.full(len(values), np.nan), where=weight > 0)


def _figure(height: float, width: float = WIDTH) -> tuple[Figure, Axes]:
    """An empty figure of this size in inches, in the page's style."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    _plain_axes(axes)
    return figure, axes


def _plain_axes(axes: Axes) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(GRID)
    axes.grid(visible=True, axis="y", color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED, labelsize=9, length=3, color=GRID)
    axes.xaxis.label.set(color=MUTED, size=9)


def svg(figure: Any, title: str) -> str:
    """The figure as an `<svg>` for a page: no document head, no metadata, ids of its own, colours as variables.

    figure: a figure of matplotlib.
    """
    import matplotlib

    written = io.StringIO()
    prefix = re.sub("[^a-z0-9]+", "-", title.casefold()).strip("-")
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title}):
        figure.savefig(written, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = written.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    box = re.search(r'viewBox="([^"]+)"', text)
    assert box is not None
    inside = text[text.index(">") + 1 :]
    inside = inside.replace("xlink:href", "href")
    inside = re.sub(r'\bid="', f'id="{prefix}-', inside)
    inside = re.sub(r'href="#', f'href="#{prefix}-', inside)
    inside = re.sub(r"url\(#", f"url(#{prefix}-", inside)
    inside = re.sub(r"'DejaVu Sans'[^;\"]*", "system-ui, sans-serif", inside)
    for stand_in, variable in _VARIABLES.items():
        inside = inside.replace(stand_in, f"var({variable})")
    label = title.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return f'<svg viewBox="{box[1]}" role="img" aria-label="{label}">{inside}'


DRAWS = frozenset(
    """svg g defs use symbol title desc style path rect circle ellipse line polyline polygon text tspan clipPath mask
    linearGradient radialGradient stop pattern marker image""".split()
)
"""The elements that a figure may have; they draw and do nothing else."""


def safe(figure: str) -> str:
    """The `<svg>` itself, drawn elsewhere, once it is known to be harmless inside a page.

    Raises `InputError` for anything that is not a well-formed svg, or that a browser would run or load.
    """
    try:
        if not isinstance(figure, str) or "<!" in figure or not figure.lstrip().startswith("<svg"):
            raise InputError(
                f"figure must be the text of one <svg> element, such as stepwell.figures.charts.svg gives, got "
                f"{figure!r:.60}."
            )
        elements = list(ElementTree.fromstring(figure).iter())
    except ElementTree.ParseError as error:
        raise InputError(f"figure must be well-formed XML, got an error: {error}.") from error
    for element in elements:
        tag = element.tag.rpartition("}")[2]
        texts = {name.rpartition("}")[2].casefold(): value for name, value in element.attrib.items()}
        links = [value for name, value in texts.items() if name in ("href", "src")]
        styles = [*texts.values(), element.text or ""] if tag == "style" else list(texts.values())
        if tag not in DRAWS or any(name.startswith("on") for name in texts):
            raise InputError(f"figure must only draw, got an element '{tag}', which may do more than that.")
        if any(not link.startswith(("#", "data:image/png;base64,")) for link in links) or any(
            re.search(r"@import|url\((?!#)|\\", style, re.IGNORECASE) for style in styles
        ):
            raise InputError(f"figure must hold all that it shows, got an element '{tag}' that refers elsewhere.")
    return figure
