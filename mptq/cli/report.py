"""`mptq report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mptq.cli import console, options


def report(
    output: Annotated[
        Path, typer.Argument(metavar="OUT", help="Output directory of `mptq quantize`.", callback=options.local_input)
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print report.json.")] = False,
    html: Annotated[
        Path | None,
        typer.Option("--html", metavar="FILE", help="Write the report as an HTML page.", callback=options.local_output),
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Print one line per tensor.")] = False,
) -> None:
    """Show the report of a run: errors, fidelity, sizes and times."""
    from mptq.cli import tables
    from mptq.report import read

    document = read(output)
    if html is not None:
        write_page(html, document)
    if as_json:
        console.document(document)
        return
    if verbose:
        for row in document["tensors"]:
            console.result(tables.tensor_line(row))
    console.show(tables.summary(document))


def write_page(path: Path, document: dict[str, Any]) -> None:
    """Writes the report as an HTML page; raises OutputError if `path` cannot be written."""
    from mptq.report import html

    html.check(path)  # fails early: drawing takes a second
    html.write(path, html.render(document))
    console.err.print(f"written to  {path}", markup=False)
