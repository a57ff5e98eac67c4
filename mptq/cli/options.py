"""Options shared by several commands: which checkpoint to read, and overrides for its model settings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mptq.files import require_local

_PANEL = "Checkpoint"


def local_input(path: Path | None) -> Path | None:
    """Callback for a path to read; raises MptqError for a URL."""
    if path is not None:
        require_local(path)
    return path


def local_output(path: Path | None) -> Path | None:
    """Callback for a path to write; raises MptqError for a URL."""
    if path is not None:
        require_local(path, "written")
    return path


Iteration = Annotated[
    int | None,
    typer.Option(
        min=0, metavar="N", help="Iteration to read from a checkpoint root.", show_default="latest", rich_help_panel=_PANEL
    ),
]
Config = Annotated[
    list[str] | None,
    typer.Option(
        metavar="KEY=VALUE",
        help="Override an architecture setting of the checkpoint. Repeatable.",
        rich_help_panel=_PANEL,
    ),
]
HfConfig = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Hugging Face directory or config.json that describes the architecture.",
        rich_help_panel=_PANEL,
        callback=local_input,
    ),
]
