"""Finds the checkpoint directory that a path refers to, or says in one line what is wrong with the path.

Layouts: Megatron-LM's root (megatron/training/checkpointing.py), Megatron-Bridge's, which adds `latest_train_state.pt`
(megatron/bridge/training/utils/checkpoint_utils.py), and NeMo 2's `weights/` and `context/`
(nemo/lightning/ckpt_utils.py).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from mptq.checkpoint.diagnose import require_torch_dist
from mptq.checkpoint.torch_zip import open_record
from mptq.errors import CheckpointError
from mptq.files import require_local

TRACKER = "latest_checkpointed_iteration.txt"
TRAIN_STATE = "latest_train_state.pt"
RUN_CONFIG = "run_config.yaml"
_INT64 = 8  # bytes
WEIGHTS, CONTEXT = "weights", "context"


@dataclass(frozen=True, slots=True)
class Location:
    """A torch_dist checkpoint. `directory` holds `.metadata`; `root` is the directory that the training run saved to.

    `config` is the run config of Megatron-Bridge or NeMo 2, if any; `framework` is the framework whose layout this is.
    """

    directory: Path
    root: Path
    iteration: int | None
    config: Path | None = None
    framework: str = "Megatron-LM"


def locate(path: Path, iteration: int | None = None) -> Location:
    """Resolves a checkpoint root, an `iter_*` directory or a NeMo 2 directory; `iteration` selects one of a root.

    Without `iteration`, the root's tracker file decides, or else the last iteration is used. Raises CheckpointError if
    there is no such directory or it is not a torch_dist checkpoint, naming its format if recognized and what to do;
    MptqError for a remote path.
    """
    require_local(path)
    path = path.resolve()
    if not path.exists():
        raise CheckpointError(f"{path} does not exist: pass a checkpoint root or an iter_* directory")
    if not path.is_dir():
        _refuse_file(path)
    nemo = _nemo(path, iteration)
    if nemo is not None:
        return nemo
    directory = _chosen(path, iteration)
    require_torch_dist(directory)
    in_root = directory != path or any((path.parent / tracker).is_file() for tracker in (TRACKER, TRAIN_STATE))
    config = directory / RUN_CONFIG
    bridge = config.is_file()
    return Location(
        directory,
        directory.parent if in_root else path,
        _number(directory),
        config if bridge else None,
        "Megatron-Bridge" if bridge else "Megatron-LM",
    )


def _refuse_file(path: Path) -> None:
    if path.suffix == ".nemo":
        raise CheckpointError(
            f"{path} is a NeMo 1 archive: convert it with NeMo's scripts/checkpoint_converters/convert_nemo1_to_nemo2.py"
        )
    raise CheckpointError(f"{path} is a file: pass the checkpoint's directory")


def _nemo(path: Path, iteration: int | None) -> Location | None:
    """Returns a NeMo 2 checkpoint given by its directory or by the `weights` in it; None if it is not one."""
    root = path.parent if path.name == WEIGHTS and (path.parent / CONTEXT).is_dir() else path
    directory, context = root / WEIGHTS, root / CONTEXT
    if not (directory.is_dir() and (context.is_dir() or (directory / "metadata.json").is_file())):
        return None
    require_torch_dist(directory)
    step = re.search(r"step=(\d+)", root.name)
    found = int(step[1]) if step else None
    if iteration not in (None, found):
        raise CheckpointError(f"{root} is a single NeMo 2 checkpoint: omit --iteration")
    config = context / "model.yaml"
    return Location(directory, root, found, config if config.is_file() else None, "NeMo 2")


def _number(directory: Path) -> int | None:
    word = directory.name.removeprefix("iter_")
    return int(word) if word.isdecimal() and word.isascii() else None


def _iterations(root: Path) -> dict[int, Path]:
    """Returns the `iter_*` directories of a root by iteration, in order."""
    found = {number: path for path in root.glob("iter_*") if path.is_dir() and (number := _number(path)) is not None}
    return dict(sorted(found.items()))


def _chosen(path: Path, iteration: int | None) -> Path:
    """Returns the directory of the requested iteration, or `path` itself if that is not a root."""
    found = _iterations(path)
    if iteration is not None:
        return _asked(path, iteration, found)
    if (path / TRACKER).is_file():
        return _tracked(path, found)
    if (path / TRAIN_STATE).is_file():
        return _existing(path, f"iter_{_step(path / TRAIN_STATE):07d}", TRAIN_STATE, found)
    return path if (path / ".metadata").is_file() else _untracked(path, found)


def _asked(path: Path, iteration: int, found: dict[int, Path]) -> Path:
    if iteration in found:
        return found[iteration]
    if _number(path) == iteration:
        return path
    raise CheckpointError(f"{path} has no iteration {iteration}: {_choices(path, found)}")


def _untracked(root: Path, found: dict[int, Path]) -> Path:
    """Returns the last iteration of a root without a tracker file, or else its `release`, or else `root` itself."""
    release = root / "release"
    if found and release.is_dir():
        raise CheckpointError(f"{root} has no {TRACKER}, but both release and iter_*: pass one of these directories")
    if found:
        return found[max(found)]
    return release if release.is_dir() else root


def _choices(path: Path, found: dict[int, Path]) -> str:
    if not found:
        return f"omit --iteration, or pass the root that holds the iter_* directories (there are none in {path.name})"
    shown = [str(number) for number in found]
    return f"there are {', '.join([*shown[:3], '...', *shown[-3:]] if len(shown) > 7 else shown)}"


def _tracked(root: Path, found: dict[int, Path]) -> Path:
    tracker = root / TRACKER
    word = tracker.read_bytes()[:100].decode(errors="replace").strip()
    if word == "release":
        return _existing(root, "release", TRACKER, found)
    if not (word.isdecimal() and word.isascii()):
        raise CheckpointError(f"{tracker} contains {ascii(word)[:40]}: it must be an iteration number or 'release'")
    return _existing(root, f"iter_{int(word):07d}", TRACKER, found)


def _existing(root: Path, name: str, tracker: str, found: dict[int, Path]) -> Path:
    if (root / name).is_dir():
        return root / name
    others = f"choose another with --iteration ({_choices(root, found)})" if found else "copy the whole checkpoint"
    raise CheckpointError(f"{root / tracker} points to {name}, which does not exist: {others}")


def _step(file: Path) -> int:
    """Returns the iteration in Bridge's train state, a torch file with a dict whose first entry is the int64 `step`."""
    where = str(file)
    with open_record(file, where) as archive:
        member = archive.members.get("data/0")
        if member is None or member.size != _INT64:
            raise CheckpointError(f"{where} is not a Megatron-Bridge train state: choose an iteration with --iteration")
        return int.from_bytes(archive.read("data/0", _INT64), "little")
