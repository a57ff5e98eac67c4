"""Runs that are stopped at any moment and resumed give the same bytes as an uninterrupted run."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from mptq import Options, make_plan, run
from mptq.calibration.datasets.options import DataOptions
from mptq.errors import OutputError, StoppedError
from mptq.output import journal
from mptq.output.directory import partial_of
from mptq.recipes.recipe import load_recipe
from tests.support.killing import check, comparable, contents
from tests.support.processes import checked, python

PLAIN = Options(device="cpu", data=DataOptions((), eval_size=0), max_shard_bytes=200_000)
BOTH = ("hf", "megatron")


class Stopping:
    """Returns True on the `after`th call."""

    def __init__(self, after):
        self.left = after

    def __call__(self):
        self.left -= 1
        return self.left == 0


def stopped(plan, out, after, options=PLAIN, total=None):
    """Run until a stop after this many units, which are `total` together with those of earlier runs."""
    with pytest.raises(StoppedError, match=rf"^stopped after {total or after} of {len(plan.units)} steps"):
        run(plan, out, replace(options, stop=Stopping(after)))


def whole(plan, folder, options=PLAIN):
    """The files of an uninterrupted run."""
    run(plan, folder / "whole", options)
    return comparable(folder / "whole")


@pytest.mark.parametrize("after", [1, 2, 3, 4, 6])  # after the last, everything has been read and written
def test_a_stopped_run_resumes(aligned, after, tmp_path, tmp_path_factory):
    plan = make_plan(aligned, "fp8-blockwise", BOTH)
    stopped(plan, tmp_path / "out", after)
    document = run(plan, tmp_path / "out", replace(PLAIN, resume=True))
    check(tmp_path / "out", whole(plan, tmp_path_factory.mktemp("one")))
    alone = run(plan, tmp_path_factory.mktemp("two") / "out", PLAIN)
    assert document["tensors"] == alone["tensors"]


@pytest.mark.parametrize("memory", [10**9, 1], ids=["memory", "file"])
@pytest.mark.parametrize(("model", "recipe"), [("aligned", "fp8"), ("mixtral", "fp8-per-channel")])
def test_activations_and_metrics_resume_too(request, model, recipe, memory, options, tmp_path, tmp_path_factory):
    options = replace(options, activation_memory=memory)
    plan = make_plan(request.getfixturevalue(model), load_recipe(recipe).changed(kv_cache="fp8"), BOTH)
    for total in (1, 2):  # one unit each
        stopped(plan, tmp_path / "out", 1, replace(options, resume=True), total)
    document = run(plan, tmp_path / "out", replace(options, resume=True))
    check(tmp_path / "out", whole(plan, tmp_path_factory.mktemp("one"), options))
    alone = run(plan, tmp_path_factory.mktemp("two") / "out", options)
    assert all(document[key] == alone[key] for key in ("tensors", "layers", "fidelity"))


def test_an_unfinished_run_is_not_overwritten_by_mistake(aligned, tmp_path):
    plan = make_plan(aligned, "fp8-blockwise")
    stopped(plan, tmp_path / "out", 2)
    with pytest.raises(OutputError, match=r"did not complete \(finished steps: 2\): pass --resume to continue it, or"):
        run(plan, tmp_path / "out", PLAIN)
    run(plan, tmp_path / "out", replace(PLAIN, overwrite=True))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_resume_starts_a_new_run_and_leaves_a_complete_output_unchanged(aligned, tmp_path):
    plan = make_plan(aligned, "fp8-blockwise")
    first = run(plan, tmp_path / "out", replace(PLAIN, resume=True))
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert run(plan, tmp_path / "out", replace(PLAIN, resume=True)) == json.loads(json.dumps(first))
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == times
    with pytest.raises(OutputError, match="out is complete, but differs in --recipe or"):
        run(make_plan(aligned, "fp8-per-channel"), tmp_path / "out", replace(PLAIN, resume=True))


OTHER = {
    "--recipe or": (("fp8-per-channel", ("hf",)), PLAIN),
    "--format": (("fp8-blockwise", BOTH), PLAIN),
    "--max-shard-size .200000, now 100000.": (("fp8-blockwise", ("hf",)), replace(PLAIN, max_shard_bytes=100_000)),
}


@pytest.mark.parametrize("what", OTHER)
def test_options_that_differ_are_named(aligned, what, tmp_path):
    stopped(make_plan(aligned, "fp8-blockwise"), tmp_path / "out", 2)
    (recipe, formats), options = OTHER[what]
    before = contents(tmp_path)
    with pytest.raises(OutputError, match=f"unfinished .* differs in .*{what}.*: resume with the same options, or pass"):
        run(make_plan(aligned, recipe, formats), tmp_path / "out", replace(options, resume=True))
    assert contents(tmp_path) == before


def test_other_data_is_named(aligned, options, tmp_path):
    plan = make_plan(aligned, "fp8")
    stopped(plan, tmp_path / "out", 2, options)
    other = replace(options, data=replace(options.data, seed=1), resume=True)
    with pytest.raises(OutputError, match="differs in --seed .0, now 1.: "):
        run(plan, tmp_path / "out", other)


def test_other_weights_of_the_same_layout_are_named(aligned, tmp_path):
    """Another iteration's shards have the same sizes and metadata; a copy of the same shards is resumed."""
    copied = shutil.copytree(aligned, tmp_path / "copied")
    stopped(make_plan(aligned, "fp8-blockwise"), tmp_path / "one", 2)
    run(make_plan(copied, "fp8-blockwise"), tmp_path / "one", replace(PLAIN, resume=True))
    stopped(make_plan(copied, "fp8-blockwise"), tmp_path / "two", 2)
    for shard in copied.rglob("*.distcp"):
        content = bytearray(shard.read_bytes())
        place = content.rfind(b"PK\x01\x02")  # last entry of the last zip directory; its CRC-32 is at offset 16
        content[place + 16] ^= 1
        shard.write_bytes(content)
    with pytest.raises(OutputError, match="differs in the contents of the shards: "):
        run(make_plan(copied, "fp8-blockwise"), tmp_path / "two", replace(PLAIN, resume=True))


