"""The report of a run: `document` builds report.json, `schema` defines its fields, `html` renders it as a page."""

from mptq.report.document import (
    NAME,
    SCHEMA,
    Measured,
    QualityLimits,
    build,
    describe,
    layer_rows,
    manifest_of,
    peak_rss,
    read,
    relative_error,
    tensor_manifest,
    tensor_row,
    versions,
    write,
)

__all__ = [
    "NAME",
    "SCHEMA",
    "Measured",
    "QualityLimits",
    "build",
    "describe",
    "layer_rows",
    "manifest_of",
    "peak_rss",
    "read",
    "relative_error",
    "tensor_manifest",
    "tensor_row",
    "versions",
    "write",
]
