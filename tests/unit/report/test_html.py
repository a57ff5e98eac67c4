"""The HTML page: contents, escaping, determinism, size, and no network access."""

import copy
import os
import re
import subprocess
import sys

import pytest

from mptq.errors import OutputError
from mptq.report import html
from mptq.report.schema import Report
from tests.conftest import ROOT
from tests.support.report_documents import Shape, document

EVIL = "<script>alert(1)</script>"


SHAPES = {
    "dense": Shape(layers=6),
    "plain": Shape(layers=3, fidelity=False),
    "experts": Shape(layers=3, experts=4, formats=("hf", "megatron")),
}


@pytest.fixture(scope="module")
def pages():
    return {name: html.render(document(shape)) for name, shape in SHAPES.items()}


def titles(page):
    return re.findall("<figcaption>(.*?)</figcaption>", page)


def test_plots_of_a_dense_model(pages):
    assert titles(pages["dense"]) == [
        "Relative error by layer",
        "Hidden state: 1 - cosine by layer",
        "Signal-to-noise ratio of the weights (Hugging Face)",
        "Error of the outputs against rounding to nearest (Hugging Face)",
        "Distribution of the weights&#39; amax",
        "Largest input by layer (static scales)",
        "Size before and after, by component",
        "Where the time went",
    ]


def test_text_of_an_unseen_kind_has_its_own_tile(pages):
    assert "KL, unseen kind of text" in pages["dense"]
    assert "plays: 64 sequences" in pages["dense"]
    assert "unseen" not in pages["plain"]


def test_parts_without_data_are_absent(pages):
    plain = pages["plain"]
    assert len(titles(plain)) == 5
    for word in ("cosine", "Experts", "Calibration", "KL divergence", 'class="gates"', "Largest input", "None", "nan"):
        assert word not in plain.partition("<body>")[2].partition("<script>")[0], word
    bare = document(SHAPES["plain"]) | {"warnings": [], "excluded": [], "dropped": {}}
    assert 'class="warnings"' not in html.render(bare)
    assert "<details" not in html.render(bare).partition('id="run"')[0]


def test_plots_of_a_model_with_experts(pages):
    page = pages["experts"]
    assert "Calibration tokens of each expert" in titles(page)
    assert [title for title in titles(page) if title.startswith("Signal")] == [
        "Signal-to-noise ratio of the weights (Hugging Face)",
        "Signal-to-noise ratio of the weights (Megatron)",
    ]
    rows = [row["experts"] for row in document(SHAPES["experts"])["layers"] if row["experts"]]
    counts = sorted(count for row in rows for count in row["tokens"])
    assert f"from {counts[0]} to {counts[-1]}, median {counts[4]}" in page
    assert f"and {sum(len(row['fallback']) for row in rows)} use the layer&#39;s largest scale" in page


def test_extremes_are_drawn():
    found = document(Shape(layers=2, experts=2))
    for row in found["tensors"]:
        row |= {"relative_error": 0.0, "sqnr_db": None, "amax": 0.0, "max_abs_error": 0.0, "input_amax": None}
    for row in found["layers"]:
        row |= {"hf": 0.0, "hidden_relative_error": 0.0, "hidden_cosine": 1.0000001}
    found["layers"][1]["experts"] = {"tokens": [0, 0], "fallback": [0, 1]}
    found["fidelity"]["kl"] = {"mean": 0.0, "standard_error": 0.0}
    Report.model_validate(found)
    page = html.render(found)
    assert "2 of 2 experts received none, and 2 use" in page
    assert not [title for title in titles(page) if "Signal" in title or "amax" in title]
    alone = html.render(document(Shape(layers=1)))
    assert "(layer 0) to" in alone


def test_key_figures_gates_and_calibration(pages):
    text = re.sub(r"<[^>]*>", "", pages["dense"]).replace("\N{NO-BREAK SPACE}", " ")
    for words in (
        "0.008320 ± 0.000090",
        "1.00685 ± 0.00040",
        "96.410 ± 0.050 %",
        "✓ met KL divergence: 0.00832 nats (limit 0.02 nats)",
        "✗ missed perplexity increase: 0.685 % (limit 0.5 %)",
        "512 sequences, 1.05 M tokens",
        "of 2048 tokens, packed, seed 1234",
        "1 min 53 s",
        "42 of 42 tensors",
    ):
        assert words in text, words
    unmeasured = document(SHAPES["dense"]) | {"gates": [{"name": "max_kl", "limit": 0.1, "value": None, "met": False}]}
    assert "KL divergence: not measured" in html.render(unmeasured)


