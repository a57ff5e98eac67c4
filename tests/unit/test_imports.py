"""Arrows between modules go one way, and what needs no torch does not import it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "mptq"
STAGES = {"calibrate", "checkpoint", "quantize", "writers"}
SHARED = {"arch", "recipe", "types", "errors", "paths"}
MEGATRON = {"arch", "calibrate", "layer_work", "stream", "streams"}  # the last three for its types
ALLOWED = {
    "errors": set(),
    "types": set(),
    "units": set(),
    "hashing": set(),
    "paths": {"errors"},
    "quiet": set(),
    "recipe": {"errors", "paths", "quantize"},  # of quantize: ModelOpt's recipes, where one is named
    "arch": {"errors", "quiet", "types"},
    **dict.fromkeys(STAGES, SHARED | {"hashing", "quiet"}),
    "schemes": SHARED,
    "plan": SHARED | {"checkpoint", "schemes", "writers"},
    "forecast": SHARED | {"checkpoint", "plan"},
    "report": SHARED | {"forecast", "plan", "record", "units", "writers"},
    "options": SHARED | {"calibrate", "checkpoint", "hashing", "plan", "report", "writers"},
    "record": set(),
    "ranks": {"errors"},
    "experts": {"arch"},
    "streams": SHARED | STAGES | {"experts", "plan", "ranks"},
    "layer_work": SHARED | STAGES | {"plan", "ranks", "record", "report", "stream", "streams"},  # of stream: a type
    "stream": SHARED | STAGES | {"layer_work", "plan", "ranks", "record", "report", "streams"},
    "steps": {"errors", "options", "plan", "ranks", "record", "streams", "types", "writers"},
    "pipeline": {
        "arch",
        "errors",
        "forecast",
        "options",
        "plan",
        "ranks",
        "types",
        "record",
        "report",
        "steps",
        "stream",
        "streams",
    }
    | STAGES,
    "inspection": SHARED | {"checkpoint", "forecast", "plan", "report", "writers"},
    "verification": SHARED | {"checkpoint", "quantize", "writers", "inspection", "comparison", "hashing", "plan"},
    "comparison": SHARED | STAGES | {"plan", "report", "verification"},  # of verification: a type
    "cli": {
        "calibrate",
        "errors",
        "paths",
        "recipe",
        "record",
        "options",
        "plan",
        "pipeline",
        "ranks",
        "report",
        "inspection",
        "units",
        "verification",
    },
    "__main__": {"cli"},
    "__init__": {"inspection", "options", "pipeline", "plan", "recipe", "verification"},
}


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path.relative_to(PACKAGE).parts[0].removesuffix(".py"), path


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            if node.module == "mptq":
                yield from (f"mptq.{alias.name}" for alias in node.names)
            else:
                yield node.module


@pytest.mark.parametrize(("part", "path"), list(modules()), ids=lambda value: str(value)[-30:])
def test_arrows_go_one_way(part, path):
    for name in imported(path):
        top, _, rest = name.partition(".")
        if top == "mptq":
            target = rest.partition(".")[0]
            assert target == part or target in ALLOWED[part], f"{path} must not import {name}"
        elif top == "modelopt":
            assert part == "quantize", f"{path}: only quantize/ imports modelopt"
        elif top == "megatron":
            assert part in MEGATRON, f"{path}: only arch/ and calibrate/ import megatron"
        elif top in ("typer", "rich"):
            assert part == "cli", f"{path}: only cli/ prints"


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
def test_planning_imports_no_torch(code):
    heavy = "torch", "megatron", "modelopt", "transformers", "numpy", "datasets", "pyarrow", "matplotlib", "jinja2"
    check = f"{code}; import sys; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_public_names():
    import mptq

    assert all(callable(getattr(mptq, name)) for name in mptq.__all__)
    with pytest.raises(AttributeError):
        mptq.nothing  # noqa: B018
