import hashlib

import pytest

from mptq import files


@pytest.mark.parametrize("size", [0, 1, 99, 100, 101, 12_345])
def test_sha256_covers_all_bytes(tmp_path, monkeypatch, size):
    monkeypatch.setattr(files, "_PIECE", 100)
    content = bytes(number * number % 251 for number in range(size))
    (tmp_path / "file").write_bytes(content)
    assert files.sha256(tmp_path / "file") == hashlib.sha256(content).hexdigest()
