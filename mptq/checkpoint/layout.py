"""Find the checkpoint directory that a user means, and say in one line what is wrong when there is none."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from mptq.errors import CheckpointError

TRACKER = "latest_checkpointed_iteration.txt"


@dataclass(frozen=True, slots=True)
class Location:
    """A torch_dist checkpoint: `directory` holds `.metadata`; `root` is the directory that the training run named."""

    directory: Path
    root: Path
    iteration: int | None


def locate(path: Path) -> Location:
    """Resolve a checkpoint root (with its tracker file) or an `iter_*` directory.

    Raises CheckpointError when there is no such directory or it is not a torch_dist checkpoint, saying which format it
    is where that can be told, and how to convert it.
    """
    path = path.resolve()
    if not path.exists():
        raise CheckpointError(f"{path} does not exist: give a checkpoint root or an iter_* directory")
    if not path.is_dir():
        raise CheckpointError(f"{path} is a file: give the checkpoint's directory")
    tracker = path / TRACKER
    if tracker.is_file():
        return _from_tracker(path, tracker)
    _require_torch_dist(path)
    in_root = (path.parent / TRACKER).is_file()
    iteration = path.name.removeprefix("iter_")
    return Location(path, path.parent if in_root else path, int(iteration) if iteration.isdigit() else None)


def _from_tracker(root: Path, tracker: Path) -> Location:
    word = tracker.read_text(errors="replace").strip()
    if word == "release":
        directory, iteration = root / "release", None
    elif word.isdigit():
        directory, iteration = root / f"iter_{int(word):07d}", int(word)
    else:
        raise CheckpointError(f"{tracker} says {word[:40]!r}: it must hold an iteration number or 'release'")
    if not directory.is_dir():
        raise CheckpointError(f"{tracker} points to {directory.name}, which does not exist: give an iter_* directory")
    _require_torch_dist(directory)
    return Location(directory, root, iteration)


def _require_torch_dist(directory: Path) -> None:
    if any(directory.glob("mp_rank_*")):
        raise CheckpointError(
            f"{directory} is a legacy checkpoint (mp_rank_*): load it in Megatron-LM and save it with "
            "--ckpt-convert-format torch_dist"
        )
    backend = _backend(directory / "metadata.json")
    if backend == "zarr" or any(directory.glob("*/.zarray")):
        raise CheckpointError(
            f"{directory} is a zarr checkpoint: load it with megatron-core 0.12 or earlier and save it with "
            "--ckpt-format torch_dist"
        )
    if backend not in (None, "torch_dist"):
        raise CheckpointError(f"{directory} has the sharded backend {backend!r}: mptq reads torch_dist")
    if not (directory / ".metadata").is_file():
        raise CheckpointError(f"{directory} has no .metadata: it is not a torch_dist checkpoint, or its saving was cut short")


def _backend(config: Path) -> str | None:
    """`sharded_backend` of metadata.json, or None where there is no such file."""
    try:
        return str(json.loads(config.read_text())["sharded_backend"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{config} is not Megatron's metadata.json ({error}): the checkpoint is damaged") from error
