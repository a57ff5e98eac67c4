"""Imports between modules go one way, and modules that need no torch do not import it."""

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mptq.formats import FORMATS

PACKAGE = Path(__file__).parents[2] / "mptq"
ORDER = [
    *("errors", "extras", "types", "files", "quiet"),
    *("checkpoint", "model", "recipes", "quantize", "output", "formats", "layers", "plan", "distributed", "calibration"),
    *("report", "inspection", "verification", "pipeline", "cli", "__init__", "__main__"),
]
"""Each imports only from those before it, including for type checking: the diagram in docs/dev/architecture.md."""
HOMES = {
    "modelopt": {"quantize", "recipes"},
    "megatron": {"calibration", "layers", "pipeline"},
    "typer": {"cli"},
    "rich": {"cli"},
}
"""Libraries that only these packages may import (pipeline imports megatron for its types)."""


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path.relative_to(PACKAGE).parts[0].removesuffix(".py"), path


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize(("part", "path"), list(modules()), ids=lambda value: str(value)[-30:])
def test_imports_go_one_way(part, path):
    for name in imported(path):
        top, _, rest = name.partition(".")
        if top == "mptq":
            target = rest.partition(".")[0]
            assert target == part or ORDER.index(target) < ORDER.index(part), f"{path} must not import {name}"
        assert part in HOMES.get(top, {part}), f"{path}: {top} is imported by {' and '.join(HOMES[top])} only"


def test_no_imports_are_circular():
    """Within packages too, including imports for type checking."""
    names = {".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): path for _, path in modules()}
    graph = {
        name: {target for found in imported(path) for target in (found, found.rpartition(".")[0]) if target in names}
        for name, path in names.items()
        if path.name != "__init__.py"
    }
    assert list(graphlib.TopologicalSorter({name: graph[name] - {name} for name in graph}).static_order())


def test_nothing_outside_formats_compares_format_names():
    names = "|".join(FORMATS)
    compared = re.compile(rf"""(?:==|!=|\bin\b)\s*\(?["'](?:{names})["']|["'](?:{names})["']\s*(?:==|!=|\bin\b)""")
    found = [str(path) for part, path in modules() if part not in ("formats", "cli") and compared.search(path.read_text())]
    assert found == []


@pytest.mark.parametrize(
    "code",
    [
        "import mptq",
        "import mptq.cli.app",
        "import mptq.inspection",
        "import mptq.plan.plan, mptq.report, mptq.report.html",
        "import mptq.calibration.tokens",
    ],
)
def test_planning_does_not_import_torch(code):
    heavy = "torch", "megatron", "modelopt", "transformers", "numpy", "datasets", "pyarrow", "matplotlib", "jinja2"
    check = f"{code}; import sys; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_public_names():
    import mptq

    assert all(callable(getattr(mptq, name)) for name in mptq.__all__)
    assert not hasattr(mptq, "nothing")
