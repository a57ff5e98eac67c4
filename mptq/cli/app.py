"""The `mptq` command: its subcommands and how errors become exit codes. Importing it does not import torch."""

from __future__ import annotations

import gc
import os
import sys
from typing import Annotated

import typer

from mptq.cli import console
from mptq.cli.inspect import inspect
from mptq.cli.quantize import quantize
from mptq.cli.recipes import recipes
from mptq.cli.report import report
from mptq.cli.verify import verify
from mptq.errors import MptqError

EPILOG = (
    "Exit codes: 0 success, 1 error, 2 usage error, 3 a check or limit failed, 75 stopped by SIGTERM (continue with --resume), "
    "130 interrupted."
)

_GARBAGE = 50_000
"""Threshold of the garbage collector: imports allocate about a million objects that live until exit (docs/dev/log.md)."""

app = typer.Typer(
    name="mptq",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    epilog=EPILOG,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(value: bool) -> None:
    if value:
        from importlib.metadata import version

        console.result(f"mptq {version('mptq')}")
        raise typer.Exit


@app.callback()
def top(
    debug: Annotated[bool, typer.Option("--debug", help="Print the traceback of an error.")] = False,
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Convert a Megatron distributed checkpoint to an FP8 model, one layer at a time, on a GPU or CPU."""
    console.debug = debug


for command in (quantize, inspect, verify, recipes, report):
    app.command()(command)


def main() -> None:
    """Runs the command line; prints an MptqError as one line on stderr and exits with its code."""
    gc.set_threshold(_GARBAGE)
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch allocates large tensors in huge pages (docs/dev/log.md)
    try:
        app(standalone_mode=True)
    except MptqError as error:
        sys.exit(console.fail(error, str(error), error.exit_code))
    except KeyboardInterrupt as error:
        sys.exit(console.fail(error, "interrupted", 130))
    except BrokenPipeError:
        # The reader of our output closed the pipe (mptq inspect ... | head).
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        sys.exit(console.fail(error, f"{error.strerror or error}{where}", 1))
    finally:
        gc.freeze()  # skips a last collection over all objects at exit
