"""Line and bar plots of the page. Each function returns a plot, or None if the document has no data for it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from mptq.formats import FORMATS
from mptq.report import svg, views
from mptq.report.formatting import duration, percent, size
from mptq.report.svg import SERIES, Plot

_SIZE = (560, 300)
_BAR = 34
"""Height of a horizontal bar including its gap, in CSS pixels."""


def relative_error(document: Mapping[str, Any]) -> Plot | None:
    """Relative error of the hidden state and of the weights, by layer."""
    lines = {f"weights, {FORMATS[form].label}": views.by_layer(document, form) for form in document["formats"]}
    lines["hidden state"] = views.by_layer(document, "hidden_relative_error")
    lines = {name: [100 * value for value in values] for name, values in lines.items() if views.known(values)}
    return _by_layer("Relative error by layer", "relative error [%]", lines, _short) if lines else None


def cosine_distance(document: Mapping[str, Any]) -> Plot | None:
    """1 - cosine similarity of the reference and quantized hidden states, by layer."""
    values = [1 - value for value in views.by_layer(document, "hidden_cosine")]
    if not views.known(values):
        return None
    return _by_layer("Hidden state: 1 - cosine by layer", "1 - cosine", {"1 - cosine": values}, _short)


def input_amax(document: Mapping[str, Any]) -> Plot | None:
    """Input amax of each static activation scale, by layer; modules with the same values share a line."""
    form = document["formats"][0]
    modules = views.grid(views.of_format(document, form), "input_amax", len(document["layers"]), max)
    shared: dict[str, list[str]] = {}
    for name, values in modules.items():
        shared.setdefault(repr(values), []).append(name)
    lines = {", ".join(names): modules[names[0]] for names in shared.values()}
    return _by_layer("Largest input by layer (static scales)", "input amax", lines, _short) if lines else None


def _by_layer(title: str, unit: str, lines: Mapping[str, Sequence[float]], words: Any) -> Plot:
    figure, axes = svg.axes(*_SIZE, "layer", unit)
    for (name, values), color in zip(lines.items(), SERIES * len(lines), strict=False):
        axes.plot(range(len(values)), values, color=color, marker="o" if len(values) <= 40 else "", label=name)
    everything = views.known(value for values in lines.values() for value in values)
    if min(everything) > 0 and max(everything) > 8 * min(everything):
        axes.set_yscale("log")
        _log_ticks(axes, words)
    else:
        axes.set_ylim(0, max(everything) * 1.12 or 1)
        axes.yaxis.set_major_formatter(lambda value, _: words(value))
    svg.whole_ticks(axes.xaxis)
    svg.legend(figure, axes)
    text = "; ".join(_line_in_words(name, values, words) for name, values in lines.items())
    return Plot(title, f"{title}. {text}.", svg.inline(figure, _slug(title)))


def _log_ticks(axes: Any, words: Any) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

    low, high = axes.get_ylim()
    subs = (1.0, 2.0, 5.0) if math.log10(high / low) < 2.5 else (1.0,)
    axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=20))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(lambda value, _: words(value))


def _line_in_words(name: str, values: Sequence[float], words: Any) -> str:
    found = [(value, layer) for layer, value in enumerate(values) if not math.isnan(value)]
    (low, low_at), (high, high_at) = min(found), max(found)
    return f"{name}: from {words(low)} (layer {low_at}) to {words(high)} (layer {high_at})"


def weight_amax(document: Mapping[str, Any]) -> Plot | None:
    """Histogram of the amax of the quantized weights."""
    rows = views.of_format(document, document["formats"][0])
    counts = Counter(math.floor(2 * math.log2(row["amax"])) for row in rows if row["amax"] > 0)
    if not counts:
        return None
    figure, axes = svg.axes(*_SIZE, "log2 of weight amax", "quantized weights")
    bins = range(min(counts), max(counts) + 1)
    axes.bar([half / 2 for half in bins], [counts[half] for half in bins], width=0.46, align="edge", color=SERIES[0])
    svg.whole_ticks(axes.yaxis)
    title = "Distribution of the weights' amax"
    (peak, count), total = counts.most_common(1)[0], counts.total()
    text = (
        f"{title}: {total} weights between {2 ** (min(bins) / 2):.3g} and {2 ** (max(bins) / 2 + 0.5):.3g}; most "
        f"({count}) between {2 ** (peak / 2):.3g} and {2 ** (peak / 2 + 0.5):.3g}."
    )
    return Plot(title, text, svg.inline(figure, "amax"))


def sizes(document: Mapping[str, Any]) -> Plot | None:
    """Stacked bytes of the components in the checkpoint and in each output."""
    components = {name: row for name, row in document["components"].items() if row["in"]}
    bars = {"in": "checkpoint"} | {form: FORMATS[form].label for form in document["formats"]}
    largest = max(document["bytes"].values())
    unit, name = next((10.0**power, name) for power, name in ((9, "GB"), (6, "MB"), (0, "bytes")) if largest >= 10**power)
    figure, axes = svg.axes(_SIZE[0], 120 + _BAR * len(bars), f"size [{name}]", "", grid="x")
    left = dict.fromkeys(bars, 0.0)
    for (component, row), color in zip(components.items(), SERIES * len(components), strict=False):
        widths = [row.get(key, 0) / unit for key in bars]
        axes.barh(list(bars.values()), widths, left=list(left.values()), height=0.62, color=color, label=component)
        left = {key: start + width for (key, start), width in zip(left.items(), widths, strict=True)}
    for index, key in enumerate(bars):
        axes.annotate(size(left[key] * unit), (left[key], index), (5, 0), textcoords="offset points", va="center")
    axes.set_xlim(0, max(left.values()) * 1.17)
    axes.invert_yaxis()
    axes.spines["left"].set_visible(False)
    svg.legend(figure, axes)
    title = "Size before and after, by component"
    text = "; ".join(
        f"{label}: {size(left[key] * unit)} ("
        + ", ".join(f"{component} {size(row.get(key, 0))}" for component, row in components.items())
        + ")"
        for key, label in bars.items()
    )
    return Plot(title, f"{title}. {text}.", svg.inline(figure, "sizes"))


def times(document: Mapping[str, Any]) -> Plot | None:
    """Seconds of each stage, longest first."""
    stages = sorted(((spent, stage) for stage, spent in document["seconds"].items() if stage != "total"), reverse=True)
    total = document["seconds"]["total"]
    if not stages or not total:
        return None
    figure, axes = svg.axes(_SIZE[0], 70 + _BAR * 0.8 * len(stages), "time [s]", "", grid="x")
    axes.barh([stage for _, stage in stages], [spent for spent, _ in stages], height=0.62, color=SERIES[0])
    for index, (spent, _) in enumerate(stages):
        label = f"{duration(spent)} ({percent(spent / total, 0)})"
        axes.annotate(label, (spent, index), (5, 0), textcoords="offset points", va="center")
    axes.set_xlim(0, stages[0][0] * 1.32 or 1)
    axes.invert_yaxis()
    axes.spines["left"].set_visible(False)
    title = "Where the time went"
    text = ", ".join(f"{stage} {duration(spent)}" for spent, stage in stages)
    return Plot(title, f"{title}: {text}, {duration(total)} in total.", svg.inline(figure, "times"))


def _short(value: float) -> str:
    return f"{value:.3g}"


def _slug(title: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in title.lower())
