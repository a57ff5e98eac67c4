import errno
import fcntl
import os
import shutil

import pytest

from mptq.errors import OutputError
from mptq.output.directory import OutputDirectory, check_output


def test_complete_or_absent(tmp_path):
    out = tmp_path / "out"
    with OutputDirectory(out) as target:
        (target.partial / "a").write_text("1")
        assert not out.exists()
    assert [path.name for path in out.iterdir()] == ["a"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_a_failed_run_leaves_nothing(tmp_path, error):
    with pytest.raises(error), OutputDirectory(tmp_path / "out") as target:
        (target.partial / "a").write_text("1")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_the_error_of_a_run_is_not_replaced_by_errors_of_the_cleanup(tmp_path, monkeypatch):
    """Neither a damaged journal nor an unreadable disk replaces it; the files stay."""
    with pytest.raises(KeyboardInterrupt) as caught, OutputDirectory(tmp_path / "out") as target:
        (target.partial / ".journal").write_text("no JSON\n")
        raise KeyboardInterrupt
    assert [note for note in caught.value.__notes__ if ".out.partial is left unchanged (" in note and "is damaged" in note]

    def failing(_path):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with pytest.raises(ValueError, match="^the first") as caught, OutputDirectory(tmp_path / "two") as target:
        (target.partial / ".journal").touch()
        monkeypatch.setattr("pathlib.Path.read_bytes", failing)
        raise ValueError("the first")
    assert caught.value.args == ("the first",)
    assert "Input/output error" in caught.value.__notes__[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.partial", ".two.partial"]
    with (tmp_path / ".two.partial" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # released


def test_a_failed_rename_is_a_one_line_error(tmp_path, monkeypatch):
    def failing(path, _target):
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    monkeypatch.setattr("pathlib.Path.rename", failing)
    with (
        pytest.raises(OutputError, match=r"out cannot be written: Input/output error \(.*\.out\.partial\)$"),
        OutputDirectory(tmp_path / "out") as target,
    ):
        (target.partial / "a").write_text("1")
    assert list(tmp_path.iterdir()) == []


def test_files_of_a_killed_run_are_removed(tmp_path):
    stale = tmp_path / ".out.partial" / "hf"
    stale.mkdir(parents=True)
    (stale / "half").write_text("x")
    with OutputDirectory(tmp_path / "out") as target:
        assert [path.name for path in target.partial.iterdir()] == [".lock"]


def test_existing_output_is_replaced_only_at_the_end(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").touch()
    with OutputDirectory(out) as target:
        (target.partial / "new").touch()
        assert (out / "old").exists()
    assert [path.name for path in out.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_two_runs_on_one_output(tmp_path):
    partial = tmp_path / ".out.partial"
    partial.mkdir()
    with (partial / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(OutputError, match="is being written by another run"), OutputDirectory(tmp_path / "out"):
            pass


def test_a_parent_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(OutputError, match="cannot be written: Not a directory"),
        OutputDirectory(tmp_path / "file" / "out"),
    ):
        pass
    with pytest.raises(OutputError, match="is a file"):
        check_output(tmp_path / "file" / "out", tmp_path / "src", 0, overwrite=False)


def test_a_parent_without_permission_is_refused(tmp_path, monkeypatch):
    """Tests may run as root, which can write anywhere, so the system calls are mocked."""
    monkeypatch.setattr(os, "access", lambda _path, _mode: False)
    with pytest.raises(OutputError, match="is not writable"):
        check_output(tmp_path / "out", tmp_path / "src", 0, overwrite=False)

    def denied(path, *_args, **_kwargs):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("pathlib.Path.mkdir", denied)
    with pytest.raises(OutputError, match="cannot be written: Permission denied"), OutputDirectory(tmp_path / "out"):
        pass


def test_output_paths_that_are_refused(tmp_path, monkeypatch):
    source = tmp_path / "src"
    source.mkdir()
    out = tmp_path / "out"
    check_output(out, source, 0, overwrite=False)
    for inside in (source, source / "out"):
        with pytest.raises(OutputError, match="is inside the checkpoint"):
            check_output(inside, source, 0, overwrite=True)
    with pytest.raises(OutputError, match="contains the checkpoint"):
        check_output(tmp_path, source, 0, overwrite=True)
    out.mkdir()
    check_output(out, source, 0, overwrite=False)  # an empty directory can be replaced
    (out / "thesis.tex").touch()
    with pytest.raises(OutputError, match="exists: choose another -o, or pass --overwrite"):
        check_output(out, source, 0, overwrite=False)
    with pytest.raises(OutputError, match="is not an output of mptq"):
        check_output(out, source, 0, overwrite=True)
    (out / "manifest.json").touch()
    check_output(out, source, 0, overwrite=True)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: shutil._ntuple_diskusage(10, 9, 1_000_000))
    with pytest.raises(OutputError, match=r"has 0\.00 GB free, and the output needs 2\.00 GB"):
        check_output(tmp_path / "new", source, 2_000_000_000, overwrite=False)
