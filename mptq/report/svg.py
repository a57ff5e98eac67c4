"""Renders matplotlib figures as inline SVG in the colors and font of the surrounding page.

Figures use placeholder colors, which `inline` replaces with the page's CSS variables, so that one drawing works on light and
dark pages. Heat map pixels cannot be recolored, but their color map is readable on both.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import XAxis, YAxis
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

INK, LINE, CARD = "#010201", "#010202", "#010203"
SERIES = tuple(f"#0103{number:02x}" for number in range(1, 9))
HEAT = "viridis"
_VARIABLES = {INK: "var(--ink)", LINE: "var(--line)", CARD: "var(--card)"} | {
    color: f"var(--series-{number})" for number, color in enumerate(SERIES, 1)
}
_STYLE: dict[Any, Any] = (
    {
        "svg.fonttype": "none",  # keep text as text: searchable, selectable and accessible
        "svg.hashsalt": "mptq",  # derive ids from this and the content instead of random numbers
        "text.parse_math": False,  # names may contain dollar signs
        "font.size": 10,
        "axes.linewidth": 0.8,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "legend.frameon": False,
        "lines.linewidth": 1.8,
        "lines.markersize": 3.5,
        "xtick.major.size": 3,
        "ytick.major.size": 0,
    }
    | dict.fromkeys(("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), INK)
    | dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color", "grid.color"), LINE)
)


@dataclass(frozen=True)
class Plot:
    """A plot: its title, alternative text, SVG, and whether it needs the full page width."""

    title: str
    text: str
    svg: str
    wide: bool = False


@contextmanager
def style() -> Iterator[None]:
    """Draws in mptq's style, regardless of the user's matplotlibrc."""
    import matplotlib as mpl

    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(_STYLE)
        yield


def axes(width: float, height: float, x: str, y: str, grid: Literal["x", "y"] | None = "y") -> tuple[Figure, Axes]:
    """Returns a figure, sized in CSS pixels, with one pair of labeled axes; `grid` is the axis with grid lines."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / 72, height / 72), dpi=72, layout="constrained")
    found = figure.add_subplot()
    found.set_xlabel(x)
    found.set_ylabel(y)
    if grid:
        found.grid(axis=grid, linewidth=0.6)
    return figure, found


def whole_ticks(axis: XAxis | YAxis) -> None:
    """Places ticks only at integers."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=12, steps=(1, 2, 5, 10), integer=True, min_n_ticks=1))


def legend(figure: Figure, target: Axes) -> None:
    """Adds a legend above the axes, where it cannot cover data; omitted for a single series."""
    handles, labels = target.get_legend_handles_labels()
    if len(labels) > 1:
        # About 6 pixels per letter, and 36 for the color sample and the gap.
        columns = int(figure.bbox.width / (6 * max(map(len, labels)) + 36))
        figure.legend(handles, labels, loc="outside upper left", ncols=max(1, columns), handlelength=1.4, columnspacing=1.2)


def heat(figure: Figure, target: Axes, values: list[list[float]], label: str, **options: Any) -> AxesImage:
    """Draws a heat map with its color bar: rows from top to bottom, NaN cells empty."""
    from matplotlib.ticker import FuncFormatter

    image = target.imshow(values, **{"cmap": HEAT, "aspect": "auto", "interpolation": "none"} | options)
    for spine in target.spines.values():
        spine.set_visible(False)
    bar = figure.colorbar(image, ax=target, label=label, pad=0.012, aspect=figure.bbox.height / 18)
    bar.formatter = FuncFormatter(lambda value, _: f"{value:,.6g}")
    bar.update_ticks()
    bar.outline.set_visible(False)
    bar.ax.tick_params(size=0)
    assert bar.solids is not None
    bar.solids.set_rasterized(True)  # avoids 256 SVG rectangles
    return image


def cell_lines(target: Axes, rows: int, columns: int) -> None:
    """Draws lines between the cells of a heat map, if they are large enough."""
    if rows <= 32:
        target.hlines([row - 0.5 for row in range(1, rows)], -0.5, columns - 0.5, colors=CARD, linewidth=1)
    if columns <= 32:
        target.vlines([column - 0.5 for column in range(1, columns)], -0.5, rows - 0.5, colors=CARD, linewidth=1)


def inline(figure: Figure, name: str) -> str:
    """Returns the figure as an SVG element for an HTML page; ids are prefixed with `name` to be unique on the page."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, dpi=144, metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<svg[^>]*viewBox=\"([^\"]*)\"[^>]*>", r'<svg viewBox="\1" aria-hidden="true">', text, count=1)
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>|<!--.*?-->|<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", text)
    text = re.sub(r"; font-family: [^;\"]*", "", text)
    text = _own_ids(text, name)
    for color, variable in _VARIABLES.items():
        text = text.replace(color, variable)
    return re.sub(r"\s*\n\s*", "\n", text).strip()


def _own_ids(text: str, name: str) -> str:
    """Drops unreferenced ids and prefixes the others with `name`."""
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', text))
    text = re.sub(r' id="([^"]*)"', lambda found: f' id="{name}-{found[1]}"' if found[1] in used else "", text)
    return re.sub(r'(xlink:href="#|url\(#)', rf"\g<1>{name}-", text).replace("xlink:href", "href")
