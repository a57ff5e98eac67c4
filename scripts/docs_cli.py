"""A hook of mkdocs.yml: fills the page of the command line from the commands themselves."""

from __future__ import annotations

from typing import Any

import typer
from typer.cli import get_docs_for_click

from mptq.cli.app import app

PAGE = "reference/cli.md"


def on_page_markdown(markdown: str, *, page: Any, **_: object) -> str:
    """Append every command with its options to the page of the command line."""
    if page.file.src_uri != PAGE:
        return markdown
    command = typer.main.get_command(app)
    # Its first line is a title, which the page has.
    reference = get_docs_for_click(obj=command, ctx=typer.Context(command), name="mptq").partition("\n")[2]
    return markdown + reference
