"""The default dataset: English text and code that ship with every Python, read and never executed.

The documents are the same for the same release of Python.
"""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from mptq.calibration.datasets.documents import Document
from mptq.calibration.datasets.files import mapped, stretches
from mptq.errors import DataError

if TYPE_CHECKING:
    import numpy as np

    from mptq.calibration.datasets.options import DataOptions

TOPICS = "pydoc_data/topics.py"
"""The language reference as text: a module that assigns a dictionary of strings."""

MODULES = (
    "argparse ast asyncio/base_events asyncio/queues asyncio/tasks base64 bisect calendar cmd collections/__init__ "
    "concurrent/futures/_base configparser contextlib copy csv dataclasses difflib email/message enum fileinput fractions "
    "ftplib functools getopt gzip heapq html/parser http/client http/server imaplib inspect ipaddress json/decoder "
    "json/encoder logging/__init__ logging/handlers mailbox mimetypes multiprocessing/pool netrc numbers optparse pickle "
    "plistlib poplib pprint queue random sched selectors shelve shlex shutil smtplib socket ssl statistics subprocess "
    "tarfile tempfile textwrap threading timeit tokenize traceback types typing unittest/case unittest/mock urllib/parse "
    "urllib/request uuid wave weakref webbrowser xml/dom/minidom xml/etree/ElementTree zipfile/__init__"
)
"""Modules of the standard library that are written in Python, in 3.12 and later."""


def read_reference(name: str, options: DataOptions, bits: np.random.PCG64) -> Iterator[Document]:
    """Yields stretches of the language reference (English); raises DataError if this Python lacks it."""
    del name
    topics = sorted(_topics(_library_file(TOPICS)).items())
    return stretches([(f"topic {topic}", text.encode()) for topic, text in topics], options, bits)


def read_library(name: str, options: DataOptions, bits: np.random.PCG64) -> Iterator[Document]:
    """Yields stretches of the modules' source code; raises DataError if this Python lacks one."""
    del name
    modules = [f"{module}.py" for module in MODULES.split()]
    return stretches([(module, mapped(_library_file(module))) for module in modules], options, bits)


def _library_file(name: str) -> Path:
    path = Path(sysconfig.get_path("stdlib")) / name
    if not path.is_file():
        raise DataError(f"this Python has no {name}, which is part of the default data: pass --calib-dataset")
    return path


def _topics(path: Path) -> dict[str, str]:
    """Evaluates the literal dictionary in that file."""
    assigned = (node for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.Assign))
    found: dict[str, str] = ast.literal_eval(next(assigned).value)
    return found
