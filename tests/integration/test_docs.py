"""The documentation: it builds without a warning, links lead somewhere, and commands have only options that exist."""

import os
import re
import shlex
import subprocess
import sys
from html import unescape
from pathlib import Path

import pytest
import typer

from mptq.cli.app import app

ROOT = Path(__file__).parents[2]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/*.md")]
COMMANDS = typer.main.get_command(app).commands


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("docs") / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder]
    quiet = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=quiet, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_site_needs_no_network(site):
    """Browsers fetch what `src` and stylesheets name; links may lead anywhere."""
    for page in site.rglob("*.html"):
        fetched = re.findall(
            r'(?:<script[^>]*|<img[^>]*) src="?([^" >]+)|<link[^>]*rel="?stylesheet[^>]*href="?([^" >]+)', page.read_text()
        )
        assert [name for pair in fetched for name in pair if name.startswith(("http", "//"))] == [], page


def options(command):
    return {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts) if name[0] == "-"}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_page_of_the_command_line_has_every_option(site, name):
    page = unescape(re.sub(r"<[^>]+>", "", (site / "reference" / "cli" / "index.html").read_text()))
    for option in options(COMMANDS[name]):
        assert option in page, option


def test_the_page_of_the_python_interface_has_every_public_name(site):
    import mptq

    page = (site / "reference" / "python" / "index.html").read_text()
    for name in mptq.__all__:
        assert f'id="mptq.{name}"' in page, name


def anchors(page):
    """The anchors of a page's headings, as GitHub and mkdocs make them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|srcset)="([^"]+)"', text)
    for link in links:
        if link.startswith(("http://", "https://", "mailto:")):
            continue
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


def shown(page):
    """The `mptq` commands in a page's code blocks, without what a shell adds."""
    blocks = re.findall(r"```.*?\n(.*?)```|((?:^    .*\n)+)", page.read_text(), re.MULTILINE | re.DOTALL)
    for block in ("".join(pair) for pair in blocks):
        for line in re.sub(r"\\\n", " ", block).splitlines():
            found = re.match(r"\s*(?:\$ )?(?:torchrun .* -m )?(mptq (?:{})\b.*)".format("|".join(COMMANDS)), line)
            if found:
                yield re.sub(r"\s+#.*", "", found[1])


@pytest.mark.parametrize("page", [page for page in PAGES if list(shown(page))], ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_have_only_options_that_exist(page):
    for line in shown(page):
        _, name, *words = shlex.split(line.replace("[", " ").replace("]", " "))
        given = {word.partition("=")[0] for word in words if word.startswith("-") and word != "-"}
        assert given <= options(COMMANDS[name]) | {"--help", "-h"}, line
