"""The wheel: its contents, and that installing it does not replace the user's torch."""

import re
import subprocess
import sys
import time
import zipfile

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import ROOT, run


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    pip = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", folder, ROOT)
    run(*pip)
    return next(folder.glob("mptq-*.whl"))


def test_recipes_types_and_templates_are_in_the_wheel(wheel, tmp_path):
    names = zipfile.ZipFile(wheel).namelist()
    assert "mptq/py.typed" in names
    assert {f"mptq/recipes/configs/{path.name}" for path in (ROOT / "mptq/recipes/configs").glob("*.yaml")} <= set(names)
    assert {f"mptq/report/{name}" for name in ("template.html.j2", "page.css", "page.js")} <= set(names)
    assert not [name for name in names if name.startswith(("tests", "scripts"))]
    zipfile.ZipFile(wheel).extractall(tmp_path)
    done = subprocess.run([sys.executable, "-m", "mptq", "recipes"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "fp8-blockwise" in done.stdout


def test_installing_replaces_no_package(wheel):
    """Every requirement accepts the installed versions, so pip would install only mptq."""
    done = run(sys.executable, "-m", "pip", "install", "--dry-run", "--no-index", "--force-reinstall", "--no-deps", wheel)
    assert "Would install mptq" in done.stdout
    done = run(sys.executable, "-m", "pip", "install", "--dry-run", "--no-index", "--upgrade", wheel)
    assert "torch" not in done.stdout.partition("Would install")[2]


def test_property_tests_have_no_time_limits():
    """All use one profile (tests/conftest.py): no test sets its own limit, and none fails because the machine is busy."""
    assert settings.default.deadline is None
    assert HealthCheck.too_slow in settings.default.suppress_health_check
    own = [path.name for path in sorted((ROOT / "tests").rglob("test_*.py")) if re.search(r"deadline[=]", path.read_text())]
    assert own == []


@given(st.integers())
@settings(max_examples=2)
def test_a_slow_example_is_not_a_failure(number):
    time.sleep(0.25)
