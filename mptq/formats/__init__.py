"""The output formats: one folder a format. Another one is a folder like these, and a row of `FORMATS`."""

from __future__ import annotations

from mptq.formats.hf.format import HF
from mptq.formats.megatron.format import MEGATRON
from mptq.formats.protocol import Format

FORMATS: dict[str, Format] = {format_.name: format_ for format_ in (HF, MEGATRON)}
"""By name, in the order in which a run writes them. The quantized hidden states follow what the first of a run stores."""
