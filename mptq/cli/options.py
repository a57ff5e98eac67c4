"""Options that several commands have: which checkpoint is meant, and what the user knows of its model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mptq.files import require_local

_PANEL = "Checkpoint"


def local_input(path: Path | None) -> Path | None:
    """Callback of a path that is read; raises MptqError for a URL."""
    if path is not None:
        require_local(path)
    return path


def local_output(path: Path | None) -> Path | None:
    """Callback of a path that is written; raises MptqError for a URL."""
    if path is not None:
        require_local(path, "written")
    return path


Iteration = Annotated[
    int | None,
    typer.Option(min=0, metavar="N", help="The root's iteration.", show_default="the latest", rich_help_panel=_PANEL),
]
Config = Annotated[
    list[str] | None,
    typer.Option(
        metavar="KEY=VALUE",
        help="A setting of the architecture that counts instead of the checkpoint's. Repeatable.",
        rich_help_panel=_PANEL,
    ),
]
HfConfig = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Hugging Face directory or config.json that tells the architecture.",
        rich_help_panel=_PANEL,
        callback=local_input,
    ),
]
