"""The output formats, one package each. To add a format, add a package like these and an entry in `FORMATS`."""

from __future__ import annotations

from mptq.formats.hf.format import HF
from mptq.formats.megatron.format import MEGATRON
from mptq.formats.protocol import Format

FORMATS: dict[str, Format] = {format_.name: format_ for format_ in (HF, MEGATRON)}
"""Formats by name, in the order in which a run writes them.

The quantized hidden states are computed with the weights that the first format of a run stores.
"""
