import json
import pickle

import pytest
import torch

from mptq.checkpoint.locate import locate
from mptq.errors import CheckpointError

TRACKER = "latest_checkpointed_iteration.txt"


def make(root, *iterations, word=None):
    """Creates a root with checkpoints of these iterations (numbers or "release"), with only what `locate` needs."""
    for iteration in iterations:
        directory = root / (iteration if isinstance(iteration, str) else f"iter_{iteration:07d}")
        directory.mkdir(parents=True)
        (directory / ".metadata").touch()
        (directory / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist"}))
    if word is not None:
        (root / TRACKER).write_text(word)
    return directory


def make_nemo(root, *contexts):
    make(root, "weights")
    (root / "context").mkdir()
    for name in contexts:
        (root / "context" / name).touch()
    return root


def test_root_with_a_tracker(tmp_path):
    directory = make(tmp_path, 9, 7, word="7\n")
    found = locate(tmp_path)
    assert (found.directory, found.root, found.iteration) == (directory, tmp_path, 7)
    assert (found.framework, found.config) == ("Megatron-LM", None)


def test_iteration_directory_of_a_root(tmp_path):
    directory = make(tmp_path, 7, word="7")
    assert locate(directory) == locate(tmp_path)


def test_iteration_directory_alone(tmp_path):
    directory = make(tmp_path, 7)
    found = locate(directory)
    assert (found.root, found.iteration) == (directory, 7)


def test_release(tmp_path):
    make(tmp_path, "release", word="release")
    assert locate(tmp_path).iteration is None
    (tmp_path / TRACKER).unlink()
    assert locate(tmp_path).directory == tmp_path / "release"


def test_a_root_without_a_tracker_means_its_last_iteration(tmp_path):
    make(tmp_path, 900, 10000, 8)
    found = locate(tmp_path)
    assert (found.iteration, found.root) == (10000, tmp_path)
    make(tmp_path, "release")
    with pytest.raises(CheckpointError, match="both release and iter_"):
        locate(tmp_path)


def test_one_iteration_of_several(tmp_path):
    directory = make(tmp_path, 900, 10000, 8, word="900")
    assert locate(tmp_path, 8).directory == locate(directory, 8).directory == directory
    with pytest.raises(CheckpointError, match=r"has no iteration 9: there are 8, 900, 10000$"):
        locate(tmp_path, 9)
    with pytest.raises(CheckpointError, match="omit --iteration, or pass the root"):
        locate(directory, 900)


def test_many_iterations_are_not_all_listed(tmp_path):
    make(tmp_path, *range(20))
    with pytest.raises(CheckpointError, match=r"there are 0, 1, 2, \.\.\., 17, 18, 19$"):
        locate(tmp_path, 77)


def test_megatron_bridge(tmp_path):
    directory = make(tmp_path, 300, 70_000)
    train = {"step": torch.tensor(300), "consumed_train_samples": torch.tensor(9600), "do_train": torch.tensor(True)}
    torch.save(train, tmp_path / "latest_train_state.pt")
    found = locate(tmp_path)
    assert (found.iteration, found.framework, found.config) == (300, "Megatron-LM", None)
    (directory / "run_config.yaml").touch()
    found = locate(tmp_path, 70_000)
    assert (found.framework, found.config) == ("Megatron-Bridge", directory / "run_config.yaml")
    assert locate(directory) == found
    torch.save({"step": 4}, tmp_path / "latest_train_state.pt")
    with pytest.raises(CheckpointError, match="is not a Megatron-Bridge train state"):
        locate(tmp_path)


def test_nemo_2(tmp_path):
    root = make_nemo(tmp_path / "gpt--val_loss=1.20-step=99-consumed_samples=800.0", "model.yaml", "io.json")
    found = locate(root)
    assert (found.directory, found.root, found.iteration) == (root / "weights", root, 99)
    assert (found.framework, found.config) == ("NeMo 2", root / "context" / "model.yaml")
    assert locate(root / "weights") == locate(root, 99) == found
    with pytest.raises(CheckpointError, match="is a single NeMo 2 checkpoint"):
        locate(root, 100)
    (root / "context" / "model.yaml").unlink()
    assert locate(root).config is None


def test_metadata_of_other_versions(tmp_path):
    directory = make(tmp_path, 7)
    for fields in (
        {},
        {"sharded_backend": "torch_dist"},
        {"sharded_backend": "torch_dist", "sharded_backend_version": 9, "x": 1},
    ):
        (directory / "metadata.json").write_text(json.dumps(fields))
        assert locate(tmp_path).directory == directory


def json_of(fields):
    return lambda directory: (directory / "metadata.json").write_text(fields)


def emptied(*names):
    """Replaces the contents of a directory with empty files (or directories, with a slash) of these names."""

    def spoil(directory):
        for path in directory.iterdir():
            path.unlink()
        for name in names:
            (directory / name).mkdir() if name.endswith("/") else (directory / name).touch()

    return spoil


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda directory: (directory.parent / TRACKER).write_text("8"),
            r"iter_0000008, .* another with --iteration \(there are 7",
        ),
        (lambda directory: (directory.parent / TRACKER).write_text("latest"), "must be an iteration number"),
        (lambda directory: (directory.parent / TRACKER).write_bytes(b"\xff\n\x00"), "must be an iteration number"),
        (lambda directory: (directory / "mp_rank_00").mkdir(), "is a legacy checkpoint .*--ckpt-convert-format torch_dist"),
        (json_of('{"sharded_backend": "zarr"}'), "is a zarr checkpoint: load it with megatron-core 0.12"),
        (json_of('{"sharded_backend": "other"}'), "backend 'other'"),
        (json_of("{"), "is not Megatron's metadata.json"),
        (json_of("[]"), "is not Megatron's metadata.json"),
        (lambda directory: (directory / "metadata.json").unlink(), "torch_dcp or fsdp_dtensor"),
        (lambda directory: (directory / ".metadata").unlink(), "saving was interrupted"),
        (emptied("__0_0.distcp", "__1_0.distcp"), "saving was interrupted"),
        (emptied("__0_0.distcp", ".metadata.tmp"), "saving was interrupted"),
        (emptied(), "is empty"),
        (emptied("config.json", "model-00001-of-00002.safetensors"), "is a Hugging Face model: .*AutoBridge.import_ckpt"),
        (emptied("model_config.yaml", "model_weights/"), "is an unpacked NeMo 1 archive"),
        (emptied("README.md"), "has no .metadata: it is not a torch_dist checkpoint"),
    ],
)
def test_errors_are_one_line(tmp_path, spoil, message):
    spoil(make(tmp_path, 7, word="7"))
    with pytest.raises(CheckpointError, match=message) as found:
        locate(tmp_path)
    assert "\n" not in str(found.value)


def test_zarr_arrays(tmp_path):
    directory = make(tmp_path, 7)
    emptied("embedding.word_embeddings.weight/")(directory)
    (directory / "embedding.word_embeddings.weight" / ".zarray").touch()
    with pytest.raises(CheckpointError, match="is a zarr checkpoint"):
        locate(directory)


def test_paths_that_are_not_directories(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        locate(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="is a file: pass the checkpoint's directory"):
        locate(tmp_path / "file")
    (tmp_path / "model.nemo").touch()
    with pytest.raises(CheckpointError, match="is a NeMo 1 archive: convert it with .*convert_nemo1_to_nemo2.py"):
        locate(tmp_path / "model.nemo")


def test_the_error_for_a_parent_directory_names_the_checkpoints_in_it(tmp_path):
    make(tmp_path / "run", 7)
    with pytest.raises(CheckpointError, match="such as run/iter_0000007 in it"):
        locate(tmp_path)


def test_a_train_state_that_torch_did_not_write(tmp_path):
    make(tmp_path, 7)
    (tmp_path / "latest_train_state.pt").write_bytes(pickle.dumps({"step": 7}))
    with pytest.raises(CheckpointError, match="was not written by torch.save"):
        locate(tmp_path)
