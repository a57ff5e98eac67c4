"""The Megatron writer on a full disk; tests/integration/test_pipeline.py tests what it writes."""

import errno
import os

import pytest
import torch

from mptq.formats.megatron.writer import MegatronWriter
from mptq.output.disk import PieceFile
from mptq.types import LayerOutput


def test_closing_a_file_on_a_full_disk_raises_nothing(tmp_path, monkeypatch):
    """The run must report the error of the failed write, not one from closing the file."""

    def full(_file, _data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(PieceFile, "write", full)
    writer = MegatronWriter(tmp_path, 1)
    writer.write(LayerOutput(0, blobs={"megatron": {"a": b"buffered"}}, tensors={"megatron": {}}))
    with pytest.raises(OSError, match="No space left on device"):
        writer.write(LayerOutput(0, {"megatron": {"w": torch.zeros(100_000)}}, {"megatron": {}}))
    writer.abort()
    assert [file.read_bytes() for file in tmp_path.rglob("*.distcp")] == [b""]
