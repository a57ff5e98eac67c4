"""Early syncing changes neither the bytes nor the errors; writes are split into pieces."""

import io
import os

from mptq.output import disk


def test_a_file_can_change_after_an_early_sync(tmp_path):
    with (tmp_path / "file").open("wb") as file:
        file.write(bytes(range(256)) * 1000)
        file.flush()
        disk.begin_sync(file.fileno(), 1000, 100_000)
        os.pwrite(file.fileno(), b"later", 500)
    disk.sync(tmp_path / "file")
    disk.sync(tmp_path)
    assert (tmp_path / "file").read_bytes()[495:510] == bytes(range(239, 244)) + b"later" + bytes(range(249, 254))


def test_systems_without_sync_file_range(monkeypatch, tmp_path):
    monkeypatch.setattr(disk.ctypes, "CDLL", lambda _name: object())
    disk._sync_file_range.cache_clear()
    with (tmp_path / "file").open("wb") as file:
        disk.begin_sync(file.fileno(), 0, 10)
    disk._sync_file_range.cache_clear()


def test_a_piece_file_writes_a_piece_at_a_time(tmp_path):
    content = os.urandom(3 * disk.PIECE_BYTES + 17)
    with disk.PieceFile(tmp_path / "raw", "wb") as file:
        assert file.write(content) == disk.PIECE_BYTES
        assert file.write(b"end") == 3
    assert (tmp_path / "raw").read_bytes() == content[: disk.PIECE_BYTES] + b"end"
    with io.BufferedWriter(disk.PieceFile(tmp_path / "buffered", "wb")) as file:
        assert file.write(b"begin") == 5
        assert file.write(content) == len(content)
        assert file.tell() == 5 + len(content)
    assert (tmp_path / "buffered").read_bytes() == b"begin" + content
