"""Drawing: matplotlib figures as inline SVG in the colors and the font of the page around them.

Figures are drawn in colors that stand for roles; `inline` replaces these by the page's CSS variables, so that one drawing
serves light and dark pages. Pixels of heat maps cannot be recolored: their color map reads well on both.
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
        "svg.fonttype": "none",  # text stays text: it can be searched, selected and read aloud
        "svg.hashsalt": "mptq",  # ids are hashes of this and the content, not random
        "text.parse_math": False,  # a name may hold dollars
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
    """A drawing: its title, what it says in words (for who cannot see it), its SVG, and whether it needs the full width."""

    title: str
    text: str
    svg: str
    wide: bool = False


@contextmanager
def style() -> Iterator[None]:
    """Draw in mptq's style, whatever the user's matplotlibrc says."""
    import matplotlib as mpl

    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(_STYLE)
        yield


def axes(width: float, height: float, x: str, y: str, grid: Literal["x", "y"] | None = "y") -> tuple[Figure, Axes]:
    """A figure of so many CSS pixels with one pair of labelled axes; `grid` is the axis whose ticks get lines."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / 72, height / 72), dpi=72, layout="constrained")
    found = figure.add_subplot()
    found.set_xlabel(x)
    found.set_ylabel(y)
    if grid:
        found.grid(axis=grid, linewidth=0.6)
    return figure, found


def whole_ticks(axis: XAxis | YAxis) -> None:
    """Ticks at whole numbers only."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=12, steps=(1, 2, 5, 10), integer=True, min_n_ticks=1))


def legend(figure: Figure, target: Axes) -> None:
    """The names above the axes, outside them: it never hides data."""
    handles, labels = target.get_legend_handles_labels()
    if len(labels) > 1:
        # About 6 pixels a letter, and 36 for the sample of the color and the gap.
        columns = int(figure.bbox.width / (6 * max(map(len, labels)) + 36))
        figure.legend(handles, labels, loc="outside upper left", ncols=max(1, columns), handlelength=1.4, columnspacing=1.2)


def heat(figure: Figure, target: Axes, values: list[list[float]], label: str, **options: Any) -> AxesImage:
    """A heat map of rows from top to bottom, NaN left empty, with its color bar."""
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
    bar.solids.set_rasterized(True)  # 256 rectangles otherwise
    return image


def cell_lines(target: Axes, rows: int, columns: int) -> None:
    """Part the cells of a heat map, where they are large enough to be told apart."""
    if rows <= 32:
        target.hlines([row - 0.5 for row in range(1, rows)], -0.5, columns - 0.5, colors=CARD, linewidth=1)
    if columns <= 32:
        target.vlines([column - 0.5 for column in range(1, columns)], -0.5, rows - 0.5, colors=CARD, linewidth=1)


def inline(figure: Figure, name: str) -> str:
    """The figure as an SVG element for an HTML page; its ids begin with `name`, which makes them unique on the page."""
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
    """Drop the ids that nothing refers to, and put `name` before the others."""
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', text))
    text = re.sub(r' id="([^"]*)"', lambda found: f' id="{name}-{found[1]}"' if found[1] in used else "", text)
    return re.sub(r'(xlink:href="#|url\(#)', rf"\g<1>{name}-", text).replace("xlink:href", "href")
