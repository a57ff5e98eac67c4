"""Output streams: results go to stdout, all other messages to stderr."""

from __future__ import annotations

import json
import sys
import traceback
from typing import Any

from rich.console import Console, RenderableType

debug = False
"""Whether errors are printed with their traceback (set by `mptq --debug`)."""

err = Console(stderr=True, highlight=False, soft_wrap=True)
out = Console(highlight=False, soft_wrap=True)


def show(content: RenderableType, console: Console = out, width: int = 160) -> None:
    """Prints tables of up to `width` characters without truncation: lines wrap on a narrower terminal."""
    Console(file=console.file, highlight=False, soft_wrap=True, width=max(console.width, width)).print(content)


def result(text: str) -> None:
    """Prints a line of the result to stdout, without markup."""
    sys.stdout.write(text + "\n")


def document(content: dict[str, Any]) -> None:
    """Prints the result as one JSON document."""
    result(json.dumps(content, indent=1))


def fail(error: BaseException, message: str, code: int) -> int:
    """Prints the error and its notes on one line (after the traceback under --debug) and returns the exit code."""
    if debug:
        traceback.print_exception(error)
    lines = (message, *getattr(error, "__notes__", ()))
    err.print(f"mptq: {'; '.join(' '.join(line.split()) for line in lines)}", markup=False)
    return code
