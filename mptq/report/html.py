"""report.html: the report as a single self-contained HTML page that loads no external resources."""

from __future__ import annotations

import base64
import hashlib
import importlib
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mptq.errors import OutputError
from mptq.extras import missing
from mptq.formats import FORMATS
from mptq.report import figures, heatmaps, svg, tables
from mptq.report.formatting import change, duration, number, percent, size, uncertain
from mptq.report.svg import Plot
from mptq.report.tables import Table

NAME = "report.html"
_COLUMNS = 4
"""Maximum number of key figures per row; rows have equal length where possible."""
_GATES = {"max_kl": ("KL divergence", " nats"), "max_ppl_increase": ("perplexity increase", " %")}
"""Limit -> display name and unit."""


@dataclass(frozen=True)
class Section:
    """A section of the page: plots, tables, and tables that are initially collapsed."""

    anchor: str
    title: str
    plots: list[Plot]
    tables: list[Table]
    folded: list[Table]


@dataclass(frozen=True)
class Tile:
    """A key figure: its title, its value, and a note below it."""

    title: str
    figure: str
    note: str = ""


def render(document: Mapping[str, Any]) -> str:
    """Renders a report.json document as an HTML page without network references.

    Sections without data are omitted. The same document gives the same bytes. Of `tensors`, the page shows only the
    `tables.SHOWN` with the largest error, which keeps it small for any number of experts.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("mptq.report", ".")
    environment = Environment(
        loader=loader,
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = loader.get_source(environment, "page.js")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    tiles = _tiles(document)
    return environment.get_template("template.html.j2").render(
        document=document,
        model=_model(document),
        tiles=tiles,
        columns=math.ceil(len(tiles) / math.ceil(len(tiles) / _COLUMNS)),
        gates=[_gate(gate) for gate in document.get("gates", [])],
        sections=_sections(document),
        facts=_facts(document),
        recipe=yaml.safe_dump(dict(document["recipe"]), sort_keys=False, allow_unicode=True, width=100),
        shown=min(len(document["tensors"]), tables.SHOWN),
        script=script,
        script_sha256=digest,
    )


def unavailable() -> str | None:
    """Returns what to install before a page can be drawn; None if nothing is missing."""
    return missing("jinja2", "matplotlib")


def load() -> None:
    """Imports the packages that draw the page, if they are installed; it takes half a second."""
    if not unavailable():
        for name in ("jinja2", "matplotlib.figure", "matplotlib.ticker"):
            importlib.import_module(name)


def check(path: Path) -> None:
    """Raises OutputError if a page cannot be drawn here, or `path` is a directory or its parent does not exist."""
    if problem := unavailable():
        raise OutputError(f"{path} cannot be written: {problem}")
    if path.is_dir():
        raise OutputError(f"{path} is a directory: pass a file name, such as {path / NAME}")
    if not path.parent.is_dir():
        raise OutputError(f"{path} cannot be written: {path.parent} is not a directory; create it first")


def write(path: Path, text: str) -> None:
    """Writes a file atomically: under a temporary name in the same directory, then renamed.

    Raises OutputError if the directory is missing, not writable or full.
    """
    check(path)
    partial = path.parent / f".{path.name}.{os.getpid()}.partial"
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OutputError(f"{path} cannot be written: {error.strerror}") from error


def _model(document: Mapping[str, Any]) -> str:
    model = document["model"]
    facts = (
        ("num_layers", "{} layers"),
        ("hidden_size", "hidden {}"),
        ("num_experts", "{} experts"),
        ("vocab_size", "vocabulary {}"),
        ("dtype", "{}"),
    )
    parameters = sum(row["parameters"] for row in document["components"].values())
    return ", ".join(
        [f"{number(parameters)} parameters", *(words.format(model[key]) for key, words in facts if model.get(key))]
    )


def _tiles(document: Mapping[str, Any]) -> list[Tile]:
    forms = document["formats"]
    which = {form: f", {FORMATS[form].label}" if len(forms) > 1 else "" for form in forms}
    sizes, errors = document["bytes"], document["relative_error"]
    speed = document.get("bytes_per_second") or {}
    throughput = ", ".join(f"{stage} {size(rate)}/s" for stage, rate in speed.items() if rate is not None)
    return [
        *(
            Tile(
                f"Size{which[form]}",
                change(sizes["in"], sizes[form]),
                f"{percent(sizes[form] / sizes['in'], 1)} of the checkpoint",
            )
            for form in forms
        ),
        *_fidelity_tiles(document.get("fidelity")),
        *(
            Tile(f"Weight error{which[form]}", percent(errors[form], 2), "relative, all quantized weights")
            for form in forms
            if errors[form] is not None
        ),
        Tile("Wall time", duration(document["seconds"]["total"]), throughput),
        Tile("Peak memory", size(document["peak_rss_bytes"]), f"predicted {size(document['predicted_peak_bytes'])}"),
    ]


def _fidelity_tiles(fidelity: Mapping[str, Any] | None) -> list[Tile]:
    if fidelity is None:
        return []
    kl, perplexity, agreement = fidelity["kl"], fidelity["perplexity"], fidelity["top1_agreement"]
    before, after = perplexity["reference"], perplexity["quantized"]
    return [
        Tile(
            "KL divergence",
            uncertain(kl["mean"], kl["standard_error"]),
            f"nats per token, over {number(fidelity['tokens'])} tokens",
        ),
        Tile(
            "Perplexity ratio",
            uncertain(perplexity["ratio"], perplexity["ratio_standard_error"]),
            f"{before:.3f} → {after:.3f}",
        ),
        Tile(
            "Top-1 agreement",
            f"{uncertain(100 * agreement['mean'], agreement['standard_error'] and 100 * agreement['standard_error'])} %",
            "of most likely next tokens unchanged",
        ),
        *_unseen_tile(fidelity.get("unseen")),
    ]


def _unseen_tile(unseen: Mapping[str, Any] | None) -> list[Tile]:
    if unseen is None:
        return []
    kl = uncertain(unseen["kl"]["mean"], unseen["kl"]["standard_error"])
    return [Tile("KL, unseen kind of text", kl, f"nats per token, over {number(unseen['tokens'])} tokens")]


def _gate(gate: Mapping[str, Any]) -> dict[str, Any]:
    name, unit = _GATES[gate["name"]]
    value = "not measured" if gate["value"] is None else f"{gate['value']:.4g}{unit}"
    name += ", unseen kind of text" if gate.get("text") == "unseen" else ""
    return {"name": name, "value": value, "limit": f"{gate['limit']:.4g}{unit}", "met": gate["met"]}


def _sections(document: Mapping[str, Any]) -> list[Section]:
    forms = document["formats"]
    with svg.style():
        sections = [
            _section(
                "layers",
                "Layer by layer",
                [figures.relative_error(document), figures.cosine_distance(document)],
                [tables.layers(document)],
            ),
            _section(
                "weights",
                "Weights",
                [
                    *(heatmaps.signal_to_noise(document, form) for form in forms),
                    *(heatmaps.output_errors(document, form) for form in forms),
                    figures.weight_amax(document),
                    figures.input_amax(document),
                ],
                [tables.tensors(document)],
            ),
            _section("experts", "Experts", [heatmaps.expert_tokens(document)]),
            _section(
                "size",
                "Size",
                [figures.sizes(document)],
                [tables.components(document), tables.schemes(document)],
                [
                    tables.names("Excluded: Hugging Face modules that are not quantized", document["excluded"]),
                    tables.names("Differing: weights whose values differ between the outputs", document["differing"]),
                    tables.names("Dropped: checkpoint keys that are in no output", document["dropped"], document["dropped"]),
                ],
            ),
            _section("calibration", "Calibration data", [], [tables.datasets(document)]),
            _section("run", "The run", [figures.times(document)], [tables.versions(document)]),
        ]
    return [section for section in sections if section.plots or section.tables]


def _section(
    anchor: str,
    title: str,
    plots: Iterable[Plot | None],
    tables: Iterable[Table | None] = (),
    folded: Iterable[Table | None] = (),
) -> Section:
    """Returns a section without the plots and tables that are None."""
    return Section(
        anchor,
        title,
        [plot for plot in plots if plot is not None],
        [table for table in tables if table is not None],
        [table for table in folded if table is not None],
    )


def _facts(document: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns facts about the calibration data, as names and values."""
    found = document.get("calibration")
    if found is None:
        return []
    where = "on disk" if found["activations_on_disk"] else "in memory"
    return [
        ("calibrated on", _sequences(found["calibration"])),
        ("evaluated on", f"{_sequences(found['held_out'])}, held out"),
        *([("and on", f"{found['unseen']['name']}: {_sequences(found['unseen'])}")] if found.get("unseen") else []),
        (
            "sequences",
            f"of {found['seq_length']} tokens, {'packed' if found['packed'] else 'one document each'}, seed {found['seed']}",
        ),
        ("method", f"{found['method']}; each layer is calibrated on activations of the {found['propagate']} model"),
        ("activations", f"{size(found['activation_bytes'])} {where}"),
        ("tokenizer", found["tokenizer"] or "none: the data is token ids"),
    ]


def _sequences(found: Mapping[str, Any]) -> str:
    return f"{number(found['sequences'])} sequences, {number(found['tokens'])} tokens (sha256 {found['sha256'][:12]})"
