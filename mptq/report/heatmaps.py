"""Heat maps of the page: modules by layer, and experts by layer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from mptq.formats import FORMATS
from mptq.report import svg, views
from mptq.report.svg import Plot

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WIDTH = 1150
_EMPTY = "#8d8d8d"
_NONE = 0.5
"""Represents 0 tokens on the logarithmic scale, which starts at 1."""
FALLBACK = "#ff3b30"
"""Color of the marks for experts with too few tokens; differs from viridis in hue and lightness."""


def signal_to_noise(document: Mapping[str, Any], form: str) -> Plot | None:
    """Signal-to-noise ratio of the weights of an output, by module and layer; for experts, the lowest in the layer."""
    table = views.grid(views.of_format(document, form), "sqnr_db", len(document["layers"]), min)
    if not table:
        return None
    lowest, name, layer = min(_cells(table))
    title = f"Signal-to-noise ratio of the weights ({FORMATS[form].label})"
    text = f"{title}, by module and layer. Lowest: {lowest:.2f} dB, {name} of layer {layer}."
    note = " For experts, the lowest in the layer." if any("expert" in name for name in table) else ""
    return Plot(title, text + note, svg.inline(_map(table, "SNR [dB]"), f"snr-{form}"), wide=True)


def output_errors(document: Mapping[str, Any], form: str) -> Plot | None:
    """Errors of the outputs against those of rounding to nearest, by module and layer; for experts, the highest."""
    rows = [
        {**row, "ratio": row["output_error"] / row["output_error_nearest"]}
        for row in views.of_format(document, form)
        if row.get("output_error") is not None and row.get("output_error_nearest")
    ]
    table = views.grid(rows, "ratio", len(document["layers"]), max)
    if not table:
        return None
    highest, name, layer = max(_cells(table))
    title = f"Error of the outputs against rounding to nearest ({FORMATS[form].label})"
    text = f"{title}, by module and layer, on withheld inputs. Highest: {highest:.2f}, {name} of layer {layer}."
    note = " For experts, the highest in the layer." if any("expert" in name for name in table) else ""
    return Plot(title, text + note, svg.inline(_map(table, "ratio"), f"outputs-{form}"), wide=True)


def _cells(table: Mapping[str, list[float]]) -> Iterator[tuple[float, str, int]]:
    """Yields value, module and layer of each cell that has a value."""
    for name, line in table.items():
        yield from ((value, name, layer) for layer, value in enumerate(line) if not math.isnan(value))


def _map(table: Mapping[str, list[float]], label: str) -> Figure:
    figure, axes = svg.axes(_WIDTH, 96 + 26 * len(table), "layer", "", grid=None)
    svg.heat(figure, axes, list(table.values()), label)
    axes.set_yticks(range(len(table)), list(table))
    svg.cell_lines(axes, len(table), len(next(iter(table.values()))))
    svg.whole_ticks(axes.xaxis)
    return figure


def expert_tokens(document: Mapping[str, Any]) -> Plot | None:
    """Calibration tokens of each expert, by layer; experts that use the layer's largest scale are marked."""
    rows = views.covered(document)
    if not rows:
        return None
    layers, experts = len(document["layers"]), max(len(row["experts"]["tokens"]) for row in rows)
    tokens = [[views.NAN] * layers for _ in range(experts)]
    for row in rows:
        for expert, count in enumerate(row["experts"]["tokens"]):
            tokens[expert][row["layer"]] = count or _NONE
    figure, axes = svg.axes(_WIDTH, min(620, 120 + 18 * experts), "layer", "expert", grid=None)
    _draw_tokens(figure, axes, tokens, [(row["layer"], expert) for row in rows for expert in row["experts"]["fallback"]])
    everything = sorted(count for row in rows for count in row["experts"]["tokens"])
    fallbacks = sum(len(row["experts"]["fallback"]) for row in rows)
    title = "Calibration tokens of each expert"
    text = (
        f"{title}, by layer: from {everything[0]} to {everything[-1]}, median {everything[len(everything) // 2]}; "
        f"{everything.count(0)} of {len(everything)} experts received none, and {fallbacks} use the layer's largest scale "
        "instead of their own."
    )
    return Plot(title, text, svg.inline(figure, "experts"), wide=True)


def _draw_tokens(figure: Figure, axes: Axes, tokens: list[list[float]], marks: list[tuple[int, int]]) -> None:
    import matplotlib as mpl
    from matplotlib.colors import LogNorm
    from matplotlib.lines import Line2D

    experts, layers = len(tokens), len(tokens[0])
    most = max(views.known(value for line in tokens for value in line))
    colors = mpl.colormaps[svg.HEAT].with_extremes(under=_EMPTY)
    svg.heat(figure, axes, tokens, "tokens (log scale)", norm=LogNorm(1, max(most, 2)), cmap=colors)
    svg.cell_lines(axes, experts, layers)
    svg.whole_ticks(axes.xaxis)
    svg.whole_ticks(axes.yaxis)
    legend = []
    if marks:
        cell = min((_WIDTH - 180) / layers, 480 / experts)
        mark: dict[str, Any] = {"marker": "o", "linestyle": "", "color": FALLBACK, "markeredgecolor": "white"}
        shape = mark | {"markersize": min(max(0.7 * cell, 2.5), 7), "markeredgewidth": 0.6 if cell > 8 else 0}
        # Rasterize: thousands of marks would be thousands of SVG elements.
        axes.plot([layer for layer, _ in marks], [expert for _, expert in marks], rasterized=True, **shape)
        legend.append(Line2D([], [], markersize=6, label="scale from the layer's largest input", **mark))
    if any(value == _NONE for line in tokens for value in line):
        legend.append(Line2D([], [], marker="s", linestyle="", markersize=8, color=_EMPTY, label="no tokens"))
    if legend:
        figure.legend(handles=legend, loc="outside upper left", ncols=2)
