"""`mptq verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mptq.cli import console, options
from mptq.errors import VerificationError


def verify(
    output: Annotated[
        Path, typer.Argument(metavar="OUT", help="Output directory of `mptq quantize`.", callback=options.local_input)
    ],
    against: Annotated[
        Path | None,
        typer.Option(
            metavar="CKPT", help="Also compare every value with this source checkpoint.", callback=options.local_input
        ),
    ] = None,
    iteration: options.Iteration = None,
    config: options.Config = None,
    hf_config: options.HfConfig = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check the hashes, tensor names, shapes and scales of an output. Exits with code 3 if a check fails."""
    from mptq.model.source import SourceOptions
    from mptq.verification.structure import verify as check

    found = check(output, against, SourceOptions(iteration, tuple(config or ()), hf_config))
    if as_json:
        console.document(found.document)
    else:
        compared = f", {found.compared} compared with the source" if against else ""
        console.result(f"{found.files} files hashed, {found.tensors} tensors checked{compared}")
    if found.failures:
        for line in found.failures[:20]:
            console.err.print(line, markup=False)
        raise VerificationError(f"{output} failed {len(found.failures)} checks, the first: {found.failures[0]}")
    if not as_json:
        console.result("ok")
