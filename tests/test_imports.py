"""Arrows between modules go one way, and what needs no torch does not import it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "mptq"
STAGES = {"checkpoint", "quantize", "writers"}
SHARED = {"arch", "recipe", "types", "errors"}
ALLOWED = {
    "errors": set(),
    "types": set(),
    "recipe": {"errors"},
    "arch": {"errors", "types"},
    **dict.fromkeys(STAGES, SHARED),
    "plan": SHARED | {"checkpoint", "writers"},
    "report": SHARED | {"plan", "writers"},
    "record": set(),
    "stream": SHARED | STAGES | {"plan", "record", "report"},
    "pipeline": {"errors", "plan", "record", "report", "stream"} | STAGES,
    "inspection": SHARED | {"checkpoint", "writers"},
    "verification": SHARED | {"checkpoint", "writers", "inspection", "comparison"},
    "comparison": SHARED | STAGES | {"plan", "report", "verification"},  # of verification: a type
    "cli": {"errors", "recipe", "record", "plan", "pipeline", "report", "inspection", "verification"},
    "__main__": {"cli"},
    "__init__": {"inspection", "pipeline", "plan", "recipe", "verification"},
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
            assert part in ("arch", "stream"), f"{path}: only arch/ imports megatron"
        elif top in ("typer", "rich"):
            assert part == "cli", f"{path}: only cli/ prints"


@pytest.mark.parametrize(
    "code", ["import mptq", "import mptq.cli.app", "import mptq.inspection", "import mptq.plan, mptq.report"]
)
def test_planning_imports_no_torch(code):
    heavy = "torch", "megatron", "modelopt", "transformers", "numpy"
    check = f"{code}; import sys; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_public_names():
    import mptq

    assert all(callable(getattr(mptq, name)) for name in mptq.__all__)
    with pytest.raises(AttributeError):
        mptq.nothing  # noqa: B018
