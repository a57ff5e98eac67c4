import json

import pytest

from mptq.checkpoint.layout import locate
from mptq.errors import CheckpointError


def make(root, iteration="iter_0000007", word="7"):
    directory = root / iteration
    directory.mkdir(parents=True)
    (directory / ".metadata").touch()
    (directory / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist"}))
    if word is not None:
        (root / "latest_checkpointed_iteration.txt").write_text(word)
    return directory


def test_root_with_a_tracker(tmp_path):
    directory = make(tmp_path)
    found = locate(tmp_path)
    assert (found.directory, found.root, found.iteration) == (directory, tmp_path, 7)


def test_iteration_directory_of_a_root(tmp_path):
    directory = make(tmp_path)
    assert locate(directory) == locate(tmp_path)


def test_iteration_directory_alone(tmp_path):
    directory = make(tmp_path, word=None)
    found = locate(directory)
    assert (found.root, found.iteration) == (directory, 7)


def test_release(tmp_path):
    make(tmp_path, "release", "release")
    assert locate(tmp_path).iteration is None


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda root: (root / "latest_checkpointed_iteration.txt").write_text("8"),
            "iter_0000008, which does not exist",
        ),
        (
            lambda root: (root / "latest_checkpointed_iteration.txt").write_text("latest"),
            "must hold an iteration number",
        ),
        (lambda root: (root / "iter_0000007" / ".metadata").unlink(), "has no .metadata"),
        (lambda root: (root / "iter_0000007" / "mp_rank_00").mkdir(), "is a legacy checkpoint"),
        (
            lambda root: (root / "iter_0000007" / "metadata.json").write_text('{"sharded_backend": "zarr"}'),
            "is a zarr checkpoint",
        ),
        (
            lambda root: (root / "iter_0000007" / "metadata.json").write_text('{"sharded_backend": "other"}'),
            "backend 'other'",
        ),
        (lambda root: (root / "iter_0000007" / "metadata.json").write_text("{"), "is not Megatron's metadata.json"),
    ],
)
def test_what_is_wrong_is_said(tmp_path, spoil, message):
    make(tmp_path)
    spoil(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        locate(tmp_path)


def test_no_directory(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        locate(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="is a file"):
        locate(tmp_path / "file")
    with pytest.raises(CheckpointError, match="has no .metadata: it is not a torch_dist checkpoint"):
        locate(tmp_path)
