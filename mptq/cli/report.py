"""`mptq report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mptq.cli import console, tables


def report(
    output: Annotated[Path, typer.Argument(metavar="OUT", help="An output of mptq.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print report.json.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Print a line for every tensor.")] = False,
) -> None:
    """Show what a run did and what it cost."""
    from mptq.report import read

    document = read(output)
    if as_json:
        console.document(document)
        return
    if verbose:
        for row in document["tensors"]:
            console.result(tables.tensor_line(row))
    console.show(tables.summary(document))