def test_every_plot_has_alt_text_labels_and_unique_ids(pages):
    for page in pages.values():
        drawings = re.findall(r'<div class="drawing" role="img" aria-label="([^"]+)"><svg viewBox=.*?</svg></div>', page, re.S)
        assert len(drawings) == len(titles(page))
        assert all(len(words) > 40 for words in drawings)
        ids = re.findall(r' id="([^"]*)"', page)
        assert len(ids) == len(set(ids))
        assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', page)) <= set(ids)
        assert not re.search(r"#010[0-9a-f]{3}", page)  # a placeholder color
        for label in ("layer", "relative error [%]", "SNR [dB]", "time [s]"):
            assert f">{label}</text>" in page


def test_the_page_loads_no_external_resources(pages):
    for page in pages.values():
        assert not re.search(r"(?:src|href|action|data)\s*=\s*[\"']?\s*(?:https?:)?//", page)
        assert not re.search(r"url\(\s*[\"']?(?!#)|@import|http", page.replace("http-equiv", ""))
        assert "default-src 'none'" in page


def test_names_are_escaped():
    found = copy.deepcopy(document(Shape(layers=2)))
    found["recipe"] |= {"name": EVIL, "description": EVIL, "note": EVIL}
    found["source"]["path"] = f'"{EVIL}'
    found["warnings"] = [EVIL]
    found["excluded"] = [EVIL]
    found["dropped"] = {EVIL: EVIL}
    found["versions"][EVIL] = EVIL
    found["seconds"] = {EVIL: 1.0, **found["seconds"]}
    found["model"]["dtype"] = EVIL
    found["components"][EVIL] = {"parameters": 1, "in": 5_000_000, "hf": 1}
    found["actions"][EVIL] = EVIL
    found["calibration"]["datasets"][0]["name"] = EVIL
    found["calibration"]["tokenizer"] = EVIL
    found["tensors"][0] |= {"name": f"model.layers.0.{EVIL}.weight", "scheme": EVIL, "relative_error": 9.0}
    found["tensors"][1]["name"] = "model.layers.0.$\\frac{1}.weight"
    page = html.render(found)
    assert page.count("<script") == 1
    assert EVIL not in page
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;") > 15
    assert "$\\frac{1}" in page  # not rendered as a formula


def test_the_same_document_gives_the_same_bytes(pages):
    code = (
        "import sys; from mptq.report.html import render; from tests.support.report_documents import Shape, document;"
        "sys.stdout.buffer.write(render(document(Shape(layers=3, experts=4, formats=('hf', 'megatron')))).encode())"
    )
    settings = (
        {"PYTHONHASHSEED": "1"},
        {"PYTHONHASHSEED": "2", "MPLBACKEND": "agg", "TZ": "Asia/Tokyo", "SOURCE_DATE_EPOCH": "9"},
    )
    for setting in settings:
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ | setting, capture_output=True, check=True)
        assert done.stdout.decode() == pages["experts"]


def test_a_large_model_makes_a_small_page():
    found = document(Shape(layers=100, experts=256))
    assert len(found["tensors"]) == 77_200
    page = html.render(found)
    assert len(page.encode()) < 1_000_000
    assert "200 of 77200 tensors; all of them are in report.json" in page
    assert page.count("<tr>") < 200 + 100 + 60


def test_style_leaves_the_users_settings_alone():
    import matplotlib as mpl

    with mpl.rc_context({"font.size": 31.0, "svg.fonttype": "path", "axes.facecolor": "red"}):
        before = dict(mpl.rcParams)
        assert html.render(document(SHAPES["plain"])) == html.render(document(SHAPES["plain"]))
        assert dict(mpl.rcParams) == before
        assert ">layer</text>" in html.render(document(SHAPES["plain"]))


def test_a_page_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "page.html"
    html.write(path, "first")
    assert path.read_text() == "first"

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.replace", full)
    with pytest.raises(OutputError, match="No space left on device"):
        html.write(path, "second")
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(OutputError, match="is not a directory"):
        html.write(tmp_path / "absent" / "page.html", "third")
    with pytest.raises(OutputError, match="is a directory"):
        html.write(tmp_path, "fourth")
