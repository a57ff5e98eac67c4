"""report.html in a browser: no console errors, everything drawn, sortable tables."""

import os
import re
import shutil
import subprocess
from dataclasses import dataclass

import pytest

from mptq.report.html import render
from tests.support.report_documents import Shape, document

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--enable-logging=stderr",
    "--dump-dom",
    "--virtual-time-budget=2000",
)
POLICY = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')


@dataclass
class Visit:
    dom: str
    console: list[str]


@pytest.fixture(scope="module")
def visit(tmp_path_factory):
    """Returns a function that opens a page in headless Chromium."""
    chromium = shutil.which("chromium")
    if chromium is None:
        assert not os.environ.get("CI"), "CI has no chromium: scripts/test.sh installs it where it may"
        pytest.skip("there is no chromium")

    def opened(page: str) -> Visit:
        folder = tmp_path_factory.mktemp("visit")
        (folder / "page.html").write_text(page, encoding="utf-8")
        command = [chromium, *FLAGS, f"--user-data-dir={folder / 'profile'}", (folder / "page.html").as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        return Visit(done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line])

    return opened


@pytest.fixture(scope="module")
def page():
    return render(document(Shape(layers=12, experts=4, formats=("hf", "megatron"))))


def with_script(page, code):
    """The page with an additional script, without the policy that would forbid it."""
    changed, count = POLICY.subn("", page)
    assert count == 1
    return changed.replace("</body>", f"<script>{code}</script></body>")


def test_sections_and_drawings_without_console_output(visit, page):
    seen = visit(page)
    assert seen.console == []
    for anchor in ("summary", "layers", "weights", "experts", "size", "calibration", "run"):
        assert f'<section id="{anchor}"' in seen.dom
    assert seen.dom.count("<svg") == page.count("<svg") == 11
    assert seen.dom.count("<image") == page.count("<image") > 0


@pytest.mark.parametrize("code", ["nothing.here()", "console.error('told')"])
def test_console_errors_are_captured(visit, page, code):
    assert visit(with_script(page, code)).console


def test_the_network_is_refused(visit, page):
    seen = visit(page.replace("</main>", '<img src="https://example.invalid/a.png"></main>'))
    assert any("Content Security Policy" in line for line in seen.console)


def test_foreign_scripts_do_not_run(visit, page):
    seen = visit(page.replace("</main>", "<script>document.title = 'changed'</script></main>"))
    assert "<title>changed" not in seen.dom
    assert any("Content Security Policy" in line for line in seen.console)


def rows(dom, section):
    """The first table of a section: the text of the cells of each row, and aria-sort of its columns."""
    table = re.search(rf'<section id="{section}".*?<table(.*?)</table>', dom, re.DOTALL)[1]
    body = table.partition("<tbody>")[2].partition("</tbody>")[0]
    return [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in body.split("<tr>")[1:]], re.findall('aria-sort="(.*?)"', table)


def click(section, *columns):
    heads = f'document.querySelectorAll("#{section} table")[0].tHead.rows[0].cells'
    return ";".join(f'{heads}[{column}].querySelector("button").click()' for column in columns)


def test_numbers_sort_as_numbers(visit, page):
    before, order = rows(page, "layers")
    assert [cells[0] for cells in before] == [str(layer) for layer in range(12)]
    assert order[:2] == ["ascending", "none"]
    once, order = rows(visit(with_script(page, click("layers", 0))).dom, "layers")
    assert [cells[0] for cells in once] == [str(layer) for layer in reversed(range(12))]  # 10 after 9, not after 1
    assert order[0] == "descending"
    by_error, order = rows(visit(with_script(page, click("layers", 3))).dom, "layers")
    errors = [float(cells[3].removesuffix(" %")) for cells in by_error]
    assert errors == sorted(errors, reverse=True)
    assert order[0] == "none"
    assert order[3] == "descending"


def test_cells_without_a_value_sort_last(visit, page):
    for clicks in ((-1,), (-1, -1)):
        column = len(rows(page, "layers")[1]) - 1
        found, order = rows(visit(with_script(page, click("layers", *[column] * len(clicks)))).dom, "layers")
        assert order[-1] == ("descending", "ascending")[len(clicks) - 1]
        assert found[-1][-1] == "\N{EN DASH}"
        values = [int(cells[-1]) for cells in found[:-1]]
        assert values == sorted(values, reverse=len(clicks) == 1)


def test_names_sort_as_names_and_the_total_stays(visit, page):
    seen = visit(with_script(page, click("size", 0)))
    found, order = rows(seen.dom, "size")
    names = [cells[0] for cells in found]
    assert names == sorted(document(Shape(layers=12, experts=4))["components"])
    assert order[0] == "ascending"
    assert "<tfoot><tr><td>total</td>" in seen.dom
    assert seen.console == []


def test_headers_are_buttons(page):
    heads = re.findall(r"<th .*?</th>", page)
    assert heads
    assert all('scope="col" aria-sort=' in head and '<button type="button">' in head for head in heads)
