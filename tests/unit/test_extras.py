"""Packages that only some runs need: one line says which is missing, before anything is written."""

import subprocess
import sys

import pytest

from mptq import make_plan, run, verify
from mptq.calibration.datasets.sources import find_sources
from mptq.errors import DataError, OutputError
from mptq.extras import missing
from mptq.pipeline import preflight
from mptq.report import html, read


@pytest.fixture
def bare(monkeypatch):
    """An installation without the optional packages."""
    for name in ("datasets", "jinja2", "matplotlib", "pyarrow"):
        monkeypatch.setitem(sys.modules, name, None)


def test_the_command_that_installs_what_is_missing(bare):
    assert missing("torch") is None
    assert missing("torch", "pyarrow") == "the package pyarrow is not installed: pip install pyarrow"
    assert missing("jinja2", "matplotlib") == (
        "the packages jinja2, matplotlib are not installed: pip install jinja2 matplotlib"
    )


def test_a_run_without_data_has_all_but_the_page(aligned, bare, options, tmp_path):
    plan = make_plan(aligned, "fp8-blockwise")
    document = run(plan, tmp_path / "out", options)
    note = "no report.html: the packages jinja2, matplotlib are not installed: pip install jinja2 matplotlib"
    assert note in document["warnings"]
    assert read(tmp_path / "out")["fidelity"] is not None
    assert not (tmp_path / "out" / html.NAME).exists()
    assert verify(tmp_path / "out", aligned).failures == []
    with pytest.raises(OutputError, match=r"^.*page\.html cannot be written: the packages jinja2, matplotlib are not"):
        html.check(tmp_path / "page.html")


def test_with_the_packages_nothing_is_said(aligned, options, tmp_path):
    assert not any(html.NAME in note for note in preflight.check(make_plan(aligned, "none"), tmp_path / "out", options).notes)


@pytest.mark.parametrize(("name", "package"), [("rows.parquet", "pyarrow"), ("folder", "datasets"), ("org/name", "datasets")])
def test_data_that_needs_a_missing_package_is_refused(bare, name, package, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.parquet").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match=f"^dataset '{name}' cannot be read: the package {package} is not installed: pip"):
        find_sources((name,))


def test_without_them_nothing_is_imported():
    """The package and its command need none of them."""
    code = "import sys; sys.modules |= dict.fromkeys(('datasets', 'jinja2', 'matplotlib', 'pyarrow')); import mptq.cli.app"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
