"""The `mptq` command: its subcommands, and what becomes of errors. Importing it imports no torch."""

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
    "Exit codes: 0 done, 1 failed, 2 usage, 3 a check was not met, 75 stopped by SIGTERM (--resume goes on), 130 interrupted."
)

_GARBAGE = 50_000
"""Objects that are made before some are looked through: imports make a million of them, to stay (docs/log.md)."""

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
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Turn a Megatron distributed checkpoint into an FP8 model, one layer at a time, on a GPU or a CPU."""
    console.debug = debug


for command in (quantize, inspect, verify, recipes, report):
    app.command()(command)


def main() -> None:
    """Run the command line; every MptqError is one line on stderr and its exit code."""
    gc.set_threshold(_GARBAGE)
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch, once imported, has large tensors in huge pages (docs/log.md)
    try:
        app(standalone_mode=True)
    except MptqError as error:
        sys.exit(console.fail(error, str(error), error.exit_code))
    except KeyboardInterrupt as error:
        sys.exit(console.fail(error, "interrupted", 130))
    except BrokenPipeError:
        # The reader of our output has seen enough (mptq inspect ... | head).
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        sys.exit(console.fail(error, f"{error.strerror or error}{where}", 1))
    finally:
        gc.freeze()  # the process ends: nobody needs to look through all of its objects once more
