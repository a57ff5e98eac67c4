"""Human-readable tables of a report."""

from mptq.cli import tables
from tests.support.report_documents import document


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
