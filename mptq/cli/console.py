"""Where things are printed: results on stdout, everything for people on stderr."""

from __future__ import annotations

import json
import sys
import traceback
from typing import Any

from rich.console import Console, RenderableType

debug = False
"""Whether errors show their traceback (set by `mptq --debug`)."""

err = Console(stderr=True, highlight=False, soft_wrap=True)
out = Console(highlight=False, soft_wrap=True)


def show(content: RenderableType, console: Console = out, width: int = 160) -> None:
    """Print tables whole, which are up to `width` characters wide: on a narrow terminal lines wrap, and nothing is cut."""
    Console(file=console.file, highlight=False, soft_wrap=True, width=max(console.width, width)).print(content)


def result(text: str) -> None:
    """A line of the result, as it is."""
    sys.stdout.write(text + "\n")


def document(content: dict[str, Any]) -> None:
    """The result as one JSON document."""
    result(json.dumps(content, indent=1))


def fail(error: BaseException, message: str, code: int) -> int:
    """Print one line saying what is wrong, with the error's notes (and the traceback under --debug); return the exit code."""
    if debug:
        traceback.print_exception(error)
    lines = (message, *getattr(error, "__notes__", ()))
    err.print(f"mptq: {'; '.join(' '.join(line.split()) for line in lines)}", markup=False)
    return code
