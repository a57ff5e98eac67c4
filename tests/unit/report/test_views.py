"""Views, tables and number formats of the page."""

import math

import pytest

from mptq.report import tables, views
from mptq.report.formatting import change, duration, uncertain
from tests.support.report_documents import Shape, document


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.layers.3.self_attn.q_proj.weight", (3, "q_proj")),
        ("model.layers.12.mlp.experts.7.up_proj.weight", (12, "experts up_proj")),
        ("model.layers.2.mlp.shared_experts.up_proj.weight", (2, "shared_experts up_proj")),
        ("decoder.layers.0.mlp.linear_fc1.weight", (0, "linear_fc1")),
        ("decoder.layers.5.mlp.experts.local_experts.31.linear_fc2.weight", (5, "experts linear_fc2")),
        ("lm_head.weight", None),
    ],
)
def test_place(name, place):
    assert views.place({"name": name}) == place


def test_grid_picks_the_worst_expert_and_leaves_gaps():
    rows = [
        {"name": f"model.layers.1.mlp.experts.{expert}.up_proj.weight", "sqnr_db": value}
        for expert, value in enumerate((31.0, None, 29.5, 30.0))
    ]
    (name, values), *others = views.grid(rows, "sqnr_db", 3, min).items()
    assert (name, values[1], others) == ("experts up_proj", 29.5, [])
    assert math.isnan(values[0])
    assert math.isnan(values[2])
    assert views.grid(rows, "sqnr_db", 3, max)[name][1] == 31.0
    assert views.grid(rows, "absent", 3, max) == {}


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("model.layers.3.mlp.experts.17.up_proj", "model.layers.*.mlp.experts.*.up_proj"),
        ("decoder.layers.mlp.linear_fc1._extra_state/shard_0_30", "decoder.layers.mlp.linear_fc1._extra_state/shard_*_*"),
        ("lm_head", "lm_head"),
    ],
)
def test_pattern(name, pattern):
    assert views.pattern(name) == pattern


def test_names_are_grouped_with_counts_and_reasons():
    names = {f"a.{layer}.b": "old" for layer in range(30)} | {"a.x": "new"}
    table = tables.names("Dropped", names, names)
    assert [[text for _, text in row] for row in table.rows] == [["a.*.b", "30", "old"], ["a.x", "1", "new"]]
    assert len(tables.names("Excluded", ["lm_head"]).columns) == 2
    assert tables.names("Excluded", []) is None


def test_worst_tensors_come_first_up_to_the_limit():
    found = document(Shape(layers=40, formats=("hf", "megatron")))
    table = tables.tensors(found)
    assert len(found["tensors"]) == 440
    assert len(table.rows) == tables.SHOWN == 200
    column = [column.title for column in table.columns].index("relative error")
    shown = [row[column][0] for row in table.rows]
    assert shown == sorted((row["relative_error"] for row in found["tensors"]), reverse=True)[:200]


def test_columns_without_values_are_left_out():
    dense, plain = (tables.layers(document(Shape(layers=2, fidelity=wanted))) for wanted in (True, False))
    titles = ["layer", "weight error (Hugging Face)", "hidden-state error", "hidden-state 1 - cosine", "K scale", "V scale"]
    assert [column.title for column in dense.columns] == titles
    assert [column.title for column in plain.columns] == titles[:2]
    mixed = tables.layers(document(Shape(layers=3, experts=4)))
    assert mixed.rows[0][-1] == (None, None)  # the first layer is dense
    assert mixed.rows[1][-1][0] is not None


def test_component_totals():
    table = tables.components(document(Shape(layers=2)))
    assert table.foot[0] == "total"
    assert [column.title for column in table.columns] == [
        "component",
        "parameters",
        "checkpoint",
        "Hugging Face",
        "action",
    ]
    assert len(table.foot) == len(table.columns)


def test_number_formats():
    assert uncertain(0.00832, 0.00009) == "0.008320 ± 0.000090"
    assert uncertain(12.3456, 0.5) == "12.35 ± 0.50"
    assert uncertain(1234.5, 120) == "1234 ± 120"
    assert uncertain(0.5, 0.0) == "0.5"
    assert [duration(value) for value in (0.123, 12.34, 61, 3725)] == ["0.12 s", "12.3 s", "1 min 1 s", "1 h 2 min"]
    assert change(8.28e9, 4.17e9) == "8.28 → 4.17 GB"
    assert change(1.2e9, 612e6) == "1.20 GB → 612.00 MB"
