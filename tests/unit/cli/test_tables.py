"""Human-readable tables of a report."""

from mptq.cli import tables
from tests.support.report_documents import Shape, document


def test_skipped_documents_are_counted():
    made = document()
    assert tables.left_out(made) == ["skipped     documents: 4 empty (null or blank), 6 copies of held-out documents"]
    for row in made["calibration"]["datasets"]:
        row["empty"] = row["copies"] = 0
    assert tables.left_out(made) == []
    for row in made["calibration"]["datasets"]:
        del row["empty"], row["copies"]  # a report of an older version
    assert tables.left_out(made | {"calibration": None}) == tables.left_out(made) == []


def test_a_limit_without_a_measured_value():
    row = {"name": "max_kl", "limit": 0.1, "value": None, "met": False}
    assert tables.gate(row) == "the KL divergence is not measured (limit 0.1 nats)"
    assert tables.gate(row | {"value": 0.25}) == "the KL divergence is 0.25 nats (limit 0.1 nats)"
    unseen = row | {"value": 0.25, "text": "unseen"}
    assert tables.gate(unseen) == "the KL divergence is 0.25 nats on text of an unseen kind (limit 0.1 nats)"


def test_figures_on_both_kinds_of_text():
    made = document()
    lines = tables.figures(made)
    assert lines[-2:] == [
        "unseen kind KL 0.01410 ± 0.00020, perplexity ratio 1.0069, top-1 96.41 %",
        "            on 131008 tokens of plays, a kind of text that never calibrates",
    ]
    made["fidelity"]["unseen"] = None
    assert tables.figures(made) == lines[:-2]


def test_what_blackwells_loaders_make_of_blocks():
    assert tables.served(document()) == []
    made = document(Shape(fidelity=False)) | {"served_error": {"hf": 0.037}, "relative_error": {"hf": 0.0264}}
    assert tables.served(made)[0] == ("Blackwell   weight error 3.700 % instead of 2.640 %: its loaders round block scales to")
    found = document()["fidelity"]
    found["served"] = found | {"kl": {"mean": 0.03, "standard_error": 0.001}}
    assert "instead of 2.640 %, KL 0.0300 ± 0.0010: its loaders" in tables.served(made | {"fidelity": found})[0]


def test_the_groups_that_cost_most():
    made = document()
    assert tables.fidelity(made)
    for row in made["layers"]:
        row["sensitivity"] = {"linear_qkv": 1e-6 * (row["layer"] + 1), "linear_fc2": 0.0001 if row["layer"] == 1 else 0.0}
    (line,) = [line for line in tables.fidelity(made) if line.startswith("sensitivity")]
    assert line.startswith("sensitivity linear_fc2 of layer 1 (1.000 %), linear_qkv of layer ")
