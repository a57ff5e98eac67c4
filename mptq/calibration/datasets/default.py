"""The default data: texts of many kinds in files of this package, the same everywhere (NOTICE names their sources)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from mptq.calibration.datasets.documents import Document
from mptq.calibration.datasets.files import stretches

if TYPE_CHECKING:
    import numpy as np

    from mptq.calibration.datasets.options import DataOptions

WEIGHTS = {"technical": 2.0, "prose": 2.0, "code": 2.0, "dialogue": 1.5, "mathematics": 1.0, "languages": 1.5}
"""The kinds of text that calibrate, and their shares."""
UNSEEN = "plays"
"""The kind of text that never calibrates: fidelity is measured on it too."""
TEXTS = Path(__file__).parent / "texts"
"""Directory of the texts: a JSON Lines file for each kind, with title and text in a line."""


def read(name: str, options: DataOptions, bits: np.random.PCG64) -> Iterator[Document]:
    """Yields stretches of the texts of the kind `name`."""
    with (TEXTS / f"{name}.jsonl").open(encoding="utf-8", newline="\n") as file:
        rows = [json.loads(line) for line in file]
    return stretches([(f"{name}, {row['title']}", row["text"].encode()) for row in rows], options, bits)