def test_an_incomplete_journal_line_is_ignored(aligned, tmp_path, tmp_path_factory):
    plan = make_plan(aligned, "fp8-blockwise", BOTH)
    stopped(plan, tmp_path / "out", 3)
    file = tmp_path / ".out.partial" / journal.NAME
    file.write_bytes(file.read_bytes()[:-10])
    assert list(journal.read(file)[1]) == [0, 1]
    run(plan, tmp_path / "out", replace(PLAIN, resume=True))
    check(tmp_path / "out", whole(plan, tmp_path_factory.mktemp("one")))


@pytest.mark.parametrize(("old", "new"), [('"unit"', '"none"'), ('"accounts"', '"none"'), ('{"unit"', '["x", {"unit"')])
def test_a_damaged_journal_is_one_line(aligned, old, new, tmp_path):
    plan = make_plan(aligned, "fp8-blockwise")
    stopped(plan, tmp_path / "out", 2)
    file = tmp_path / ".out.partial" / journal.NAME
    file.write_text(file.read_text().replace(old, new))
    with pytest.raises(OutputError, match=r"\.journal is damaged .*: pass --overwrite to start over"):
        run(plan, tmp_path / "out", replace(PLAIN, resume=True))


def test_a_full_disk_is_one_line_and_the_run_resumes(aligned, tmp_path, tmp_path_factory, monkeypatch):
    """The writer thread fails after 400 kB."""
    plan = make_plan(aligned, "fp8-blockwise", BOTH)
    written, pwrite = [0], os.pwrite

    def full(descriptor, data, offset):
        written[0] += len(data)
        if written[0] > 400_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OutputError, match="cannot be written: No space left on device") as caught:
        run(plan, tmp_path / "out", PLAIN)
    assert "pass --resume to continue" in caught.value.__notes__[0]
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    run(plan, tmp_path / "out", replace(PLAIN, resume=True))
    check(tmp_path / "out", whole(plan, tmp_path_factory.mktemp("one")))


def test_directories_are_synced_before_the_journal_line(aligned, options, tmp_path, monkeypatch):
    """A power failure loses every name whose directory was not synced since, even if its file was synced (fsync(2))."""
    durable, commits, (fsync, fdatasync) = {}, [], (os.fsync, os.fdatasync)
    out = tmp_path / "new" / "out"

    def sync(descriptor):
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if path.is_dir():
            durable[path] = set(os.listdir(path))
        fsync(descriptor)

    def sync_data(descriptor):
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if path.name == journal.NAME and journal.read(path)[1]:
            files = [file for file in partial_of(out).rglob("*") if file.is_file() and file.name != ".lock"]
            names = {name for file in files for name in (file, *file.parents) if tmp_path in name.parents}
            assert [name for name in names if name.name not in durable.get(name.parent, ())] == []
            commits.append(len(files))
        fdatasync(descriptor)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "fdatasync", sync_data)
    plan = make_plan(aligned, "fp8", BOTH)
    run(plan, out, replace(options, max_shard_bytes=200_000))
    assert len(commits) == len(plan.units)
    assert commits[0] < commits[-1]


@pytest.mark.slow
@pytest.mark.parametrize("form", BOTH)
def test_a_file_size_limit_is_one_line(aligned, form, tmp_path):
    """The operating system refuses a write in a real process."""
    command = f"{sys.executable} -m mptq quantize {aligned} --recipe fp8-per-channel --format {form} --eval-size 0 -o out"
    command = f"ulimit -f 100; exec {command}"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) <= 4, done.stderr
    assert "cannot be written: File too large" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_sigterm_finishes_the_layer_and_exits_with_75(aligned, tmp_path, tmp_path_factory):
    command = [sys.executable, "-m", "mptq", "quantize", aligned, "--recipe", "fp8-blockwise", "--eval-size", "0"]
    command = list(map(str, [*command, "-o", tmp_path / "out", "-v", "--resume"]))
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if "q_proj" in line:
            break
    process.send_signal(signal.SIGTERM)
    rest = process.stderr.read()
    assert process.wait() == 75, rest
    assert "mptq: stopped after " in rest
    assert "pass --resume to continue" in rest
    assert subprocess.run(command, check=False).returncode == 0
    check(
        tmp_path / "out",
        whole(
            make_plan(aligned, "fp8-blockwise"),
            tmp_path_factory.mktemp("one"),
            Options(device="cpu", data=DataOptions((), eval_size=0)),
        ),
    )


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["moments", "points"])
def test_killed_runs_resume(aligned, mode, tmp_path):
    killing(mode, aligned, tmp_path)


@pytest.mark.slow
def test_killed_runs_with_data_resume(mixtral, tokens, tmp_path):
    killing("moments", mixtral, tmp_path, "--recipe", "fp8", "--dataset", tokens, "--kills", 5)


def killing(mode, checkpoint, folder, *more):
    """Run tests/support/killing.py, in a process that forks."""
    (folder / "whole").mkdir()
    (folder / "killed").mkdir()
    done = checked(python("-m", "tests.support.killing", mode, checkpoint, folder, *more))
    assert " kills, with " in done.stdout
