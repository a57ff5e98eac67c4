"""The schema of report.json: what it accepts and rejects, and its generated reference in docs/."""

import copy
import json

import pytest
from pydantic import ValidationError
from report_reference import PAGE, markdown

from mptq.errors import OutputError
from mptq.report import read, write
from mptq.report.html import render
from mptq.report.manifest import write_manifest
from mptq.report.schema import Report
from tests.support.report_documents import Shape, document

SHAPES = {
    "dense": Shape(layers=4),
    "plain": Shape(layers=3, formats=("hf", "megatron"), fidelity=False),
    "experts": Shape(layers=3, experts=4, formats=("hf", "megatron")),
    "megatron": Shape(layers=2, formats=("megatron",)),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_documents_of_runs_are_valid_in_memory_and_on_disk(shape):
    Report.model_validate(document(shape))
    found = Report.model_validate_json(json.dumps(document(shape)))
    assert found.version == 2
    assert found.bytes.before == document(shape)["bytes"]["in"]


def at(content, path):
    for step in path:
        content = content[step]
    return content


def parts(content, path=()):
    """Paths of every mapping whose keys the schema defines."""
    free = {"recipe", "model", "components", "actions", "schemes", "quantized_linears", "dropped", "relative_error"}
    if isinstance(content, list):
        if content and isinstance(content[0], dict):
            yield from parts(content[-1], (*path, len(content) - 1))
    elif isinstance(content, dict):
        yield path
        for key, value in content.items():
            if not (path == () and key in free | {"seconds", "versions"}):
                yield from parts(value, (*path, key))


WHOLE = document(SHAPES["experts"])
PARTS = list(parts(WHOLE))
OLDER = {
    "unseen",
    "served",
    "served_error",
    "rounding",
    "output_error",
    "output_error_nearest",
    "hidden_token_error",
    "sensitivity",
}
OPTIONAL = {"hf", "megatron", "empty", "copies"} | OLDER  # of a format that was not written, or not in older reports


def test_parts_finds_every_part():
    assert len(PARTS) == 22
    assert ("calibration", "datasets", 1) in PARTS
    assert ("fidelity", "kl") in PARTS
    assert ("layers", 2, "kv_cache") in PARTS


@pytest.mark.parametrize("path", PARTS, ids=lambda path: ".".join(map(str, path)) or "root")
def test_unknown_and_missing_fields_are_refused(path):
    changed = copy.deepcopy(WHOLE)
    at(changed, path)["surprise"] = 1
    with pytest.raises(ValidationError, match="surprise"):
        Report.model_validate(changed)
    for key in set(at(WHOLE, path)) - OPTIONAL:
        changed = copy.deepcopy(WHOLE)
        del at(changed, path)[key]
        with pytest.raises(ValidationError, match="Field required"):
            Report.model_validate(changed)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("schema",), 1),
        (("peak_rss_bytes",), "1063038976"),
        (("peak_rss_bytes",), 1.5),
        (("bytes", "in"), -1),
        (("formats",), []),
        (("formats", 0), "gguf"),
        (("fidelity", "kl", "mean"), float("nan")),
        (("gates", 0, "met"), 1),
        (("tensors", 0, "zeros"), 1.01),
        (("tensors", 0, "amax"), float("inf")),
        (("components", "norms", "in"), "1"),
        (("components", "norms", "gguf"), 1),
    ],
)
def test_wrong_values_are_refused(path, value):
    changed = copy.deepcopy(WHOLE)
    at(changed, path[:-1])[path[-1]] = value
    with pytest.raises(ValidationError):
        Report.model_validate(changed)


INVALID = {
    "no speeds": WHOLE | {"bytes_per_second": {}},
    "not a number": WHOLE | {"seconds": {"total": float("nan")}},
    "no layers": WHOLE | {"layers": []},
}


@pytest.mark.parametrize("content", INVALID.values(), ids=INVALID)
def test_invalid_documents_are_not_written(tmp_path, content):
    with pytest.raises(OutputError, match=r"report\.json is damaged: .*: this is a bug in mptq"):
        write(tmp_path, content)
    with pytest.raises(OutputError, match=r"manifest\.json is damaged: .*: this is a bug in mptq"):
        write_manifest(tmp_path, {"formats": []})
    assert list(tmp_path.iterdir()) == []
    write(tmp_path, WHOLE)
    assert read(tmp_path) == json.loads(json.dumps(WHOLE))


def test_a_run_that_read_and_wrote_nothing_has_no_throughput(tmp_path):
    write(tmp_path, WHOLE | {"bytes_per_second": {"read": None, "write": None}})
    page = render(read(tmp_path))
    assert "/s</" not in page
    assert "B/s" in render(WHOLE)


def test_json_schema_describes_every_field():
    schema = Report.model_json_schema(by_alias=True)
    models = [schema, *schema["$defs"].values()]
    assert len(models) == 19
    for model in models:
        others = model["additionalProperties"]
        assert others is False or "type" in others or "anyOf" in others  # a typed figure for each format
        assert all(field["description"] for field in model["properties"].values()), model["title"]
    assert {"schema", "bytes"} <= set(schema["properties"])


def test_reference_is_up_to_date():
    assert PAGE.read_text() == markdown(), "run python scripts/report_reference.py"
